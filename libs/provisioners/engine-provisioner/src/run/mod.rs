//! Running an engine: start, readiness, end.
//!
//! ```text
//! lock the pool ► end what a crash left ► free port ► spawn ► PID file ► /health 200 ► /props
//!                                            ▲          │                      │
//!                                            └──────────┘ port taken: again    ▼
//!                                                          context, handoff, provenance
//! ```
//!
//! A pool has one engine, but for the time in which another takes over: see [`beside`].
//!
//! A [`RunningEngine`] owns the process group, the log pump, the pool's lock and the files. When it
//! is dropped, or the start is given up, the group is killed and the files go.

pub(crate) mod abandoned;
pub(crate) mod argv;
mod beside;
pub(crate) mod environment;
mod handoff;
mod load_watch;
mod log;
mod pace;
mod pid_file;
mod port;
mod ready;
pub(crate) mod spec;
mod usage;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use llama_orch_types::{EngineKind, ProvisionedContext};
use nix::sys::signal::Signal;
use provision_kit::lock::{FileLock, LockError};
use provision_kit::process::{self, ChildGroup, CommandSpec, ProcessError, ProcessIdentity};
use provision_kit::progress::{Step, StepKind, Unit};
use tokio::task::JoinHandle;

use crate::error::{EngineError, brief, chain};
use crate::provide::{EngineInstallation, EngineProvisioner, record_start};
use crate::version;
use beside::Seat;
use environment::scrub;
use log::LogPump;
use pid_file::{PidFile, RunFiles};
use port::Listener;
use ready::{Readiness, Waited};
use spec::{LaunchSpec, Profile};

pub use beside::PoolLock;
pub use handoff::handoff_path;
pub use log::LogLines;

/// How often another port is tried when somebody was quicker.
const PORT_ATTEMPTS: u32 = 5;

/// How long a pool's lock is waited for. A lock that was just let go may be held a moment longer by
/// a child that is between fork and exec, and so still has the lock's file open.
const POOL_WAIT: Duration = Duration::from_secs(1);

/// How the kernel's refusal of a port shows in an engine's log.
const BIND_FAILURES: [&str; 2] = ["couldn't bind", "address already in use"];

/// An engine that is up. Dropping it kills it.
#[derive(Debug)]
pub struct RunningEngine {
    // Dropped in this order: first the process, then what says that it runs, then the lock.
    process: EngineProcess,
    files: RunFiles,
    lock: PoolLock,
    context: ProvisionedContext,
    profile: Profile,
    stop_grace: Duration,
    /// Writes the start's record: nobody who waits for the engine waits for the disk. It ends by
    /// itself, and is waited for when the engine is stopped.
    record: JoinHandle<()>,
}

/// Sees what an engine uses. Once that is gone it sees nothing, or, if the number was given out
/// again, another process: it is of use only as long as the engine is known to run.
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    group: u32,
}

impl Meter {
    /// The memory, in bytes, that the engine's processes hold now, files that they have mapped
    /// included; `None` if that cannot be learnt. Reads all of `/proc`, and so blocks for a moment.
    pub fn resident_bytes(self) -> Option<u64> {
        port::members(self.group)
            .filter_map(port::resident_bytes)
            .reduce(|sum, one| sum + one)
    }

    /// The engine's processes. Blocks as long.
    pub fn pids(self) -> Vec<u32> {
        port::members(self.group).collect()
    }
}

/// How an engine ended by itself.
#[derive(Debug, Clone)]
pub struct EngineExit {
    /// `None` if it could not be learnt.
    pub status: Option<ExitStatus>,
    pub log_tail: Vec<String>,
}

/// How an engine was ended.
#[derive(Debug, Clone)]
pub struct StopReport {
    /// `None` if it could not be learnt.
    pub status: Option<ExitStatus>,
    /// It did not end in its grace and was killed.
    pub killed: bool,
    /// It had ended before it was asked to, or somebody else killed it.
    pub by_itself: bool,
    pub took: Duration,
}

impl RunningEngine {
    pub fn context(&self) -> &ProvisionedContext {
        &self.context
    }

    /// The engine's last lines, for others to look at while it runs and afterwards.
    pub fn log_lines(&self) -> LogLines {
        self.process.log.lines()
    }

    /// A way to see what the engine uses, for others while it runs.
    pub fn meter(&self) -> Meter {
        Meter {
            group: self.process.group.pid(),
        }
    }

    /// The memory, in bytes, that the engine's processes hold now, files that they have mapped
    /// included; `None` if that cannot be learnt. Reads all of `/proc`, and so blocks for a moment.
    pub fn resident_bytes(&self) -> Option<u64> {
        self.meter().resident_bytes()
    }

    /// The last lines of the engine's log, at most 50.
    pub fn log_tail(&self) -> Vec<String> {
        self.process.log.tail()
    }

    /// Waits until the engine ends by itself, however long that takes. May be cancelled and called
    /// again.
    pub async fn wait_exit(&mut self) -> EngineExit {
        let status = match self.process.group.wait().await {
            Ok(status) => Some(status),
            Err(error) => {
                tracing::error!(error = %chain(&error), "the engine's end cannot be watched");
                None
            }
        };
        self.process.log.drain().await;
        EngineExit {
            status,
            log_tail: self.log_tail(),
        }
    }

    /// Ends the engine: TERM to its group, the grace of its launch, KILL. The PID file and the
    /// handoff go with it.
    pub async fn stop(mut self) -> StopReport {
        let start = Instant::now();
        let ended_before = matches!(self.process.group.try_wait(), Ok(Some(_)));
        let ended = self.process.group.terminate(self.stop_grace).await;
        self.process.log.drain().await;
        // Long written, but for an engine that is stopped as it becomes ready.
        if let Err(error) = (&mut self.record).await {
            tracing::error!(%error, "the record of a start broke off");
        }
        let pool = &self.context.pool_id;
        let report = match ended {
            Ok(ended) => StopReport {
                status: Some(ended.status),
                killed: ended.killed,
                // One that is dying may take a TERM that is too late to matter.
                by_itself: ended_before
                    || (!ended.killed && ended.status.signal() == Some(Signal::SIGKILL as i32)),
                took: start.elapsed(),
            },
            Err(error) => {
                tracing::error!(%pool, error = %chain(&error), "the engine may be left behind");
                StopReport {
                    status: None,
                    killed: true,
                    by_itself: false,
                    took: start.elapsed(),
                }
            }
        };
        tracing::info!(%pool, killed = report.killed, took = ?report.took, "engine stopped");
        report
    }
}

#[derive(Debug)]
struct EngineProcess {
    group: ChildGroup,
    log: LogPump,
}

/// One try at a port.
enum Attempt {
    Ready(Box<(EngineProcess, RunFiles, ProvisionedContext)>),
    PortTaken,
}

impl EngineProvisioner {
    /// Starts an engine and waits until it is ready. Dropping the future ends what was started.
    pub async fn start(
        &self,
        installation: &EngineInstallation,
        spec: LaunchSpec,
    ) -> Result<RunningEngine, EngineError> {
        let what = format!("starting llama-server for pool {}", spec.pool_id);
        let step = Step::start(&self.reporter, StepKind::PoolWarmup, what, Unit::None, None);
        match self.start_inner(installation, &spec, &step).await {
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

    async fn start_inner(
        &self,
        installation: &EngineInstallation,
        spec: &LaunchSpec,
        step: &Step,
    ) -> Result<RunningEngine, EngineError> {
        // Flags that do not fit are told before anything is touched.
        argv::render_argv(spec, 0).map_err(EngineError::Flags)?;
        let lock = self.lock_pool(spec).await?;
        self.clear(spec).await?;
        self.start_at(installation, spec, Seat::Usual, PoolLock::new(lock), step)
            .await
    }

    /// Starts under a lock that is held already, with the files of this seat.
    async fn start_at(
        &self,
        installation: &EngineInstallation,
        spec: &LaunchSpec,
        seat: Seat,
        lock: PoolLock,
        step: &Step,
    ) -> Result<RunningEngine, EngineError> {
        for _ in 0..PORT_ATTEMPTS {
            let attempt = self.attempt(installation, spec, seat, step).await?;
            if let Attempt::Ready(ready) = attempt {
                let (process, files, context) = *ready;
                let record = record_start(&self.runtime, &context);
                return Ok(RunningEngine {
                    process,
                    files,
                    lock,
                    context,
                    profile: spec.profile,
                    stop_grace: spec.stop_grace,
                    record,
                });
            }
            step.note("somebody took the engine's port: trying another");
        }
        Err(EngineError::PortTaken {
            pool: spec.pool_id.clone(),
            attempts: PORT_ATTEMPTS,
        })
    }

    /// Takes the pool for ourselves, or says who has it.
    async fn lock_pool(&self, spec: &LaunchSpec) -> Result<FileLock, EngineError> {
        let path = self.cache.run().join(format!("{}.lock", spec.pool_id));
        match FileLock::acquire(&path, POOL_WAIT, |_| {}).await {
            Err(LockError::TimedOut { holder, .. }) => Err(EngineError::PoolBusy {
                pool: spec.pool_id.clone(),
                holder: holder
                    .pid
                    .map_or_else(|| "that cannot be named".to_owned(), |pid| pid.to_string()),
            }),
            result => Ok(result?),
        }
    }

    async fn attempt(
        &self,
        installation: &EngineInstallation,
        spec: &LaunchSpec,
        seat: Seat,
        step: &Step,
    ) -> Result<Attempt, EngineError> {
        let port = port::free_port().map_err(EngineError::Port)?;
        let flags = argv::render_argv(spec, port).map_err(EngineError::Flags)?;
        let (pid_path, log_path) = self.run_paths(&spec.pool_id, seat);
        let pid_path = pid_path.as_path();
        let mut process = spawn(installation, spec, &flags, &log_path).await?;
        let mut files = RunFiles::default();
        files.add(pid_path.to_owned());
        let named = pid_file(&process.group, None, port)?;
        if let Some(named) = &named {
            named.write(pid_path)?;
        } else {
            // Gone already; the wait below says why.
            tracing::debug!("the engine ended before it could be looked at");
        }

        let url = format!("http://127.0.0.1:{port}");
        let waited = Waited {
            pool: &spec.pool_id,
            url: &url,
            port,
            model: &spec.model.path,
            load_timeout: spec.load_timeout,
        };
        let client = ready::loopback_client()?;
        let waiting = ready::wait_ready(&client, &mut process.group, &process.log, &waited);
        let listener = match waiting.await? {
            Readiness::Ready(listener) => listener,
            Readiness::Ended(status) => {
                process.log.drain().await;
                let tail = process.log.tail();
                if refused_port(&tail) || port::is_taken(port) {
                    return Ok(Attempt::PortTaken);
                }
                return Err(EngineError::DiedLoading {
                    pool: spec.pool_id.clone(),
                    status: status.to_string(),
                    log: log_path,
                    tail,
                });
            }
            Readiness::TimedOut { after, stranger } => {
                return Err(EngineError::LoadTimeout {
                    pool: spec.pool_id.clone(),
                    seconds: spec.load_timeout.as_secs(),
                    after_seconds: after.as_secs(),
                    stranger: stranger.then_some(port),
                    log: log_path,
                    tail: process.log.tail(),
                });
            }
        };
        // A wrapper script has become the engine by now, or runs it as its child: the file must
        // name what runs.
        let listener = match listener {
            Listener::Member(pid) if pid != process.group.pid() => Some(pid),
            _ => None,
        };
        let runs = pid_file(&process.group, listener, port)?;
        if let Some(runs) = runs.filter(|runs| named.as_ref() != Some(runs)) {
            runs.write(pid_path)?;
        }
        let (warning, props) = tokio::join!(
            ready::probe_metrics(&client, &waited),
            ready::ask_props(&client, &waited)
        );
        if let Some(warning) = warning {
            step.note(warning);
        }
        let props = props?;
        let context = describe(
            installation,
            spec,
            &props,
            url.clone(),
            flags,
            process.group.pid(),
        );
        if seat == Seat::Usual {
            let handoff = handoff_path(&self.runtime, &spec.pool_id);
            handoff::write_handoff(&handoff, &context, spec.profile, &log_path)?;
            files.add(handoff);
        }
        Ok(Attempt::Ready(Box::new((process, files, context))))
    }
}

async fn spawn(
    installation: &EngineInstallation,
    spec: &LaunchSpec,
    flags: &[String],
    log_path: &Path,
) -> Result<EngineProcess, EngineError> {
    let command = scrub(CommandSpec::new(&installation.binary).args(flags));
    let failed = |source: ProcessError| EngineError::Process {
        pool: spec.pool_id.clone(),
        source,
    };
    let mut group = process::spawn(command).await.map_err(failed)?;
    let (stdout, stderr) = (group.take_stdout(), group.take_stderr());
    let log = LogPump::start(log_path, stdout, stderr).await?;
    Ok(EngineProcess { group, log })
}

/// Who the engine and its owner are, and who listens, if that is another process; `None` if the
/// engine is gone already.
fn pid_file(
    group: &ChildGroup,
    listener: Option<u32>,
    port: u16,
) -> Result<Option<PidFile>, EngineError> {
    let identity =
        |pid: u32| ProcessIdentity::of(pid).map_err(|source| EngineError::Identity { pid, source });
    let own = std::process::id();
    let (Some(engine), Some(owner)) = (identity(group.pid())?, identity(own)?) else {
        return Ok(None);
    };
    Ok(Some(PidFile {
        engine,
        listener: match listener {
            Some(pid) => identity(pid)?,
            None => None,
        },
        port,
        owner_pid: own,
        owner,
    }))
}

fn refused_port(tail: &[String]) -> bool {
    tail.iter().any(|line| {
        let line = line.to_ascii_lowercase();
        BIND_FAILURES.iter().any(|sign| line.contains(sign))
    })
}

/// The facts of a ready engine: what it says itself where it says something.
fn describe(
    installation: &EngineInstallation,
    spec: &LaunchSpec,
    props: &ready::Props,
    url: String,
    flags: Vec<String>,
    pid: u32,
) -> ProvisionedContext {
    let said = props
        .build_info
        .as_deref()
        .and_then(version::from_build_info);
    ProvisionedContext {
        pool_id: spec.pool_id.clone(),
        replica_id: spec.replica_id.clone(),
        url,
        engine: EngineKind::Llamacpp,
        engine_version: said.unwrap_or_else(|| installation.version.clone()),
        engine_digest: Some(installation.digest),
        provisioning_mode: installation.mode,
        model: Some(spec.model.clone()),
        slots: props.total_slots,
        ctx: props.ctx_per_slot(),
        flags,
        pid: Some(pid),
    }
}
