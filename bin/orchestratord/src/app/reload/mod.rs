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
//! until after; one that comes while pools only get ready begins at once, and
//! waits for them, too. Pools that did not change are never touched. Removed pools go
//! before added ones come, so that both need not fit into memory at once.

mod examine;
mod inbox;
mod report;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use llama_orch_types::{ErrorCode, Hinted, PoolId};
use provision_kit::chain::one_line;
use provision_kit::progress::Reporter;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::examine::Examined;
use self::inbox::Command;
pub use self::inbox::ReloadHandle;
pub(super) use self::inbox::{Inbox, channel};
pub use self::report::{
    ChangeKind, PoolProgress, PoolReport, RefusedReload, ReloadReport, ReloadStage,
};
use super::bootstrap::{Plan, STOP_LIMIT, StartError};
use super::config::difference::PoolChange;
use super::config::{Config, Loaded, PoolConfig, Source};
use super::launch::{Launcher, LivePool};
use super::state::AppState;
use crate::api::error::ApiError;
use crate::services::event_log::Failure;
use crate::services::pool::lifecycle::ReloadState;
use crate::services::pool::{Leaving, Phase, PoolHandle, ReloadView};

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

/// How a pool did after it was started or given other settings, with the
/// number of that.
type Settled = (PoolId, u64, Outcome);

/// How it did.
enum Outcome {
    Ready,
    /// What it had before is in force.
    RolledBack(Failure),
    Failed(Failure),
}

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
    /// What comes of them when they are, with the numbers of their starts.
    aims: BTreeMap<PoolId, (u64, Aim)>,
    /// Pools started so far.
    starts: u64,
}

/// What a pool that was started is to become.
enum Aim {
    /// A pool that was not there before.
    New,
    /// The same pool with other settings; these it had before.
    Other(Box<PoolConfig>),
    /// What it was before: with the other settings it failed.
    Back(Failure),
    /// It takes other settings by itself, and goes back by itself if it cannot.
    Taken {
        before: Box<PoolConfig>,
        /// What a later reload wants of it, when that is over.
        next: Option<Box<PoolConfig>>,
    },
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
            pools.insert(id.clone(), launcher.launch(id, pool, config.drain())?);
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
            starts: 0,
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
                    Some(Command { dry_run, reply }) => self.reload(dry_run, reply, inbox).await,
                    None => return,
                },
                () = inbox.hung_up.notified() => inbox.again = true,
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
            Err(refused) => {
                let failure = refused.failure.clone();
                if !dry_run {
                    inbox.refuse(refused);
                }
                // Nobody waits any more if sending fails, here and below.
                let _ = reply.send(Err(failure.into()));
            }
            Ok(examined) if dry_run => {
                let _ = reply.send(Ok(examined.report));
            }
            Ok(examined) => {
                let _ = reply.send(Ok(inbox.begin(&examined.report, self.aims.keys())));
                self.apply(examined, inbox).await;
            }
        }
    }

    async fn hang_up(&mut self, inbox: &mut Inbox) {
        match self.examine().await {
            Err(refused) => {
                let failure = &refused.failure;
                let hint = failure.hint.as_deref().unwrap_or_default();
                tracing::error!(hint, "nothing is changed: {}", failure.message);
                inbox.refuse(refused);
            }
            Ok(examined) => {
                inbox.begin(&examined.report, self.aims.keys());
                self.apply(examined, inbox).await;
            }
        }
    }

    async fn apply(&mut self, examined: Examined, inbox: &mut Inbox) {
        if examined.report.token_changed {
            self.state.token.set(examined.token);
        }
        self.file = examined.file;
        let old = std::mem::replace(&mut self.config, examined.config);
        let (mut added, mut good) = (Vec::new(), BTreeMap::new());
        let mut ending = FuturesUnordered::new();
        for (id, change) in examined.difference.pools {
            match change {
                PoolChange::Added(pool) => added.push((id, pool)),
                PoolChange::Removed => ending.push(self.end(id, Leaving::Removed, None, inbox)),
                PoolChange::Changed(pool, _) | PoolChange::Reloaded(pool, _) => {
                    let before = old.pools.get(&id);
                    if let Some(before) = before.filter(|before| can_take(before, &pool)) {
                        self.adjust(id, before, &pool, inbox).await;
                    } else {
                        good.insert(id.clone(), self.last_good(&id, &old));
                        ending.push(self.end(id, Leaving::MakesWay, Some(pool), inbox));
                    }
                }
            }
        }
        while let Some((id, next)) = inbox.refusing(ending.next()).await {
            if let Some(pool) = next {
                let before = good.remove(&id).flatten();
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

    /// The last settings with which a pool was ready, or may have been.
    fn last_good(&self, id: &PoolId, old: &Config) -> Option<PoolConfig> {
        match self.aims.get(id) {
            Some((_, Aim::Other(before) | Aim::Taken { before, .. })) => Some((**before).clone()),
            Some((_, Aim::New)) => None,
            Some((_, Aim::Back(_))) | None => old.pools.get(id).cloned(),
        }
    }

    /// Gives a pool new settings, and watches it until the engine that they
    /// may need serves.
    async fn adjust(&mut self, id: PoolId, old: &PoolConfig, new: &PoolConfig, inbox: &Inbox) {
        inbox.note(&id, PoolProgress::Working, None);
        if let Some((_, Aim::Taken { next, .. })) = self.aims.get_mut(&id) {
            *next = Some(Box::new(new.clone()));
            return;
        }
        let handle = self.pools.get(&id).map(|live| live.handle.clone());
        let applied = match &handle {
            Some(handle) => handle.apply(new.clone()).await,
            None => Err(Failure::internal(format!("pool {id} is not running"))),
        };
        match (applied, handle) {
            (Ok(()), Some(handle)) if !old.same_engine(new) => {
                self.starts += 1;
                let aim = Aim::Taken {
                    before: Box::new(old.clone()),
                    next: None,
                };
                self.aims.insert(id.clone(), (self.starts, aim));
                self.settling
                    .push(Box::pin(reloaded(id, self.starts, handle)));
            }
            (Err(failure), _) => {
                // It goes on with what it had.
                self.config.pools.insert(id.clone(), old.clone());
                inbox.note(&id, PoolProgress::Failed, Some(failure));
            }
            (Ok(()), _) => inbox.note(&id, PoolProgress::Done, None),
        }
    }

    /// Begins to end a pool; what it is to become comes back when it is gone.
    /// Until then it can be seen, and its tasks be read and cancelled.
    fn end(
        &mut self,
        id: PoolId,
        why: Leaving,
        next: Option<PoolConfig>,
        inbox: &Inbox,
    ) -> impl Future<Output = (PoolId, Option<PoolConfig>)> + use<> {
        inbox.note(&id, PoolProgress::Working, None);
        // Nobody asks any more how its start went.
        self.aims.remove(&id);
        let (live, drain) = (self.pools.remove(&id), self.config.drain());
        async move {
            let gone = match live {
                Some(live) => live.end(why, drain, STOP_LIMIT).await,
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
        match self.launcher.launch(&id, pool, self.config.drain()) {
            Ok(live) => {
                let handle = live.handle.clone();
                self.show(|pools| drop(pools.insert(id.clone(), handle.clone())));
                self.pools.insert(id.clone(), live);
                self.starts += 1;
                self.aims.insert(id.clone(), (self.starts, aim));
                self.settling
                    .push(Box::pin(settled(id, self.starts, handle)));
            }
            Err(error) => {
                self.show(|pools| drop(pools.remove(&id)));
                self.config.pools.remove(&id);
                inbox.note(&id, PoolProgress::Failed, Some(failure_of(&error)));
            }
        }
    }

    /// A pool that was started is ready, or goes back to what it was.
    async fn settle(&mut self, (id, start, outcome): Settled, inbox: &mut Inbox) {
        let current = self.aims.get(&id).is_some_and(|(last, _)| *last == start);
        // It was ended in the meantime, or started again.
        let Some((_, aim)) = current.then(|| self.aims.remove(&id)).flatten() else {
            return;
        };
        match (outcome, aim) {
            (
                _,
                Aim::Taken {
                    next: Some(next), ..
                },
            ) => {
                let live = self.pools.get(&id);
                let now = live.map(|live| Arc::clone(&live.handle.settings().config));
                if let Some(now) = now {
                    self.adjust(id, &now, &next, inbox).await;
                }
            }
            (Outcome::Ready, Aim::Back(failure)) => {
                inbox.note(&id, PoolProgress::RolledBack, Some(failure));
            }
            (Outcome::Ready, _) => inbox.note(&id, PoolProgress::Done, None),
            (Outcome::RolledBack(failure), Aim::Taken { before, .. }) => {
                self.config.pools.insert(id.clone(), *before);
                inbox.note(&id, PoolProgress::RolledBack, Some(failure));
            }
            (Outcome::Failed(failure), Aim::Other(before)) => {
                tracing::error!(pool = %id, "the old settings come back: {}", failure.message);
                let ending = self.end(id, Leaving::MakesWay, None, inbox);
                let (id, _) = inbox.refusing(ending).await;
                self.config.pools.insert(id.clone(), (*before).clone());
                self.bring_up(id, &before, Aim::Back(failure), inbox);
            }
            (Outcome::Failed(failure) | Outcome::RolledBack(failure), _) => {
                inbox.note(&id, PoolProgress::Failed, Some(failure));
            }
        }
        self.finish_if_settled(inbox);
    }

    fn finish_if_settled(&self, inbox: &Inbox) {
        if inbox.is_running() && self.aims.is_empty() {
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

/// Whether a pool can be given new settings while it lives. Otherwise it makes
/// way for a pool that is started with them.
fn can_take(old: &PoolConfig, new: &PoolConfig) -> bool {
    old.engine == new.engine
}

/// Waits until a pool that was started is ready, or will be by its first task, or
/// is said not to become it.
async fn settled(id: PoolId, start: u64, pool: PoolHandle) -> Settled {
    let serves = |phase| matches!(phase, Phase::Ready | Phase::Unloaded);
    let settled = |phase| serves(phase) || matches!(phase, Phase::Failed | Phase::Stopped);
    let snapshot = pool.wait_for(|snapshot| settled(snapshot.phase)).await;
    let outcome = match snapshot {
        Some(snapshot) if serves(snapshot.phase) => Outcome::Ready,
        snapshot => Outcome::Failed(
            snapshot
                .and_then(|snapshot| snapshot.last_error)
                .unwrap_or_else(stopped),
        ),
    };
    (id, start, outcome)
}

/// Waits until a pool's own reload is over, one way or the other.
async fn reloaded(id: PoolId, start: u64, pool: PoolHandle) -> Settled {
    let is_over = |reload: &ReloadView| reload.state.is_over();
    let snapshot = pool
        .wait_for(|snapshot| snapshot.reload.as_ref().is_some_and(is_over))
        .await;
    let outcome = match snapshot.and_then(|snapshot| snapshot.reload) {
        Some(reload) => {
            let why = reload.error.unwrap_or_else(stopped);
            match reload.state {
                ReloadState::Done => Outcome::Ready,
                ReloadState::RolledBack => Outcome::RolledBack(why),
                _ => Outcome::Failed(why),
            }
        }
        None => Outcome::Failed(stopped()),
    };
    (id, start, outcome)
}

fn stopped() -> Failure {
    Failure::internal("the pool stopped")
}

fn failure_of(error: &StartError) -> Failure {
    Failure {
        hint: error.hint(),
        ..Failure::new(ErrorCode::PoolUnavailable, one_line(error))
    }
}
