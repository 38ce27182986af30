//! What the tests of a pool's life share.

use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Daemon, is_alive};

/// Restarts at once, so that a test need not wait, and long memory.
pub(crate) fn quick_restarts(crashes: u32) -> Value {
    json!({ "first_delay_ms": 10, "last_delay_ms": 50, "crashes": crashes, "cool_down_seconds": 3600 })
}

pub(crate) fn engine_of(pool: &Value) -> u64 {
    pool["replica"]["pid"].as_u64().unwrap()
}

pub(crate) fn send(pid: u64, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Asks something of the pool that must be taken on.
pub(crate) async fn ask(daemon: &Daemon, what: &str, body: Value) -> Value {
    let answer = daemon
        .post(&format!("/v2/pools/default/{what}"), body)
        .await;
    let status = answer.status();
    let view: Value = answer.json().await.unwrap();
    assert_eq!(status, 202, "{view}");
    view
}

pub(crate) async fn until_reload(daemon: &Daemon, state: &str) -> Value {
    daemon
        .until(&format!("the reload is {state}"), async || {
            let pool = daemon.pool().await;
            (pool["reload"]["state"] == state).then_some(pool)
        })
        .await
}

pub(crate) async fn until_gone(daemon: &Daemon, pid: u64) {
    daemon
        .until("the engine is gone", async || {
            (!is_alive(pid)).then_some(())
        })
        .await;
}

pub(crate) fn causes(pool: &Value) -> Vec<String> {
    let transitions = pool["transitions"].as_array().unwrap();
    let step = |step: &Value| {
        format!(
            "{} → {}: {}",
            step["from"].as_str().unwrap(),
            step["to"].as_str().unwrap(),
            step["cause"].as_str().unwrap()
        )
    };
    transitions.iter().map(step).collect()
}

pub(crate) fn pid_in(path: &Path) -> u64 {
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["pid"].as_u64().unwrap()
}

/// What a pool's second and third PID file would be called.
pub(crate) fn spare_pid_files(daemon: &Daemon) -> [PathBuf; 2] {
    ["next", "old"].map(|name| daemon.cache_dir().join(format!("run/default+{name}.pid")))
}
