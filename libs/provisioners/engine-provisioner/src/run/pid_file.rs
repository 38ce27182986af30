//! `run/<pool>.pid`: who runs a pool's engine, for the next start and for people.
//!
//! A file that a crash left is believed only if the process that it names is still that engine:
//! same id, same start time, same executable. Anything else is a file to be removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use provision_kit::fs::{FsError, remove_file_if_there, write_atomic};
use provision_kit::process::ProcessIdentity;
use serde::{Deserialize, Serialize};

use crate::error::EngineError;

/// How long a killed engine may take to vanish.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// How often a process that is no child of ours is looked at while it ends.
const POLL: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PidFile {
    #[serde(flatten)]
    pub engine: ProcessIdentity,
    pub port: u16,
    /// The process that started the engine and ends it.
    pub owner_pid: u32,
    pub owner: ProcessIdentity,
}

impl PidFile {
    pub(super) fn write(&self, path: &Path) -> Result<(), EngineError> {
        // A struct of numbers and paths serialises, unless a path is not UTF-8: then the file
        // says less than it should, and it is an error to be told.
        let text = serde_json::to_vec_pretty(self).map_err(|source| EngineError::Manifest {
            path: path.to_owned(),
            source,
        })?;
        Ok(write_atomic(path, &text)?)
    }

    /// Reads a PID file. One that cannot be read as such names nobody.
    fn read(path: &Path) -> Result<Option<Self>, FsError> {
        match std::fs::read(path) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(FsError::at("read", path)(error)),
        }
    }
}

/// Deals with what an earlier run left. To be called under the pool's lock. An engine without an
/// owner is ended; one whose owner lives is an error.
pub(super) async fn clear_leftovers(
    pool: &PoolId,
    path: &Path,
    grace: Duration,
) -> Result<(), EngineError> {
    if let Some(left) = PidFile::read(path)?
        && left.engine.matches()
    {
        // Our own earlier engine of this pool is not running if the lock was free.
        if left.owner.matches() && left.owner.pid != std::process::id() {
            return Err(EngineError::PoolBusy {
                pool: pool.clone(),
                holder: left.owner.pid.to_string(),
            });
        }
        let pid = left.engine.pid;
        tracing::warn!(%pool, pid, "an engine that a crash left behind is ended");
        end_stranger(&left.engine, grace).await?;
    }
    Ok(remove_file_if_there(path)?)
}

/// Ends the process group of an engine that is not our child: TERM, a bounded wait, KILL.
async fn end_stranger(engine: &ProcessIdentity, grace: Duration) -> Result<(), EngineError> {
    for (signal, patience) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, KILL_WAIT)] {
        signal_group(engine, signal)?;
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if !engine.matches() {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
    Err(EngineError::Identity {
        pid: engine.pid,
        source: std::io::Error::new(std::io::ErrorKind::TimedOut, "it outlives KILL"),
    })
}

fn signal_group(engine: &ProcessIdentity, signal: Signal) -> Result<(), EngineError> {
    // Every engine leads its own group.
    match killpg(Pid::from_raw(engine.pid.cast_signed()), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(EngineError::Identity {
            pid: engine.pid,
            source: errno.into(),
        }),
    }
}

/// Removes a running engine's files when it is gone.
#[derive(Debug, Default)]
pub(super) struct RunFiles {
    paths: Vec<PathBuf>,
}

impl RunFiles {
    pub(super) fn add(&mut self, path: PathBuf) {
        self.paths.push(path);
    }
}

impl Drop for RunFiles {
    fn drop(&mut self) {
        for path in &self.paths {
            if let Err(error) = remove_file_if_there(path) {
                tracing::warn!(error = %crate::error::chain(&error), "a file of an ended engine stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_the_engine_at_its_top() {
        let own = ProcessIdentity::own().unwrap();
        let file = PidFile {
            engine: ProcessIdentity {
                pid: 4242,
                ..own.clone()
            },
            port: 40123,
            owner_pid: own.pid,
            owner: own,
        };
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("default.pid");
        file.write(&path).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["pid"], 4242);
        assert_eq!(value["port"], 40123);
        assert_eq!(PidFile::read(&path).unwrap(), Some(file));
        std::fs::write(&path, "4242").unwrap();
        assert_eq!(PidFile::read(&path).unwrap(), None);
    }
}
