//! What the tests of this crate share.
#![allow(dead_code, reason = "each test binary uses its own part")]

pub(crate) mod fake_source;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use llama_orch_types::{Digest, ModelMetadata, PoolId, ProvisioningMode};
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::{ProgressEvent, Reporter};
use provisioners_engine_provisioner::{
    Accelerator, EngineInstallation, EngineProvisioner, LaunchSpec,
};

/// Longest that anything here may take.
pub(crate) const LONG: Duration = Duration::from_mins(1);

/// Keeps what was reported.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Vec<ProgressEvent>>);

impl Reporter for Recorder {
    fn report(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    pub(crate) fn notes(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let text = |event: &ProgressEvent| match event {
            ProgressEvent::Note { text, .. } => Some(text.clone()),
            _ => None,
        };
        events.iter().filter_map(text).collect()
    }

    pub(crate) fn saw(&self, wanted: impl Fn(&ProgressEvent) -> bool) -> bool {
        self.0.lock().unwrap().iter().any(wanted)
    }
}

/// A provisioner with directories of its own.
pub(crate) struct Machine {
    directory: tempfile::TempDir,
    pub(crate) cache: CacheDirs,
    pub(crate) runtime: RuntimeDirs,
    pub(crate) recorder: Arc<Recorder>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            cache: CacheDirs::new(directory.path().join("cache")),
            runtime: RuntimeDirs::new(directory.path().join("runtime")),
            recorder: Arc::default(),
            directory,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn provisioner(&self) -> EngineProvisioner {
        let reporter: Arc<dyn Reporter> = self.recorder.clone();
        EngineProvisioner::new(self.cache.clone(), self.runtime.clone(), reporter)
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.cache.run().join("llamacpp-default.log")
    }

    pub(crate) fn pid_file(&self) -> PathBuf {
        self.cache.run().join("default.pid")
    }

    pub(crate) fn handoff(&self) -> PathBuf {
        self.runtime.engines().join("llamacpp.json")
    }

    /// The provenance records.
    pub(crate) fn provenance(&self) -> Vec<serde_json::Value> {
        let path = self.runtime.provenance().join("engines.jsonl");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// A model file that no engine really reads.
    pub(crate) fn model(&self) -> ModelMetadata {
        let path = self.path().join("model.gguf");
        std::fs::write(&path, "GGUF").unwrap();
        ModelMetadata {
            id: "test".into(),
            path,
            digest: Digest::from_bytes([1; 32]),
            size_bytes: 4,
            architecture: None,
            quantization: None,
            parameter_count: None,
            ctx_max: Some(2048),
            chat_template: None,
            shape: None,
        }
    }

    pub(crate) fn spec(&self) -> LaunchSpec {
        LaunchSpec {
            load_timeout: Duration::from_secs(30),
            ..LaunchSpec::new(PoolId::default_pool(), self.model())
        }
    }
}

pub(crate) fn installation(binary: &Path) -> EngineInstallation {
    EngineInstallation {
        binary: binary.to_owned(),
        version: "b11434".into(),
        digest: Digest::from_bytes([2; 32]),
        mode: ProvisioningMode::System,
        accelerator: Accelerator::Cpu,
    }
}

/// An address that refuses whoever comes, and that nobody else is given while the socket is kept.
pub(crate) fn refusing() -> (tokio::net::TcpSocket, std::net::SocketAddr) {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Waits until something holds.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether any process has this text in its command line.
pub(crate) fn somebody_runs(text: &str) -> bool {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .any(|line| String::from_utf8_lossy(&line).contains(text))
}
