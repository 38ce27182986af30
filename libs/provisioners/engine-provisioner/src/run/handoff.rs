//! The handoff file: a ready engine's facts, for people and other processes.

use std::path::{Path, PathBuf};

use llama_orch_types::{PoolId, ProvisionedContext};
use provision_kit::dirs::RuntimeDirs;
use provision_kit::fs::write_unflushed;
use serde::Serialize;

use super::spec::Profile;
use crate::error::EngineError;

#[derive(Serialize)]
struct Handoff<'a> {
    #[serde(flatten)]
    context: &'a ProvisionedContext,
    profile: Profile,
    log: &'a Path,
    started_at: String,
}

/// `engines/llamacpp.json` for the pool named `default`, `engines/llamacpp-<pool>.json` for others.
pub fn handoff_path(runtime: &RuntimeDirs, pool: &PoolId) -> PathBuf {
    let name = if pool.is_default() {
        "llamacpp.json".to_owned()
    } else {
        format!("llamacpp-{pool}.json")
    };
    runtime.engines().join(name)
}

/// Whose handoff a file of this name is.
pub(super) fn pool_of(name: &str) -> Option<PoolId> {
    let pool = match name.strip_suffix(".json")?.strip_prefix("llamacpp")? {
        "" => "default",
        rest => rest.strip_prefix('-')?,
    };
    pool.parse().ok()
}

/// Writes the handoff, whole or not at all. It speaks of a process, which does not outlive the
/// machine either, so the disk is not waited for.
pub(super) fn write_handoff(
    path: &Path,
    context: &ProvisionedContext,
    profile: Profile,
    log: &Path,
) -> Result<(), EngineError> {
    let handoff = Handoff {
        context,
        profile,
        log,
        started_at: jiff::Timestamp::now().to_string(),
    };
    let text = serde_json::to_vec_pretty(&handoff).map_err(|source| EngineError::Manifest {
        path: path.to_owned(),
        source,
    })?;
    Ok(write_unflushed(path, &text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_pool_has_the_short_name() {
        let runtime = RuntimeDirs::new("/r");
        let path = |pool: &str| handoff_path(&runtime, &pool.parse().unwrap());
        assert_eq!(path("default"), Path::new("/r/engines/llamacpp.json"));
        assert_eq!(path("haiku"), Path::new("/r/engines/llamacpp-haiku.json"));
        for pool in ["default", "haiku"] {
            let name = path(pool).file_name().unwrap().to_owned();
            assert_eq!(pool_of(name.to_str().unwrap()), pool.parse().ok());
        }
        assert_eq!(pool_of("llamacppx.json"), None);
    }
}
