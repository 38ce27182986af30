//! A scriptable stand-in for `llama-server`: a real process that listens on a
//! real port, speaks the real engine's HTTP shapes, and fails on demand.
//!
//! It is for tests only. Nothing it says may ever reach a client who could
//! take it for a model's answer, so only `[dev-dependencies]` and other test
//! harnesses name it.
//!
//! - [`script`]: what the engine shall do, as a value
//! - [`install`]: put an engine with its script into a directory
//! - [`FakeEngine`]: start one, wait until it is ready, kill it on drop
//! - [`order`]: have one completion of a running engine go wrong
//!
//! ```no_run
//! use test_harness_fake_engine::{FakeEngine, Script};
//! let engine = FakeEngine::start(&Script { token_ms: 5, ..Script::default() });
//! println!("{}", engine.url());
//! ```

pub mod orders;
pub mod script;

mod running;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

pub use orders::order;
pub use running::FakeEngine;
pub use script::{Fault, LoadFailure, Script};
pub use test_harness_support::gguf;

/// The script's file name, beside the engine's binary.
pub const SCRIPT_FILE: &str = "fake-engine.json";
/// Holds how often the engine beside it was started (`--version` not counted).
pub const STARTS_FILE: &str = "fake-engine.starts";
/// Holds the port the engine listens on, whole once it does.
pub const PORT_FILE: &str = "fake-engine.port";
/// Holds the pid of the grandchild, where the script asks for one.
pub const GRANDCHILD_FILE: &str = "fake-engine.grandchild";

/// The fake engine's binary, built on demand and once per process. Cargo holds
/// no lock while tests run, so the nested build cannot wait for its parent; it
/// may wait for another build on the same machine, and is left out where the
/// binary is there and newer than its sources.
pub fn binary() -> PathBuf {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY
        .get_or_init(|| up_to_date_binary().unwrap_or_else(build))
        .clone()
}

fn build() -> PathBuf {
    escargot::CargoBuild::new()
        // By name, from the running test's own directory: a path from the time
        // of compilation is wrong once the checkout has been moved.
        .package(env!("CARGO_PKG_NAME"))
        .bin("fake-engine")
        .current_release()
        .run()
        .expect("the fake engine must build, or no test that needs it means anything")
        .path()
        .to_path_buf()
}

/// Test programs lie in `deps`, programs one directory above.
fn up_to_date_binary() -> Option<PathBuf> {
    let test_program = std::env::current_exe().ok()?;
    let binary = test_program.parent()?.parent()?.join("fake-engine");
    let built = binary.metadata().ok()?.modified().ok()?;
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let changed = newest_change(&package.join("src"))?.max(
        package
            .join("Cargo.toml")
            .metadata()
            .ok()?
            .modified()
            .ok()?,
    );
    (built > changed).then_some(binary)
}

fn newest_change(dir: &Path) -> Option<SystemTime> {
    let mut newest = dir.metadata().ok()?.modified().ok()?;
    for entry in std::fs::read_dir(dir).ok()? {
        let path = entry.ok()?.path();
        let changed = if path.is_dir() {
            newest_change(&path)?
        } else {
            path.metadata().ok()?.modified().ok()?
        };
        newest = newest.max(changed);
    }
    Some(newest)
}

/// Puts an engine into `dir` as `llama-server`, with its script beside it, and
/// returns the engine's path. Installing again replaces the script, whole, so
/// that an engine that just starts reads the old or the new one; a running
/// engine read its own at start.
pub fn install(dir: &Path, script: &Script) -> PathBuf {
    std::fs::create_dir_all(dir).expect("the test's directory can be made");
    let engine = dir.join("llama-server");
    if !engine.exists() {
        link_or_copy(&binary(), &engine);
    }
    let text = serde_json::to_string_pretty(script).expect("a script is plain data");
    let staged = dir.join(format!("{SCRIPT_FILE}.new"));
    std::fs::write(&staged, text)
        .and_then(|()| std::fs::rename(&staged, dir.join(SCRIPT_FILE)))
        .expect("the test's directory can be written to");
    engine
}

/// How often the engine in `dir` was started.
pub fn starts(dir: &Path) -> u64 {
    number_in(&dir.join(STARTS_FILE)).unwrap_or(0)
}

/// The pid of the grandchild that the engine in `dir` started, once it has.
pub fn grandchild(dir: &Path) -> Option<u32> {
    number_in(&dir.join(GRANDCHILD_FILE)).and_then(|pid| pid.try_into().ok())
}

fn number_in(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// A hard link where the file system allows it. Otherwise `cp` makes the copy:
/// were this process to write the file itself, a fork in another test thread
/// could inherit the open descriptor and the start would fail as "text file
/// busy".
fn link_or_copy(from: &Path, to: &Path) {
    if std::fs::hard_link(from, to).is_ok() {
        return;
    }
    let status = Command::new("cp")
        .arg(from)
        .arg(to)
        .status()
        .expect("cp can be started");
    assert!(
        status.success(),
        "cp {} {} failed",
        from.display(),
        to.display()
    );
}
