//! Engines and files of pools that nobody runs any more.
//!
//! The start of a pool deals with what a crash left of that pool. A pool that is in no configuration
//! any more is never started: what is left of it is found here.

use std::path::Path;
use std::time::Duration;

use llama_orch_types::PoolId;
use provision_kit::blocking::blocking;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::fs::remove_file_if_there;
use provision_kit::leftovers::entries;
use provision_kit::lock::FileLock;
use provision_kit::process::ProcessIdentity;
use serde::Deserialize;

use super::{handoff, pid_file};
use crate::error::chain;

/// What an engine without an owner gets to end by itself. Nobody waits for its tasks; somebody may
/// wait for the pool's lock.
const GRACE: Duration = Duration::from_millis(200);

/// Ends engines whose owner is gone, and removes PID files and handoffs that speak of nobody. What
/// cannot be dealt with is told to the log: the start of a pool will say more.
pub(crate) async fn clear(cache: &CacheDirs, runtime: &RuntimeDirs) {
    let run = cache.run();
    let files = {
        let run = run.clone();
        blocking(move || entries(&run)).await
    };
    for (name, path) in files {
        let Some(pool) = name.strip_suffix(".pid") else {
            continue;
        };
        // `default+next` and `default+old` are engines of `default`, in the middle of a reload.
        let pool = pool.split_once('+').map_or(pool, |(pool, _)| pool);
        let Ok(pool) = pool.parse::<PoolId>() else {
            continue;
        };
        // Whoever runs the pool holds its lock.
        let Ok(Some(_held)) = FileLock::try_acquire(&run.join(format!("{pool}.lock"))) else {
            continue;
        };
        if let Err(error) = pid_file::clear_leftovers(&pool, &path, GRACE).await {
            tracing::warn!(%pool, error = %chain(&error), "what a crash left of a pool stays");
        }
    }
    let engines = runtime.engines();
    blocking(move || clear_handoffs(&engines, &run)).await;
}

/// The part of a handoff that says which process it is about.
#[derive(Deserialize)]
struct About {
    pid: Option<u32>,
}

fn clear_handoffs(directory: &Path, run: &Path) {
    for (name, path) in entries(directory) {
        let Some(pool) = handoff::pool_of(&name) else {
            continue;
        };
        // Whoever runs the pool may be writing a new one, and may count processes by other ids.
        let Ok(Some(_held)) = FileLock::try_acquire(&run.join(format!("{pool}.lock"))) else {
            continue;
        };
        let about = std::fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice::<About>(&text).ok());
        let Some(About { pid: Some(pid) }) = about else {
            continue;
        };
        if matches!(ProcessIdentity::of(pid), Ok(None))
            && let Err(error) = remove_file_if_there(&path)
        {
            tracing::warn!(error = %chain(&error), "a crashed engine's handoff stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handoff_stays_while_somebody_runs_its_pool() {
        let directory = tempfile::tempdir().unwrap();
        let run = directory.path().join("run");
        let path = |pool: &str| directory.path().join(format!("llamacpp-{pool}.json"));
        for pool in ["dead", "live"] {
            // Above the kernel's largest id: nobody, as far as can be seen from here.
            std::fs::write(path(pool), r#"{"pid":4194305}"#).unwrap();
        }
        let _held = FileLock::try_acquire(&run.join("live.lock"))
            .unwrap()
            .unwrap();
        clear_handoffs(directory.path(), &run);
        assert!(!path("dead").exists() && path("live").exists());
    }
}
