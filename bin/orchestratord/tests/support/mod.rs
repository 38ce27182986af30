//! A real daemon process with a fake engine behind it.

#![allow(dead_code, reason = "each test binary uses a part of it")]
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and says what the daemon said"
)]

pub(crate) mod pools;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::StreamExt;
use serde_json::{Value, json};
use test_harness_fake_engine::gguf::tiny_gguf;
use test_harness_fake_engine::{Script, install};

/// Bounds every wait. Far above what anything here takes, so that it is only
/// reached by a fault.
pub(crate) const DEADLINE: Duration = Duration::from_mins(1);

/// A daemon to be: its directories, engine and configuration.
pub(crate) struct Setup {
    dir: tempfile::TempDir,
    pool: Value,
    top: Value,
    env: Vec<(&'static str, String)>,
    /// How many file descriptors the daemon may have.
    descriptors: Option<u32>,
}

impl Setup {
    /// One pool `default` with an engine that follows the script.
    pub(crate) fn new(script: &Script) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = install(&dir.path().join("engine"), script);
        let model = dir.path().join("tiny.gguf");
        std::fs::write(&model, tiny_gguf()).unwrap();
        let pool = json!({
            "model": model,
            "provision": { "mode": "system", "path": engine },
        });
        Self {
            dir,
            pool,
            top: json!({}),
            env: Vec::new(),
            descriptors: None,
        }
    }

    pub(crate) fn descriptors(mut self, at_most: u32) -> Self {
        self.descriptors = Some(at_most);
        self
    }

    /// Sets a key of the pool.
    pub(crate) fn pool(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.pool[key] = value.into();
        self
    }

    /// Sets a key at the top.
    pub(crate) fn top(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.top[key] = value.into();
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: &str) -> Self {
        self.env.push((name, value.to_owned()));
        self
    }

    pub(crate) fn engine_dir(&self) -> PathBuf {
        self.dir.path().join("engine")
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// The settings of the pool, to make others like it.
    pub(crate) fn pool_settings(&self) -> Value {
        self.pool.clone()
    }

    fn write_config(&self) -> PathBuf {
        let mut config = json!({
            "listen": "127.0.0.1:0",
            "cache_dir": self.cache_dir(),
            "runtime_dir": self.dir.path().join("runtime"),
            "drain_seconds": 5,
            "pools": { "default": self.pool },
        });
        for (key, value) in self.top.as_object().unwrap() {
            config[key] = value.clone();
        }
        let path = self.dir.path().join("orchestratord.json");
        std::fs::write(&path, serde_json::to_string_pretty(&config).unwrap()).unwrap();
        path
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_orchestratord");
        let mut command = match self.descriptors {
            None => Command::new(program),
            Some(at_most) => {
                let mut shell = Command::new("sh");
                let script = format!("ulimit -n {at_most} && exec \"$0\" \"$@\"");
                shell.arg("-c").arg(script).arg(program);
                shell
            }
        };
        command
            .args(args)
            .arg("--config")
            .arg(self.write_config())
            .current_dir(self.dir.path())
            .env_remove("REQUIRE_REAL_LLAMA")
            .env_remove("ORCHD_TOKEN")
            .env_remove("RUST_LOG")
            .envs(self.env.iter().map(|(name, value)| (*name, value.as_str())))
            .stdin(Stdio::null());
        command
    }

    /// Starts the daemon and waits until it listens.
    pub(crate) fn start(self) -> Daemon {
        self.start_logging_to(Stdio::piped())
    }

    /// The same, with its log somewhere else.
    pub(crate) fn start_logging_to(self, stderr: Stdio) -> Daemon {
        let mut child = self
            .command(&["serve"])
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        if let Some(stderr) = child.stderr.take() {
            let kept = Arc::clone(&log);
            // Ends when the daemon closes its end.
            std::thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    println!("[daemon] {line}");
                    let mut kept = kept.lock().unwrap();
                    kept.push_str(&line);
                    kept.push('\n');
                }
            });
        }
        let mut daemon = Daemon {
            child,
            log,
            url: String::new(),
            setup: self,
            client: reqwest::Client::new(),
        };
        daemon.url = daemon.read_url();
        daemon
    }

    /// Starts the daemon and waits until its pool is ready.
    pub(crate) async fn ready(self) -> Daemon {
        let daemon = self.start();
        daemon.until_state("ready").await;
        daemon
    }
}

pub(crate) struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    pub(crate) url: String,
    setup: Setup,
    pub(crate) client: reqwest::Client,
}

impl Daemon {
    fn read_url(&mut self) -> String {
        let path = self.runtime_dir().join("orchestratord.json");
        let begun = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(&path) {
                let listening: Value = serde_json::from_str(&text).unwrap();
                return listening["url"].as_str().unwrap().to_owned();
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended before it listened: {status}");
            }
            assert!(begun.elapsed() < DEADLINE, "the daemon never listened");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the daemon has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Writes another configuration; the daemon is not told.
    pub(crate) fn rewrite_config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.config_file();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut config = serde_json::from_str(&text).unwrap();
        change(&mut config);
        std::fs::write(&path, serde_json::to_string_pretty(&config).unwrap()).unwrap();
    }

    pub(crate) fn config_file(&self) -> PathBuf {
        self.setup.dir.path().join("orchestratord.json")
    }

    /// A command beside the daemon, with its configuration file as it is.
    pub(crate) fn beside(&self, args: &[&str]) -> std::process::Output {
        self.command_beside(args).output().unwrap()
    }

    pub(crate) fn command_beside(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_orchestratord"));
        command
            .args(args)
            .arg("--config")
            .arg(self.config_file())
            .current_dir(self.setup.dir.path())
            .env_remove("ORCHD_TOKEN")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn runtime_dir(&self) -> PathBuf {
        self.setup.dir.path().join("runtime")
    }

    pub(crate) fn cache_dir(&self) -> PathBuf {
        self.setup.cache_dir()
    }

    pub(crate) fn engine_dir(&self) -> PathBuf {
        self.setup.engine_dir()
    }

    /// The model that the pool serves unless the test says otherwise.
    pub(crate) fn model(&self) -> PathBuf {
        self.setup.dir.path().join("tiny.gguf")
    }

    pub(crate) fn handoff(&self) -> PathBuf {
        self.runtime_dir().join("engines/llamacpp.json")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.cache_dir().join("run/default.pid")
    }

    pub(crate) async fn get(&self, path: &str) -> reqwest::Response {
        self.client
            .get(format!("{}{path}", self.url))
            .send()
            .await
            .unwrap()
    }

    pub(crate) async fn get_json(&self, path: &str) -> Value {
        self.get(path).await.json().await.unwrap()
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.url));
        request.json(&body).send().await.unwrap()
    }

    /// Submits a task that must be admitted, and returns the answer.
    pub(crate) async fn submit(&self, body: Value) -> Value {
        let response = self.post("/v2/tasks", body).await;
        let status = response.status();
        let answer: Value = response.json().await.unwrap();
        assert_eq!(status, 202, "{answer}");
        answer
    }

    pub(crate) async fn pool(&self) -> Value {
        self.get_json("/v2/pools/default").await
    }

    /// Waits until a pool of any name is ready, and returns it.
    pub(crate) async fn until_ready(&self, pool: &str) -> Value {
        self.until(&format!("pool {pool} is ready"), async || {
            let pool = self.get_json(&format!("/v2/pools/{pool}")).await;
            (pool["state"] == "ready").then_some(pool)
        })
        .await
    }

    pub(crate) async fn until_state(&self, state: &str) -> Value {
        self.until(&format!("the pool is {state}"), async || {
            let pool = self.pool().await;
            (pool["state"] == state).then_some(pool)
        })
        .await
    }

    /// Waits until the condition gives a value.
    pub(crate) async fn until<T>(
        &self,
        what: &str,
        mut condition: impl AsyncFnMut() -> Option<T>,
    ) -> T {
        let begun = Instant::now();
        loop {
            if let Some(found) = condition().await {
                return found;
            }
            assert!(begun.elapsed() < DEADLINE, "it never came that {what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// A task's stream, read to its end.
    pub(crate) async fn events(&self, task: &str, last_id: Option<u64>) -> Vec<Event> {
        let mut reader = self.open_events(task, "", last_id).await;
        let mut events = Vec::new();
        while let Some(event) = reader.next().await {
            events.push(event);
        }
        events
    }

    pub(crate) async fn open_events(
        &self,
        task: &str,
        query: &str,
        last_id: Option<u64>,
    ) -> EventReader {
        self.open_stream(&format!("/v2/tasks/{task}/events{query}"), last_id)
            .await
    }

    /// Any stream of events.
    pub(crate) async fn open_stream(&self, path: &str, last_id: Option<u64>) -> EventReader {
        let mut request = self.client.get(format!("{}{path}", self.url));
        if let Some(id) = last_id {
            request = request.header("Last-Event-ID", id);
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        EventReader {
            body: Box::pin(response.bytes_stream()),
            buffer: String::new(),
        }
    }

    /// Ends the daemon as a fault would, and starts another in its place.
    pub(crate) fn killed_and_started_again(mut self) -> Self {
        self.signal(nix::sys::signal::Signal::SIGKILL);
        self.wait();
        // It names the process that is gone.
        let _ = std::fs::remove_file(self.runtime_dir().join("orchestratord.json"));
        let empty = Setup {
            dir: tempfile::tempdir().unwrap(),
            pool: Value::Null,
            top: Value::Null,
            env: Vec::new(),
            descriptors: None,
        };
        std::mem::replace(&mut self.setup, empty).start()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    pub(crate) fn wait(&mut self) -> ExitStatus {
        wait(&mut self.child)
    }
}

pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(begun.elapsed() < DEADLINE, "the daemon never ended");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn until_exists(path: &Path) {
    let begun = Instant::now();
    while !path.exists() {
        assert!(begun.elapsed() < DEADLINE, "{} never came", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // An error only says that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The id in the answer to a submission.
pub(crate) fn id(accepted: &Value) -> &str {
    accepted["task_id"].as_str().unwrap()
}

/// Runs a command to its end.
pub(crate) fn output(setup: &Setup, args: &[&str]) -> std::process::Output {
    setup.command(args).output().unwrap()
}

/// One event of a stream.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) data: Value,
}

pub(crate) struct EventReader {
    body: std::pin::Pin<Box<dyn futures::Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    buffer: String,
}

impl EventReader {
    /// The next event; `None` at the stream's end.
    pub(crate) async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some((block, rest)) = self.buffer.split_once("\n\n") {
                let (block, rest) = (block.to_owned(), rest.to_owned());
                self.buffer = rest;
                if !block.starts_with(':') {
                    return Some(parse(&block));
                }
                continue;
            }
            let chunk = tokio::time::timeout(DEADLINE, self.body.next()).await;
            let chunk = chunk.expect("the stream never went on")?.unwrap();
            self.buffer.push_str(std::str::from_utf8(&chunk).unwrap());
        }
    }
}

fn parse(block: &str) -> Event {
    let field = |name: &str| {
        let mut lines = block.lines();
        let line = lines.find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name} in {block:?}"))
    };
    Event {
        id: field("id: ").parse().unwrap(),
        name: field("event: ").to_owned(),
        data: serde_json::from_str(field("data: ")).unwrap(),
    }
}

/// The names of events, repetitions told once.
pub(crate) fn shape(events: &[Event]) -> Vec<&str> {
    let mut names: Vec<&str> = events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    names
}

/// The text of all tokens; their indices must be 0, 1, 2 and so on.
pub(crate) fn text(events: &[Event]) -> String {
    let tokens: Vec<&Value> = events
        .iter()
        .filter(|event| event.name == "token")
        .map(|event| &event.data)
        .collect();
    for (index, token) in tokens.iter().enumerate() {
        assert_eq!(token["i"], index, "{tokens:?}");
    }
    tokens
        .iter()
        .map(|token| token["t"].as_str().unwrap())
        .collect()
}

pub(crate) fn is_alive(pid: u64) -> bool {
    // A zombie is dead; it only has not been waited for.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("State:\tZ"))
}

pub(crate) fn exists(path: &Path) -> bool {
    path.exists()
}
