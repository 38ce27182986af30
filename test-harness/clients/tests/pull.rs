//! A second model on a fresh cache: pulled on the command line from a web server
//! that breaks off in the middle, and then served.

#![allow(clippy::print_stdout, reason = "what the program says is to be read")]

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;

use reqwest::StatusCode;
use serde_json::json;
use test_harness_clients::server::{Server, alone};
use test_harness_clients::shelf::Shelf;
use test_harness_clients::twin;
use test_harness_e2e_haiku::binary::{Build, orchestratord};
use test_harness_e2e_haiku::engine::Engine;
use tokio::process::Command;

const PULL_LIMIT: Duration = Duration::from_mins(1);

/// The first answer breaks off here, at about a third.
const BREAK_AFTER: usize = 32 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_model_is_pulled_on_a_fresh_cache_and_served() {
    let _alone = alone().await;
    // The engine that this machine has, and the model that the twin is made from.
    let mut server = Server::start("base", json!({}), json!({})).await;
    server.daemon().until_ready().await;
    let model = server.daemon().handoff()["model"]["path"].clone();
    let Engine { pid, .. } = server.daemon().engine().await;
    let engine = std::fs::read_link(format!("/proc/{pid}/exe")).expect("the engine runs");
    server.stop().await;
    let model = model.as_str().expect("the handoff names the file");
    let (twin, digest) = twin::of(Path::new(model)).await;
    let size = std::fs::metadata(&twin).expect("the twin is there").len();

    let shelf = Shelf::with(twin, "twin.gguf", Some(BREAK_AFTER)).await;
    let cache = tempfile::tempdir().expect("a temporary directory");
    let first = json!({
        "model": shelf.url,
        "load": "on_demand",
        "provision": { "mode": "system", "path": engine },
    });
    let more = json!({ "cache_dir": cache.path() });
    let server = Server::start("pull", first, more).await;
    let asked = &shelf.asked;
    assert_eq!(
        asked.answers.load(Ordering::Relaxed),
        0,
        "nothing is fetched unasked"
    );

    pull(server.url(), &shelf.url, cache.path()).await;
    let (answers, parts) = (
        asked.answers.load(Ordering::Relaxed),
        asked.parts.load(Ordering::Relaxed),
    );
    let bytes = asked.bytes.load(Ordering::Relaxed);
    println!("{answers} answers, {parts} of them parts, {bytes} bytes for a file of {size}");
    assert!(parts >= 1, "the pull goes on where it broke off");
    // What arrived is not fetched again, but for what was on its way.
    assert!(
        (size..size + size / 4).contains(&bytes),
        "{bytes} for {size}"
    );

    let body = json!({
        "model": server.first(), "max_tokens": 8, "temperature": 0,
        "messages": [{ "role": "user", "content": "Say hello." }],
    });
    let (status, answer) = server.api().post("/v1/chat/completions", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer:#}");
    let pool = server
        .api()
        .json(&format!("/v2/pools/{}", server.first()))
        .await;
    assert_eq!(pool["replica"]["model_digest"], json!(digest), "{pool:#}");
    let fetched = asked.answers.load(Ordering::Relaxed);
    assert_eq!(fetched, answers, "what was pulled is not fetched again");
    server.stop().await;
}

async fn pull(daemon: &str, model: &str, directory: &Path) {
    let command = Command::new(orchestratord(Build::Default))
        .args(["models", "pull", model, "--url", daemon])
        .current_dir(directory)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(PULL_LIMIT, command).await;
    let output = output
        .expect("the pull ends in time")
        .expect("the program starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let more = String::from_utf8_lossy(&output.stderr).into_owned();
    println!("{said}{more}");
    assert!(output.status.success(), "{}: {said}\n{more}", output.status);
}
