//! What a daemon is started with.
//!
//! The pool's name holds this process's id, the port is free, files go into a
//! directory of its own, and the cache is the machine's.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::binary::{Build, orchestratord};

/// Where no engine is.
pub const NO_ENGINE: &str = "/nonexistent/llama-server";

/// Variables that would make a daemon something other than its test says.
const VARIABLES: [&str; 8] = [
    "ORCHD_CONFIG",
    "ORCHD_LISTEN",
    "ORCHD_TOKEN",
    "ORCHD_LLAMACPP_URL",
    "ORCHD_LLAMACPP_POOL",
    "ORCHD_LLAMACPP_REPLICA",
    "REQUIRE_REAL_LLAMA",
    "RUST_LOG",
];

/// What a daemon is started with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Goes into the pool's name: lower-case letters, digits and dashes.
    pub name: &'static str,
    pub build: Build,
    /// The pool's settings beyond the ones that all tests share.
    pub pool: Value,
    /// Further pools, and what else the configuration holds.
    pub more: Value,
    /// Environment variables beyond this process's own.
    pub variables: Vec<(&'static str, String)>,
    /// Where the daemon's standard error is kept; in its directory, which goes
    /// with it, if there is none.
    pub log: Option<PathBuf>,
}

impl Settings {
    /// A default build that may answer from real engines only.
    pub fn real(name: &'static str) -> Self {
        Self {
            name,
            build: Build::Default,
            pool: json!({}),
            more: json!({}),
            variables: vec![("REQUIRE_REAL_LLAMA", "1".to_owned())],
            log: None,
        }
    }

    /// One whose pool has no engine to be had, so that it fails at once.
    pub fn without_engine(name: &'static str) -> Self {
        Self {
            pool: json!({ "provision": { "mode": "system", "path": NO_ENGINE } }),
            ..Self::real(name)
        }
    }

    /// The name of its pool.
    pub fn pool_id(&self) -> String {
        format!("e2e-{}-{}", self.name, std::process::id())
    }

    fn config(&self, runtime: &Path) -> Value {
        // One thread: two compute threads starve each other as soon as
        // anything else runs on a machine with two cores.
        let mut pool = json!({ "model": "haiku", "profile": "deterministic", "threads": 1 });
        if let (Some(pool), Some(more)) = (pool.as_object_mut(), self.pool.as_object()) {
            pool.extend(more.clone());
        }
        let mut config = self.more.clone();
        config["listen"] = json!("127.0.0.1:0");
        config["runtime_dir"] = json!(runtime);
        config["pools"][self.pool_id()] = pool;
        config
    }

    /// The daemon's command line and environment, with `dir` as its directory.
    pub(crate) fn command(&self, dir: &Path) -> Command {
        let config = dir.join("orchestratord.json");
        let text = format!("{:#}", self.config(&dir.join("runtime")));
        std::fs::write(&config, text).expect("a temporary directory can be written to");
        let mut command = Command::new(orchestratord(self.build));
        command.arg("--config").arg(config).current_dir(dir);
        for variable in VARIABLES {
            command.env_remove(variable);
        }
        command
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }
}
