//! A `llama-server` that was started by hand, as people have one already.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use reqwest::StatusCode;
use tempfile::TempDir;
use test_harness_e2e_haiku::client::Api;
use test_harness_e2e_haiku::engine::Engine;
use test_harness_e2e_haiku::wait_for;

/// It loads a small model that is in the page cache.
const LOAD_LIMIT: Duration = Duration::from_mins(1);

/// A running engine without a daemon. Dropping it ends it.
#[derive(Debug)]
pub struct Bare {
    pub engine: Engine,
    child: Child,
    dir: TempDir,
}

impl Bare {
    /// Starts it on a free port, and waits until it has loaded the model.
    pub async fn start(binary: &Path, model: &Path, slots: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let log = File::create(dir.path().join("log")).expect("the log can be written");
        let port = free_port();
        let child = Command::new(binary)
            .args(["--host", "127.0.0.1", "-t", "1", "--slots", "--metrics"])
            .args(["--port", &port.to_string(), "-np", &slots.to_string()])
            .args(["-c", &(4096 * slots).to_string()])
            .arg("--model")
            .arg(model)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", binary.display()));
        let engine = Engine {
            api: Api::new(format!("http://127.0.0.1:{port}")),
            pid: child.id(),
        };
        let mut bare = Self { engine, child, dir };
        wait_for("the bare engine's model", LOAD_LIMIT, async || {
            bare.assert_alive();
            let health = bare.engine.api.try_get("/health").await;
            matches!(health, Some((StatusCode::OK, _))).then_some(())
        })
        .await;
        // Somebody else may have been given the port meanwhile.
        assert!(bare.engine.owns_its_port(), "{port} is another's");
        bare
    }

    fn assert_alive(&mut self) {
        let ended = self.child.try_wait().expect("a child can be waited for");
        if let Some(status) = ended {
            let log = std::fs::read_to_string(self.dir.path().join("log"));
            panic!(
                "the bare engine ended: {status}\n{}",
                log.unwrap_or_default()
            );
        }
    }

    /// Ends it at once, as a machine that fails does.
    pub fn kill(&mut self) {
        // Fails only if it is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Free until somebody else takes it.
fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let address = listener.local_addr().expect("a listener has an address");
    address.port()
}
