//! Starts a fake engine on a free port for a test, and kills it on drop.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{PORT_FILE, Script, install};

const START_DEADLINE: Duration = Duration::from_secs(20);

/// A running fake engine in a directory of its own.
#[derive(Debug)]
pub struct FakeEngine {
    child: Child,
    port: u16,
    dir: PathBuf,
}

impl FakeEngine {
    /// Starts an engine and waits until `/health` is 200.
    pub fn start(script: &Script) -> Self {
        Self::start_with(script, &[])
    }

    /// The same with further arguments, for example `["--parallel", "4"]`.
    pub fn start_with(script: &Script, args: &[&str]) -> Self {
        let engine = Self::launch(script, args);
        engine.wait_until_ready();
        engine
    }

    /// Starts an engine and waits only until its port is open.
    pub fn launch(script: &Script, args: &[&str]) -> Self {
        let dir = fresh_directory();
        let binary = install(&dir, script);
        let child = Command::new(&binary)
            // The engine takes a free port itself and writes it to a file, so
            // no other process can come between.
            .args(["--host", "127.0.0.1", "--port", "0", "--metrics"])
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the fake engine can be started");
        let mut engine = Self {
            child,
            port: 0,
            dir,
        };
        engine.port = engine.reported_port();
        engine
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Kills the process at once, as a crash would.
    pub fn kill(&mut self) {
        // An error only says that it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The bodies of the completions it was asked for, oldest first.
    pub fn requests(&self) -> Vec<serde_json::Value> {
        let (_, body) = get(self.port, "/fake/requests").expect("the fake engine answers");
        serde_json::from_str(&body).expect("the fake engine answers with JSON")
    }

    /// How many slots are busy.
    pub fn busy_slots(&self) -> u64 {
        self.number("/fake/busy")
    }

    /// How many connections it has accepted. Every question that this type
    /// asks, this one too, is one of them.
    pub fn connections(&self) -> u64 {
        self.number("/fake/connections")
    }

    fn number(&self, path: &str) -> u64 {
        let (_, body) = get(self.port, path).expect("the fake engine answers");
        body.trim()
            .parse()
            .expect("the fake engine answers with a number")
    }

    fn reported_port(&mut self) -> u16 {
        let deadline = Instant::now() + START_DEADLINE;
        loop {
            if let Some(port) = crate::number_in(&self.dir.join(PORT_FILE)) {
                return u16::try_from(port).expect("the engine writes a port number");
            }
            if let Ok(Some(status)) = self.child.try_wait() {
                panic!("the fake engine exited before it listened: {status}");
            }
            assert!(Instant::now() < deadline, "the fake engine never listened");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait_until_ready(&self) {
        let deadline = Instant::now() + START_DEADLINE;
        while get(self.port, "/health").map(|(status, _)| status) != Some(200) {
            assert!(
                Instant::now() < deadline,
                "the fake engine is not ready in time"
            );
            std::thread::sleep(Duration::from_millis(3));
        }
    }
}

impl Drop for FakeEngine {
    fn drop(&mut self) {
        self.kill();
        if let Some(pid) = crate::grandchild(&self.dir) {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn fresh_directory() -> PathBuf {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("fake-engine-{}-{number}", std::process::id()))
}

/// A minimal GET, so that a synchronous test needs no HTTP client.
fn get(port: u16, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let request = format!("GET {path} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let status = answer.split(' ').nth(1)?.parse().ok()?;
    let body = answer.split_once("\r\n\r\n")?.1.to_owned();
    Some((status, body))
}
