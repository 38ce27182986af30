//! The configuration is changed while the daemon runs.
//!
//! ```text
//! SIGHUP ────────────┐
//!                    ├─► read, check ─► difference ─► drain, stop, start ─► watch until
//! POST /v2/admin/… ──┘    wrong: nothing                 the pools that       they are ready
//!                         at all changes                 changed
//! ```
//!
//! One actor, the [`Reloader`], owns the pools' supervisors and the
//! configuration in force, so there is one reload at a time. While pools are
//! drained, stopped or started a second reload is refused, and a SIGHUP is kept
//! until after; one that comes while pools only get ready takes the place of
//! the first. Pools that did not change are never touched. Removed pools go
//! before added ones come, so that both need not fit into memory at once.

mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use llama_orch_types::{ErrorCode, Hinted, PoolId};
use provision_kit::chain::one_line;
use provision_kit::progress::Reporter;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use self::report::{ChangeKind, PoolProgress, PoolReport, ReloadReport, ReloadStage};
use super::bootstrap::{Plan, STOP_LIMIT, StartError};
use super::config::difference::{Difference, PoolChange};
use super::config::{Config, Loaded, PoolConfig, Source, Token};
use super::launch::{Launcher, LivePool};
use super::state::AppState;
use crate::api::error::ApiError;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle};

/// Commands that may wait before senders have to.
const COMMAND_QUEUE: usize = 16;

/// How long the configuration and the token may take to be read.
const READ_LIMIT: Duration = Duration::from_secs(10);

enum Command {
    Reload {
        dry_run: bool,
        reply: oneshot::Sender<Result<ReloadReport, ApiError>>,
    },
    /// SIGHUP: nobody waits for an answer.
    HangUp,
}

/// The way to the reloader. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ReloadHandle {
    commands: mpsc::Sender<Command>,
    report: watch::Receiver<ReloadReport>,
}

/// The reloader's end of it.
#[derive(Debug)]
pub(super) struct Inbox {
    commands: mpsc::Receiver<Command>,
    report: watch::Sender<ReloadReport>,
    /// A SIGHUP came that was not heeded yet.
    again: bool,
}

pub(super) fn channel() -> (ReloadHandle, Inbox) {
    let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
    let (publish, report) = watch::channel(ReloadReport::default());
    let handle = ReloadHandle {
        commands: sender,
        report,
    };
    let inbox = Inbox {
        commands,
        report: publish,
        again: false,
    };
    (handle, inbox)
}

impl ReloadHandle {
    /// Reads the configuration again and begins to do what it says, or only
    /// says what that would be. A wrong one changes nothing.
    pub async fn reload(&self, dry_run: bool) -> Result<ReloadReport, ApiError> {
        let (reply, answer) = oneshot::channel();
        // Both fail only when the reloader has ended.
        let _ = self.commands.send(Command::Reload { dry_run, reply }).await;
        answer.await.unwrap_or_else(|_| {
            let stopping = Failure::new(ErrorCode::PoolUnavailable, "the daemon is shutting down");
            Err(stopping.into())
        })
    }

    /// The same for a signal: what comes of it is logged.
    pub async fn hang_up(&self) {
        // Fails only when the reloader has ended, and with it the daemon.
        let _ = self.commands.send(Command::HangUp).await;
    }

    /// The last reload, as far as it is.
    pub fn last(&self) -> ReloadReport {
        self.report.borrow().clone()
    }
}

/// The reloader at work.
#[derive(Debug)]
pub(super) struct RunningReloader {
    stop: CancellationToken,
    task: JoinHandle<Duration>,
}

impl RunningReloader {
    /// Ends it in the middle of whatever it does: the daemon ends. Returns how
    /// long running tasks may go on.
    pub(super) async fn end(self) -> Duration {
        self.stop.cancel();
        // It broke by a fault of ours: tasks get the default then.
        self.task
            .await
            .unwrap_or_else(|_| Config::default().drain())
    }
}

/// How a pool did after it was started: ready, or why not.
type Settled = (PoolId, Result<(), Failure>);

/// Owns the pools' lives and the configuration in force.
pub(super) struct Reloader {
    state: Arc<AppState>,
    launcher: Launcher,
    reporter: Arc<dyn Reporter>,
    source: Source,
    config: Config,
    /// The file that was read last.
    file: Option<PathBuf>,
    pools: BTreeMap<PoolId, LivePool>,
    /// Pools that were started and are not ready yet.
    settling: FuturesUnordered<BoxFuture<'static, Settled>>,
    /// What comes of them when they are.
    aims: BTreeMap<PoolId, Aim>,
}

/// What a pool that was started is to become.
enum Aim {
    /// A pool that was not there before.
    New,
    /// The same pool with other settings; these it had before.
    Other(Box<PoolConfig>),
    /// What it was before: with the other settings it failed.
    Back(Failure),
}

/// A new configuration that can be used.
struct Examined {
    config: Config,
    file: Option<PathBuf>,
    token: Option<Token>,
    difference: Difference,
    report: ReloadReport,
}

impl Reloader {
    /// Starts every pool, and the reloader itself.
    pub(super) fn start(
        plan: Plan,
        launcher: Launcher,
        state: Arc<AppState>,
        inbox: Inbox,
    ) -> Result<RunningReloader, StartError> {
        let Loaded { config, origin } = plan.loaded;
        let mut pools = BTreeMap::new();
        for (id, pool) in &config.pools {
            pools.insert(id.clone(), launcher.launch(id, pool)?);
        }
        let reloader = Self {
            state,
            launcher,
            reporter: plan.reporter,
            source: plan.source,
            config,
            file: origin.map(|(path, _)| path),
            pools,
            settling: FuturesUnordered::new(),
            aims: BTreeMap::new(),
        };
        reloader.show(|shown| {
            let handles = reloader.pools.iter();
            shown.extend(handles.map(|(id, live)| (id.clone(), live.handle.clone())));
        });
        let stop = CancellationToken::new();
        // Ended by whoever holds it, when the daemon ends.
        let task = tokio::spawn(reloader.run(inbox, stop.clone()));
        Ok(RunningReloader { stop, task })
    }

    async fn run(mut self, mut inbox: Inbox, stop: CancellationToken) -> Duration {
        // Whatever goes on is dropped: the daemon's end drains and stops all
        // there is.
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = self.work(&mut inbox) => {}
        }
        self.config.drain()
    }

    async fn work(&mut self, inbox: &mut Inbox) {
        loop {
            if std::mem::take(&mut inbox.again) {
                self.hang_up(inbox).await;
                continue;
            }
            tokio::select! {
                Some(settled) = self.settling.next() => self.settle(settled, inbox).await,
                command = inbox.commands.recv() => match command {
                    Some(Command::Reload { dry_run, reply }) => self.reload(dry_run, reply, inbox).await,
                    Some(Command::HangUp) => inbox.again = true,
                    None => return,
                },
            }
        }
    }

    async fn reload(
        &mut self,
        dry_run: bool,
        reply: oneshot::Sender<Result<ReloadReport, ApiError>>,
        inbox: &mut Inbox,
    ) {
        match self.examine().await {
            Err(failure) => {
                // Nobody waits any more if sending fails, here and below.
                let _ = reply.send(Err(failure.into()));
            }
            Ok(examined) if dry_run => {
                let _ = reply.send(Ok(examined.report));
            }
            Ok(examined) => {
                let _ = reply.send(Ok(inbox.begin(&examined.report)));
                self.apply(examined, inbox).await;
            }
        }
    }

    async fn hang_up(&mut self, inbox: &mut Inbox) {
        match self.examine().await {
            Err(failure) => {
                let hint = failure.hint.unwrap_or_default();
                tracing::error!(hint, "nothing is changed: {}", failure.message);
            }
            Ok(examined) => {
                inbox.begin(&examined.report);
                self.apply(examined, inbox).await;
            }
        }
    }

    /// Reads and checks; changes nothing.
    async fn examine(&mut self) -> Result<Examined, Failure> {
        let (source, reporter) = (self.source.clone(), Arc::clone(&self.reporter));
        // On a thread that may wait: the file may lie anywhere.
        let read = tokio::task::spawn_blocking(move || Plan::read(source, reporter));
        let plan = match tokio::time::timeout(READ_LIMIT, read).await {
            Ok(Ok(plan)) => plan.map_err(|error| unusable(&error))?,
            Ok(Err(_)) => return Err(Failure::internal("reading the configuration broke off")),
            Err(_) => {
                let limit = READ_LIMIT.as_secs();
                let message = format!("the configuration could not be read within {limit} s");
                return Err(Failure::new(ErrorCode::InvalidParams, message));
            }
        };
        let Loaded { config, origin } = plan.loaded;
        if let (Some(file), None) = (&self.file, &origin) {
            let message = format!("the configuration file {} is gone", file.display());
            return Err(Failure::new(ErrorCode::InvalidParams, message)
                .with_hint("an empty file stands for the defaults"));
        }
        let difference = Difference::between(&self.config, &config);
        let in_force = Loaded {
            config: difference.apply_to(&self.config, &config),
            origin,
        };
        // What needs a restart stays as it is, and the rest must fit to that.
        in_force
            .check(plan.token.is_some(), plan.real_only)
            .map_err(|error| unusable(&StartError::Setup(error)))?;
        let mut report = ReloadReport::of(&difference, &self.config, &config);
        report.state = ReloadStage::Planned;
        report.token_changed = plan.token != *self.state.token.get();
        let file = in_force.origin.map(|(path, _)| path);
        report.config = file.as_ref().map(|path| path.display().to_string());
        Ok(Examined {
            config: in_force.config,
            file,
            token: plan.token,
            difference,
            report,
        })
    }

    async fn apply(&mut self, examined: Examined, inbox: &mut Inbox) {
        if examined.report.token_changed {
            self.state.token.set(examined.token);
        }
        self.file = examined.file;
        let old = std::mem::replace(&mut self.config, examined.config);
        // Pools of an earlier reload are not watched any more.
        self.settling.clear();
        self.aims.clear();
        let mut added = Vec::new();
        let mut ending = FuturesUnordered::new();
        for (id, change) in examined.difference.pools {
            match change {
                PoolChange::Added(pool) => added.push((id, pool)),
                PoolChange::Removed => ending.push(self.end(id, None, inbox)),
                PoolChange::Changed(pool, _) | PoolChange::Reloaded(pool, _) => {
                    if old.pools.get(&id).is_some_and(|old| can_take(old, &pool)) {
                        inbox.note(&id, PoolProgress::Working, None);
                        let outcome = self.adjust(&id, &pool).await;
                        inbox.note_outcome(&id, outcome);
                    } else {
                        ending.push(self.end(id, Some(pool), inbox));
                    }
                }
            }
        }
        while let Some((id, next)) = inbox.refusing(ending.next()).await {
            if let Some(pool) = next {
                let before = old.pools.get(&id).cloned();
                let aim = before.map_or(Aim::New, |before| Aim::Other(Box::new(before)));
                self.bring_up(id, &pool, aim, inbox);
            } else {
                self.show(|pools| drop(pools.remove(&id)));
                inbox.note(&id, PoolProgress::Done, None);
            }
        }
        for (id, pool) in added {
            inbox.note(&id, PoolProgress::Working, None);
            self.bring_up(id, &pool, Aim::New, inbox);
        }
        self.finish_if_settled(inbox);
    }

    /// Gives a pool new settings.
    async fn adjust(&mut self, id: &PoolId, pool: &PoolConfig) -> Result<(), Failure> {
        match self.pools.get(id) {
            Some(live) => live.handle.apply(pool.clone()).await,
            None => Err(Failure::internal(format!("pool {id} is not running"))),
        }
    }

    /// Begins to end a pool; what it is to become comes back when it is gone.
    /// Until then it can be seen, and its tasks be read and cancelled.
    fn end(
        &mut self,
        id: PoolId,
        next: Option<PoolConfig>,
        inbox: &Inbox,
    ) -> impl Future<Output = (PoolId, Option<PoolConfig>)> + use<> {
        inbox.note(&id, PoolProgress::Working, None);
        let (live, drain) = (self.pools.remove(&id), self.config.drain());
        async move {
            let gone = match live {
                Some(live) => live.end(drain, STOP_LIMIT).await,
                None => true,
            };
            if !gone {
                let limit = STOP_LIMIT.as_secs();
                tracing::error!(pool = %id, "the engine did not stop within {limit} s");
            }
            (id, next)
        }
    }

    /// Starts a pool, and watches it until it is ready or has failed.
    fn bring_up(&mut self, id: PoolId, pool: &PoolConfig, aim: Aim, inbox: &Inbox) {
        match self.launcher.launch(&id, pool) {
            Ok(live) => {
                let handle = live.handle.clone();
                self.show(|pools| drop(pools.insert(id.clone(), handle.clone())));
                self.pools.insert(id.clone(), live);
                self.aims.insert(id.clone(), aim);
                self.settling.push(Box::pin(settled(id, handle)));
            }
            Err(error) => {
                self.show(|pools| drop(pools.remove(&id)));
                self.config.pools.remove(&id);
                inbox.note(&id, PoolProgress::Failed, Some(failure_of(&error)));
            }
        }
    }

    /// A pool that was started is ready, or goes back to what it was.
    async fn settle(&mut self, (id, outcome): Settled, inbox: &mut Inbox) {
        match (outcome, self.aims.remove(&id)) {
            (Ok(()), Some(Aim::Back(failure))) => {
                inbox.note(&id, PoolProgress::RolledBack, Some(failure));
            }
            (Ok(()), _) => inbox.note(&id, PoolProgress::Done, None),
            (Err(failure), Some(Aim::Other(before))) => {
                tracing::error!(pool = %id, "the old settings come back: {}", failure.message);
                let ending = self.end(id, None, inbox);
                let (id, _) = inbox.refusing(ending).await;
                self.config.pools.insert(id.clone(), (*before).clone());
                self.bring_up(id, &before, Aim::Back(failure), inbox);
            }
            (Err(failure), _) => inbox.note(&id, PoolProgress::Failed, Some(failure)),
        }
        self.finish_if_settled(inbox);
    }

    fn finish_if_settled(&self, inbox: &Inbox) {
        if inbox.is_running() && self.settling.is_empty() {
            inbox.finish();
        }
    }

    /// Changes which pools there are for requests. Nobody else does, so none
    /// of it is lost.
    fn show(&self, change: impl FnOnce(&mut BTreeMap<PoolId, PoolHandle>)) {
        let mut pools = BTreeMap::clone(&self.state.pools.get());
        change(&mut pools);
        self.state.pools.set(pools);
    }
}

impl Inbox {
    /// Publishes a new reload.
    fn begin(&self, report: &ReloadReport) -> ReloadReport {
        let begun = ReloadReport {
            id: self.report.borrow().id + 1,
            state: ReloadStage::Running,
            ..report.clone()
        };
        tracing::info!(reload = begun.id, "the configuration is read again");
        for warning in begun.warnings() {
            tracing::warn!("{warning}");
        }
        let mut done = begun.clone();
        for pool in &mut done.pools {
            // There is nothing to do for it.
            if pool.change == ChangeKind::Unchanged {
                pool.state = PoolProgress::Done;
            }
        }
        self.report.send_replace(done.clone());
        done
    }

    fn note(&self, pool: &PoolId, state: PoolProgress, error: Option<Failure>) {
        self.report
            .send_modify(|report| report.note(pool, state, error));
    }

    fn note_outcome(&self, pool: &PoolId, outcome: Result<(), Failure>) {
        match outcome {
            Ok(()) => self.note(pool, PoolProgress::Done, None),
            Err(failure) => self.note(pool, PoolProgress::Failed, Some(failure)),
        }
    }

    fn is_running(&self) -> bool {
        self.report.borrow().state == ReloadStage::Running
    }

    fn finish(&self) {
        self.report.send_modify(|report| {
            report.state = if report.has_failed() {
                ReloadStage::Failed
            } else {
                ReloadStage::Done
            };
        });
        let report = self.report.borrow().clone();
        for line in report.lines() {
            tracing::info!(reload = report.id, "{line}");
        }
    }

    /// Waits for work that must not be mixed with another reload.
    async fn refusing<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(command) = self.commands.recv() => match command {
                    Command::Reload { reply, .. } => {
                        let _ = reply.send(Err(busy()));
                    }
                    Command::HangUp => self.again = true,
                },
            }
        }
    }
}

/// Whether a pool can be given new settings while it lives. Otherwise it makes
/// way for a pool that is started with them.
fn can_take(old: &PoolConfig, new: &PoolConfig) -> bool {
    old.same_engine(new)
}

/// Waits until a pool is ready, or is said not to become it.
async fn settled(id: PoolId, pool: PoolHandle) -> Settled {
    let settled = |phase| matches!(phase, Phase::Ready | Phase::Failed | Phase::Stopped);
    let snapshot = pool.wait_for(|snapshot| settled(snapshot.phase)).await;
    let outcome = match snapshot {
        Some(snapshot) if snapshot.phase == Phase::Ready => Ok(()),
        snapshot => Err(snapshot
            .and_then(|snapshot| snapshot.last_error)
            .unwrap_or_else(|| Failure::internal("the pool stopped"))),
    };
    (id, outcome)
}

fn failure_of(error: &StartError) -> Failure {
    Failure {
        hint: error.hint(),
        ..Failure::new(ErrorCode::PoolUnavailable, one_line(error))
    }
}

/// Why a configuration is not taken over.
fn unusable(error: &StartError) -> Failure {
    Failure {
        code: ErrorCode::InvalidParams,
        ..failure_of(error)
    }
}

fn busy() -> ApiError {
    let failure = Failure::new(
        ErrorCode::AdmissionReject,
        "another reload drains, stops or starts pools",
    )
    .retriable()
    .with_hint("GET /v2/admin/reload says how far it is");
    ApiError::from(failure).with_status(StatusCode::CONFLICT)
}
