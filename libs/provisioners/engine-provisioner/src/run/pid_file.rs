//! `run/<pool>.pid`: who runs a pool's engine, for the next start and for people.
//!
//! A file that a crash left is believed only if the process that it names is still that engine:
//! same id, same start time, same executable. Anything else is a file to be removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use provision_kit::blocking::blocking;
use provision_kit::fs::{FsError, remove_file_if_there, write_unflushed};
use provision_kit::process::ProcessIdentity;
use serde::{Deserialize, Serialize};

use super::port;
use crate::error::EngineError;

/// How long a killed engine may take to vanish.
const KILL_WAIT: Duration = Duration::from_secs(5);
/// How often a process that is no child of ours is looked at while it ends.
const POLL: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PidFile {
    #[serde(flatten)]
    pub engine: ProcessIdentity,
    /// The process that listens on the port, where that is another one: a script that runs the
    /// engine as its child leads the group, and may end without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<ProcessIdentity>,
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
        Ok(write_unflushed(path, &text)?)
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
    if let Some(left) = PidFile::read(path)? {
        let mut live: Vec<ProcessIdentity> = std::iter::once(&left.engine)
            .chain(&left.listener)
            .filter(|process| process.matches())
            .cloned()
            .collect();
        if !live.is_empty() {
            // Our own earlier engine of this pool is not running if the lock was free.
            if left.owner.matches() && left.owner.pid != std::process::id() {
                return Err(EngineError::PoolBusy {
                    pool: pool.clone(),
                    holder: left.owner.pid.to_string(),
                });
            }
            let pid = live[0].pid;
            tracing::warn!(%pool, pid, "an engine that a crash left behind is ended");
            live.extend(rest_of_group(&left).await);
            end_strangers(&live, grace).await?;
        }
    }
    Ok(remove_file_if_there(path)?)
}

/// The other processes of the group that a left engine led. One of them lives, so the group's id
/// means the same group still.
async fn rest_of_group(left: &PidFile) -> Vec<ProcessIdentity> {
    let group = left.engine.pid;
    let known = [
        Some(left.engine.pid),
        left.listener.as_ref().map(|one| one.pid),
    ];
    let lives = left.engine.matches();
    let listener = left.listener.clone();
    blocking(move || {
        let of_group = |pid| port::group_of(pid) == Some(group);
        let same_group = lives || listener.is_some_and(|one| one.matches() && of_group(one.pid));
        if !same_group {
            return Vec::new();
        }
        port::members(group)
            .filter(|pid| !known.contains(&Some(*pid)))
            .filter_map(|pid| ProcessIdentity::of(pid).ok().flatten())
            .collect()
    })
    .await
}

/// Ends processes that are no children of ours: TERM, a bounded wait, KILL.
async fn end_strangers(processes: &[ProcessIdentity], grace: Duration) -> Result<(), EngineError> {
    for (signal, patience) in [(Signal::SIGTERM, grace), (Signal::SIGKILL, KILL_WAIT)] {
        // Each by its identity: once a leader is gone its group's id may come to mean another.
        for process in processes.iter().filter(|process| process.is_alive()) {
            send(process, signal)?;
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if !processes.iter().any(ProcessIdentity::is_alive) {
                return Ok(());
            }
            tokio::time::sleep(POLL).await;
        }
    }
    match processes.iter().find(|process| process.is_alive()) {
        None => Ok(()),
        Some(process) => Err(EngineError::Identity {
            pid: process.pid,
            source: std::io::Error::new(std::io::ErrorKind::TimedOut, "it outlives KILL"),
        }),
    }
}

fn send(process: &ProcessIdentity, signal: Signal) -> Result<(), EngineError> {
    match kill(Pid::from_raw(process.pid.cast_signed()), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(EngineError::Identity {
            pid: process.pid,
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

    /// From now on these, and no other.
    pub(super) fn replace(&mut self, paths: impl IntoIterator<Item = PathBuf>) {
        self.paths = paths.into_iter().collect();
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
            listener: None,
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
