//! Child processes that never outlive us and never leave children of their own behind.
//!
//! - Every child is started by one thread that lives as long as this process: the kernel's
//!   parent-death signal follows the *thread* that spawned, and threads of an async runtime end
//!   when they please.
//! - Every child leads its own process group, and ending it means ending the group. A child that
//!   moves its own children to other groups (ninja does) is ended with TERM first, so that it can
//!   end them itself: see [`DeathSignal`].
//! - Dropping a [`ChildGroup`] ends the group.
//! - When this process is killed, the kernel tells its direct children, and a watcher ends what
//!   those had started, whatever groups it is in: see [`leash`].

mod bury;
mod command;
mod identity;
mod leash;
mod output;

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::{OnceLock, mpsc};
use std::time::Duration;
use std::{io, thread};

use llama_orch_types::Hinted;
use nix::errno::Errno;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::sync::oneshot;

pub use bury::all_ended;
pub use command::{CommandSpec, DeathSignal};
pub use identity::ProcessIdentity;
pub use output::{Output, output};

/// How long a group may take to vanish once it was sent KILL. Only a process that is stuck in the
/// kernel takes longer than a moment.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// What a dropped group gets to end by itself before it is killed.
const DROP_GRACE: Duration = Duration::from_secs(2);

/// Why a child process could not be started, watched or ended.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("cannot start `{}`", program.display())]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot start the thread that starts child processes")]
    SpawnerThread(#[source] io::Error),
    #[error("the thread that starts child processes has ended")]
    SpawnerGone,
    #[error("cannot wait for process {pid}")]
    Wait {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot read what process {pid} says")]
    Read {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("cannot send {signal} to process group {pid}")]
    Signal {
        pid: u32,
        signal: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("process group {pid} is still there {} s after KILL", KILL_WAIT.as_secs())]
    Unkillable { pid: u32 },
    #[error("`{}` did not end within {} s", program.display(), limit.as_secs_f32())]
    TimedOut { program: PathBuf, limit: Duration },
}

impl ProcessError {
    /// The program is not there at all.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Spawn { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }

    /// Whether the same call may succeed a little later: what was short may be there again.
    pub fn retriable(&self) -> bool {
        match self {
            Self::Spawn { source, .. } | Self::SpawnerThread(source) => is_shortage(source),
            Self::TimedOut { .. } => true,
            _ => false,
        }
    }
}

/// Processes, memory or open files are used up.
fn is_shortage(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory
    ) || matches!(errno, Some(Errno::EMFILE | Errno::ENFILE))
}

impl Hinted for ProcessError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Spawn { program, source } => match source.kind() {
                io::ErrorKind::NotFound => Some(format!(
                    "install `{}` or give its full path",
                    program.display()
                )),
                io::ErrorKind::PermissionDenied => Some(format!(
                    "make `{}` executable, and see that its file system is not mounted noexec",
                    program.display()
                )),
                _ => None,
            },
            Self::Unkillable { pid } => Some(format!(
                "it hangs in the kernel; see `cat /proc/{pid}/stack` and the kernel's log"
            )),
            _ => None,
        }
    }
}

/// How a group ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub status: ExitStatus,
    /// It did not end in its grace and was sent KILL.
    pub killed: bool,
}

/// A running child and everything in its process group. Dropping it ends them.
#[derive(Debug)]
pub struct ChildGroup {
    /// Gone only while being dropped.
    child: Option<Child>,
    pid: u32,
    death_signal: DeathSignal,
    /// Set once the leader was reaped and its group killed: from then on the id may come to name
    /// somebody else's group and must not be signalled.
    ended: Option<ExitStatus>,
}

impl ChildGroup {
    /// The leader's process id, which is also the group's id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.as_mut().and_then(|child| child.stdout.take())
    }

    pub fn take_stderr(&mut self) -> Option<ChildStderr> {
        self.child.as_mut().and_then(|child| child.stderr.take())
    }

    /// Waits for the leader's end, however long that takes, and kills what it leaves behind in its
    /// group. May be cancelled and called again.
    pub async fn wait(&mut self) -> Result<ExitStatus, ProcessError> {
        if let Some(status) = self.ended {
            return Ok(status);
        }
        let Some(child) = self.child.as_mut() else {
            return Err(ProcessError::SpawnerGone);
        };
        let status = child.wait().await.map_err(|source| ProcessError::Wait {
            pid: self.pid,
            source,
        })?;
        self.settle(status);
        Ok(status)
    }

    /// Whether the leader has ended, without waiting.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>, ProcessError> {
        if self.ended.is_some() {
            return Ok(self.ended);
        }
        let Some(child) = self.child.as_mut() else {
            return Err(ProcessError::SpawnerGone);
        };
        let status = child.try_wait().map_err(|source| ProcessError::Wait {
            pid: self.pid,
            source,
        })?;
        if let Some(status) = status {
            self.settle(status);
        }
        Ok(status)
    }

    /// TERM to the group, up to `grace` to end, KILL to the group.
    pub async fn terminate(&mut self, grace: Duration) -> Result<Ended, ProcessError> {
        if let Some(status) = self.try_wait()? {
            return Ok(Ended {
                status,
                killed: false,
            });
        }
        signal_group(self.pid, Signal::SIGTERM)?;
        if let Ok(status) = tokio::time::timeout(grace, self.wait()).await {
            return Ok(Ended {
                status: status?,
                killed: false,
            });
        }
        signal_group(self.pid, Signal::SIGKILL)?;
        match tokio::time::timeout(KILL_WAIT, self.wait()).await {
            Ok(status) => Ok(Ended {
                status: status?,
                killed: true,
            }),
            Err(_) => Err(ProcessError::Unkillable { pid: self.pid }),
        }
    }

    /// The leader is reaped. Whatever it left in its group is killed now, once: the kernel hands
    /// process ids out in rising order, so the id cannot name a new group in this instant, but it
    /// may later.
    fn settle(&mut self, status: ExitStatus) {
        if let Err(error) = signal_group(self.pid, Signal::SIGKILL) {
            tracing::warn!(pid = self.pid, %error, "processes may be left behind");
        }
        self.ended = Some(status);
    }
}

impl Drop for ChildGroup {
    fn drop(&mut self) {
        let Some(child) = self.child.take() else {
            return;
        };
        if self.ended.is_some() {
            return;
        }
        let pid = self.pid;
        if self.death_signal == DeathSignal::Terminate {
            bury::begin(pid, child);
            return;
        }
        if let Err(error) = signal_group(pid, Signal::SIGKILL) {
            tracing::warn!(pid, %error, "a dropped process may be left behind");
        }
        // tokio reaps a dropped child in the background.
        drop(child);
    }
}

/// Signals a group; a group that is already gone is fine.
fn signal_group(pid: u32, signal: Signal) -> Result<(), ProcessError> {
    match killpg(Pid::from_raw(pid.cast_signed()), signal) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(ProcessError::Signal {
            pid,
            signal: signal.as_str(),
            source: errno.into(),
        }),
    }
}

/// Starts a child. Must be called within a tokio runtime; the child is reaped by that runtime.
pub async fn spawn(spec: CommandSpec) -> Result<ChildGroup, ProcessError> {
    let (reply, answer) = oneshot::channel();
    let request = SpawnRequest {
        spec,
        runtime: tokio::runtime::Handle::current(),
        reply,
    };
    spawner()?
        .send(request)
        .map_err(|_| ProcessError::SpawnerGone)?;
    answer.await.map_err(|_| ProcessError::SpawnerGone)?
}

struct SpawnRequest {
    spec: CommandSpec,
    runtime: tokio::runtime::Handle,
    reply: oneshot::Sender<Result<ChildGroup, ProcessError>>,
}

/// The way to the one thread that spawns. The thread ends with the process.
fn spawner() -> Result<mpsc::SyncSender<SpawnRequest>, ProcessError> {
    static SPAWNER: OnceLock<mpsc::SyncSender<SpawnRequest>> = OnceLock::new();
    if let Some(sender) = SPAWNER.get() {
        return Ok(sender.clone());
    }
    let (sender, requests) = mpsc::sync_channel::<SpawnRequest>(64);
    thread::Builder::new()
        .name("spawner".into())
        .spawn(move || {
            let mut leash = leash::Leash::default();
            for request in requests {
                leash.hold();
                let result = spawn_here(&request.spec, &request.runtime);
                // If nobody waits any more the group is dropped, and with it the child.
                let _ = request.reply.send(result);
            }
        })
        .map_err(ProcessError::SpawnerThread)?;
    // Of two first callers one wins; the other's thread ends with its sender.
    Ok(SPAWNER.get_or_init(|| sender).clone())
}

fn spawn_here(
    spec: &CommandSpec,
    runtime: &tokio::runtime::Handle,
) -> Result<ChildGroup, ProcessError> {
    let _context = runtime.enter();
    let mut command = tokio::process::Command::from(spec.command());
    let mut attempts = 0;
    let child = loop {
        match command.spawn() {
            // A file that was written a moment ago may still be open for writing in a child that
            // another thread of ours has forked and that has not reached its exec yet.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && attempts < 50 => {
                attempts += 1;
                thread::sleep(Duration::from_millis(4));
            }
            result => {
                break result.map_err(|source| ProcessError::Spawn {
                    program: spec.program.clone(),
                    source,
                })?;
            }
        }
    };
    // A child that was never waited for always has its id.
    let pid = child.id().ok_or(ProcessError::SpawnerGone)?;
    Ok(ChildGroup {
        child: Some(child),
        pid,
        death_signal: spec.death_signal,
        ended: None,
    })
}

#[cfg(test)]
mod tests;
