//! Starts the real daemon as a process of its own, and ends it again.
//!
//! Every daemon has a temporary directory, a free port, and a pool whose name
//! no other process uses; the cache is the machine's own. So tests disturb
//! neither each other nor a daemon that somebody runs on this machine.

#![allow(
    clippy::print_stderr,
    reason = "what the daemon says belongs into the test's output"
)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use reqwest::StatusCode;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::Api;
use crate::engine::{Engine, is_gone};
use crate::settings::Settings;
use crate::wait_for;

/// An engine that must be built takes four to nine minutes on two cores; slow
/// machines and slow networks get their time too.
const READY_LIMIT: Duration = Duration::from_mins(40);

const LISTEN_LIMIT: Duration = Duration::from_secs(30);

const STOP_LIMIT: Duration = Duration::from_secs(45);

/// A daemon that refused to start.
#[derive(Debug)]
pub struct Refused {
    pub status: ExitStatus,
    pub stderr: String,
}

/// Starts a daemon that must end by itself within a few seconds.
pub async fn refused(settings: &Settings) -> Refused {
    let dir = temporary_directory();
    let mut child = settings
        .command(dir.path())
        .spawn()
        .expect("the daemon can be started");
    let mut pipe = child.stderr.take().expect("standard error is piped");
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        // What could be read is what there is to show.
        let _ = pipe.read_to_string(&mut text);
        text
    });
    let status = ended(&mut child, Duration::from_secs(10)).await;
    if status.is_none() {
        terminate(&mut child);
    }
    let stderr = reader.join().expect("the reader does not panic");
    let status = status
        .unwrap_or_else(|| panic!("the daemon was to refuse its start, but went on:\n{stderr}"));
    assert!(
        !dir.path().join("runtime/orchestratord.json").exists(),
        "a daemon that refuses its start must not announce itself"
    );
    Refused { status, stderr }
}

/// A running daemon. Dropping it ends it.
#[derive(Debug)]
pub struct Daemon {
    pub api: Api,
    /// The name of its only pool.
    pub pool: String,
    child: Child,
    dir: TempDir,
    lines: Arc<Mutex<Vec<String>>>,
    pump: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Starts a daemon and waits until its pool is ready.
    pub async fn ready(settings: &Settings) -> Self {
        let mut daemon = Self::launch(settings).await;
        daemon.until_ready().await;
        daemon
    }

    /// Starts a daemon and waits only until it listens.
    pub async fn launch(settings: &Settings) -> Self {
        let dir = temporary_directory();
        let mut child = settings
            .command(dir.path())
            .spawn()
            .expect("the daemon can be started");
        let pipe = child.stderr.take().expect("standard error is piped");
        let log = settings
            .log
            .clone()
            .unwrap_or_else(|| dir.path().join("daemon.log"));
        let log = File::create(log).expect("the log can be written");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let pump = {
            let (lines, name) = (Arc::clone(&lines), settings.name);
            std::thread::spawn(move || pump(pipe, log, name, &lines))
        };
        let mut daemon = Self {
            api: Api::new(""),
            pool: settings.pool_id(),
            child,
            dir,
            lines,
            pump: Some(pump),
        };
        let url = daemon.announced().await;
        daemon.api = Api::new(url);
        daemon
    }

    async fn announced(&mut self) -> String {
        let path = self.runtime_dir().join("orchestratord.json");
        let announced = wait_for(
            "the file that says where the daemon listens",
            LISTEN_LIMIT,
            async || {
                self.assert_alive();
                std::fs::read_to_string(&path).ok()
            },
        );
        let text = announced.await;
        let announced: Value = serde_json::from_str(&text).expect("the announcement is JSON");
        assert_eq!(announced["pid"], self.child.id(), "{announced}");
        let url = announced["url"].as_str();
        url.unwrap_or_else(|| panic!("no URL in {announced}"))
            .to_owned()
    }

    /// Waits until the pool is ready, and says how long that took. A pool that
    /// has failed is not waited for.
    pub async fn until_ready(&mut self) -> Duration {
        let begun = Instant::now();
        let path = format!("/v2/pools/{}/health", self.pool);
        loop {
            self.assert_alive();
            match self.api.try_get(&path).await {
                Some((StatusCode::OK, _)) => return begun.elapsed(),
                Some((StatusCode::SERVICE_UNAVAILABLE, body)) => {
                    let body: Value = serde_json::from_str(&body).expect("a pool's health is JSON");
                    assert_ne!(
                        body["state"],
                        "failed",
                        "the pool failed: {body:#}\n{}",
                        self.log_text()
                    );
                }
                other => panic!("GET {path}: {other:?}\n{}", self.log_text()),
            }
            assert!(
                begun.elapsed() < READY_LIMIT,
                "the pool is not ready\n{}",
                self.log_text()
            );
            // Not often: what is waited for may be a build of minutes.
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The pool as the daemon shows it.
    pub async fn pool_view(&self) -> Value {
        self.api.json(&format!("/v2/pools/{}", self.pool)).await
    }

    /// The engine behind the pool, which must be ready.
    pub async fn engine(&self) -> Engine {
        Engine::of(&self.pool_view().await)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn runtime_dir(&self) -> PathBuf {
        self.dir.path().join("runtime")
    }

    fn handoff_path(&self) -> PathBuf {
        self.runtime_dir()
            .join(format!("engines/llamacpp-{}.json", self.pool))
    }

    /// What the engine's handoff file holds.
    pub fn handoff(&self) -> Value {
        let path = self.handoff_path();
        let text = std::fs::read_to_string(&path);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{}: {error}: {text}", path.display()))
    }

    /// Where the engine's log is, which `stop` removes.
    pub fn engine_log(&self) -> PathBuf {
        let handoff = self.handoff();
        let log = handoff["log"].as_str().map(PathBuf::from);
        log.unwrap_or_else(|| panic!("no log in the handoff {handoff:#}"))
    }

    /// What the daemon wrote to its standard error so far.
    pub fn log_text(&self) -> String {
        self.lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    fn assert_alive(&mut self) {
        let ended = self.child.try_wait().expect("a child can be waited for");
        if let Some(status) = ended {
            panic!("the daemon ended: {status}\n{}", self.log_text());
        }
    }

    /// Asks a daemon with a ready pool to end, and checks that nothing of it
    /// is left.
    pub async fn stop(mut self) {
        let engine = self.engine().await;
        let log = self.engine_log();
        self.end().await;
        wait_for("the engine's end", Duration::from_secs(2), async || {
            is_gone(engine.pid).then_some(())
        })
        .await;
        let pid_file = log.with_file_name(format!("{}.pid", self.pool));
        for left in [
            self.handoff_path(),
            pid_file,
            self.runtime_dir().join("orchestratord.json"),
        ] {
            assert!(!left.exists(), "{} is left behind", left.display());
        }
        remove_traces(&log, &self.pool);
    }

    /// Asks the daemon to end, whatever its pool's state.
    pub async fn end(&mut self) {
        signal(&self.child, Signal::SIGTERM);
        let status = ended(&mut self.child, STOP_LIMIT).await;
        let status =
            status.unwrap_or_else(|| panic!("the daemon does not end:\n{}", self.log_text()));
        self.join_pump();
        assert!(
            status.success(),
            "the daemon ended with {status}:\n{}",
            self.log_text()
        );
    }

    fn join_pump(&mut self) {
        if let Some(pump) = self.pump.take() {
            // It ends with the pipe; its panic would be one about printing.
            let _ = pump.join();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        terminate(&mut self.child);
        self.join_pump();
    }
}

fn temporary_directory() -> TempDir {
    tempfile::Builder::new()
        .prefix("e2e-haiku-")
        .tempdir()
        .expect("a temporary directory can be made")
}

/// Passes the daemon's words on: to the test's output, to a file, and to
/// whoever asks later.
fn pump(pipe: impl Read, mut log: File, name: &str, lines: &Mutex<Vec<String>>) {
    let begun = Instant::now();
    for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line).into_owned();
        eprintln!("[{name} {:7.2}] {line}", begun.elapsed().as_secs_f64());
        // A full disk shows elsewhere; the output goes on.
        let _ = writeln!(log, "{line}");
        lines
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(line);
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Ok(pid) = i32::try_from(child.id()) {
        // Fails only if it is gone already, which is what is wanted.
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// How a child ended, if it does within `limit`.
async fn ended(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let deadline = Instant::now() + limit;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    None
}

/// Ends a child in order if it can, by force if it must.
fn terminate(child: &mut Child) {
    signal(child, Signal::SIGTERM);
    let deadline = Instant::now() + Duration::from_secs(15);
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Logs and the pool's lock stay in the machine's cache when a pool stops; no
/// later run uses their names again. Rotated logs have a suffix.
pub fn remove_traces(log: &Path, pool: &str) {
    let (Some(dir), Some(name)) = (log.parent(), log.file_name().and_then(|name| name.to_str()))
    else {
        return;
    };
    let _ = std::fs::remove_file(dir.join(format!("{pool}.lock")));
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(name) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}
