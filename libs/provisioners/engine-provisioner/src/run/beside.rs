//! Two engines of one pool for a while: one that serves, and one that is to take over.
//!
//! ```text
//!             serves                 is started beside        has taken over       retires
//! PID file    <pool>.pid             <pool>+next.pid          <pool>.pid           <pool>+old.pid
//! log         llamacpp-<pool>.log    llamacpp-<pool>+next.log llamacpp-<pool>.log  ….log.1
//! handoff     llamacpp[-<pool>].json -                        that one             -
//! ```
//!
//! No pool's name holds a `+`, so these are never another pool's. Both hold the pool's lock. Whatever moment the daemon dies at, each engine that runs is named by
//! one of the three PID files, and the next start looks at all of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use llama_orch_types::PoolId;
use provision_kit::fs::{FsError, remove_file_if_there};
use provision_kit::lock::FileLock;
use provision_kit::progress::{Step, StepKind, Unit};

use super::spec::LaunchSpec;
use super::{RunningEngine, argv, handoff, handoff_path, pid_file};
use crate::error::{EngineError, brief, chain};
use crate::provide::{EngineInstallation, EngineProvisioner};

/// A pool's lock, shared by its engines. Free when the last of them is gone.
#[derive(Debug, Clone)]
pub struct PoolLock(#[allow(dead_code, reason = "held, not looked at")] Arc<FileLock>);

impl PoolLock {
    pub(super) fn new(lock: FileLock) -> Self {
        Self(Arc::new(lock))
    }
}

/// Under which names an engine's files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seat {
    Usual,
    /// It may take over later.
    Next,
    /// It was taken over from.
    Old,
}

impl Seat {
    /// Begins with a character that no pool's id has, so that no two pools' files meet.
    fn suffix(self) -> &'static str {
        match self {
            Self::Usual => "",
            Self::Next => "+next",
            Self::Old => "+old",
        }
    }
}

impl RunningEngine {
    /// The lock of its pool, under which another engine of the pool can be started.
    pub fn pool_lock(&self) -> PoolLock {
        self.lock.clone()
    }
}

impl EngineProvisioner {
    /// Starts an engine beside one of the same pool that runs. It has files of its own until it
    /// takes over ([`EngineProvisioner::take_over`]). Dropping the future ends what was started.
    pub async fn start_beside(
        &self,
        installation: &EngineInstallation,
        spec: LaunchSpec,
        lock: PoolLock,
    ) -> Result<RunningEngine, EngineError> {
        let what = format!("starting another llama-server for pool {}", spec.pool_id);
        self.start_sharing(installation, &spec, Seat::Next, lock, what)
            .await
    }

    /// Starts the pool's engine while one that was taken over from still retires.
    pub async fn start_after(
        &self,
        installation: &EngineInstallation,
        spec: LaunchSpec,
        lock: PoolLock,
    ) -> Result<RunningEngine, EngineError> {
        let what = format!("starting llama-server for pool {}", spec.pool_id);
        self.start_sharing(installation, &spec, Seat::Usual, lock, what)
            .await
    }

    async fn start_sharing(
        &self,
        installation: &EngineInstallation,
        spec: &LaunchSpec,
        seat: Seat,
        lock: PoolLock,
        what: String,
    ) -> Result<RunningEngine, EngineError> {
        argv::render_argv(spec, 0).map_err(EngineError::Flags)?;
        let step = Step::start(&self.reporter, StepKind::PoolWarmup, what, Unit::None, None);
        match self.start_at(installation, spec, seat, lock, &step).await {
            Ok(engine) => {
                step.finish();
                Ok(engine)
            }
            Err(error) => {
                step.fail(brief(&error));
                Err(error)
            }
        }
    }

    /// Gives an engine that was started beside `old` the pool's usual files. What fails is told in
    /// the log and harms nothing that runs: the files are for people and for the start after a
    /// crash, which looks at all three names.
    pub fn take_over(&self, new: &mut RunningEngine, old: &mut RunningEngine) {
        let pool = new.context.pool_id.clone();
        let (usual_pid, usual_log) = self.run_paths(&pool, Seat::Usual);
        let (next_pid, _) = self.run_paths(&pool, Seat::Next);
        let (old_pid, _) = self.run_paths(&pool, Seat::Old);
        let told = |result: Result<(), FsError>| {
            if let Err(error) = result {
                tracing::warn!(%pool, error = %chain(&error), "a file of the pool keeps its old name");
            }
        };
        // In this order no engine is ever without a file that names it.
        told(rename(&usual_pid, &old_pid));
        told(rename(&next_pid, &usual_pid));
        let handoff = handoff_path(&self.runtime, &pool);
        old.files.replace([old_pid]);
        new.files.replace([usual_pid, next_pid, handoff.clone()]);
        told(old.process.log.retire());
        told(new.process.log.rename(&usual_log));
        let written = handoff::write_handoff(&handoff, &new.context, new.profile, &usual_log);
        if let Err(error) = written {
            tracing::warn!(%pool, error = %chain(&error), "the handoff names the engine that retires");
        }
    }

    /// Deals with what an earlier run left. To be called under the pool's lock.
    pub(super) async fn clear(&self, spec: &LaunchSpec) -> Result<(), EngineError> {
        for seat in [Seat::Next, Seat::Old, Seat::Usual] {
            let (pid_path, log_path) = self.run_paths(&spec.pool_id, seat);
            pid_file::clear_leftovers(&spec.pool_id, &pid_path, spec.stop_grace).await?;
            if seat == Seat::Next {
                remove_file_if_there(&log_path)?;
            }
        }
        // A handoff speaks of an engine that runs; the crashed one's does not.
        Ok(remove_file_if_there(&handoff_path(
            &self.runtime,
            &spec.pool_id,
        ))?)
    }

    /// Where PID file and log of an engine in this seat are.
    pub(super) fn run_paths(&self, pool: &PoolId, seat: Seat) -> (PathBuf, PathBuf) {
        let suffix = seat.suffix();
        (
            self.cache.run().join(format!("{pool}{suffix}.pid")),
            self.cache
                .run()
                .join(format!("llamacpp-{pool}{suffix}.log")),
        )
    }
}

fn rename(from: &Path, to: &Path) -> Result<(), FsError> {
    std::fs::rename(from, to).map_err(FsError::at("rename", from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_pool_can_have_the_names_of_anothers_second_engine() {
        for seat in [Seat::Next, Seat::Old] {
            assert!(format!("a{}", seat.suffix()).parse::<PoolId>().is_err());
        }
    }
}
