//! The engine without a model, and a daemon before it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use test_harness_support::gguf::tiny_gguf;

use crate::points::Point;
use crate::sides::Daemon;

/// A directory with `bench-engine` under the name that a system's engine has,
/// and a model that is none.
#[derive(Debug)]
pub struct Scripted {
    dir: PathBuf,
    program: PathBuf,
    model: PathBuf,
}

impl Scripted {
    /// `built` is the executable of `bench-engine`, where the caller knows it.
    pub fn install(dir: &Path, built: Option<&Path>) -> io::Result<Self> {
        let built = built.map_or_else(executable, |built| Ok(built.to_owned()))?;
        let dir = dir.join("engine");
        fs::create_dir_all(&dir)?;
        let program = dir.join("llama-server");
        fs::copy(built, &program)?;
        let model = dir.join("tiny.gguf");
        fs::write(&model, tiny_gguf())?;
        Ok(Self {
            dir,
            program,
            model,
        })
    }

    /// What a daemon serves it with.
    pub fn pool(&self, slots: u32) -> Value {
        json!({
            "model": self.model, "slots": slots, "ctx": 1_048_576, "queue_capacity": 20_000,
            "provision": { "mode": "system", "path": self.program },
        })
    }

    /// What it answers from now on.
    pub fn set(&self, point: Point) -> io::Result<()> {
        self.answer(
            &json!({ "tokens": point.tokens, "tokens_per_second": point.tokens_per_second }),
        )
    }

    /// From now on every token of an answer takes so long, the first one too, and an
    /// answer has as many as are asked for.
    pub fn set_steady(&self, token_ms: u32) -> io::Result<()> {
        self.answer(&json!({
            "tokens": u32::MAX, "tokens_per_second": 1000 / token_ms, "first_token_ms": token_ms,
        }))
    }

    fn answer(&self, point: &Value) -> io::Result<()> {
        let staged = self.dir.join("point.tmp");
        fs::write(&staged, point.to_string())?;
        fs::rename(staged, self.dir.join("bench-engine.json"))
    }

    pub async fn daemon(&self, dir: &Path, slots: u32) -> io::Result<Daemon> {
        Daemon::start(dir, &self.pool(slots)).await
    }
}

/// The one beside this program, or a fresh build.
fn executable() -> io::Result<PathBuf> {
    let beside = std::env::current_exe()?.with_file_name("bench-engine");
    if beside.exists() {
        return Ok(beside);
    }
    let build = escargot::CargoBuild::new()
        .package(env!("CARGO_PKG_NAME"))
        .bin("bench-engine")
        .current_release();
    let run = build.run().map_err(io::Error::other)?;
    Ok(run.path().to_owned())
}
