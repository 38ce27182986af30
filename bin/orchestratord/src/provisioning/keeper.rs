//! Follows the pool's orders with one engine, or for a while two.

use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_orch_types::{ErrorCode, ProvisionedContext};
use provisioners_engine_provisioner::{EngineExit, PoolLock, RunningEngine};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::liveness;
use super::memory::Place;
use super::{Parts, ProvisionError};
use crate::app::config::PoolConfig;
use crate::services::event_log::Failure;
use crate::services::pool::lifecycle::RestartCause;
use crate::services::pool::{Bound, Change, LogTail, Order, Wanted};

/// Log lines of a dead engine that its error repeats.
const TAIL_LINES: usize = 8;

/// What a pool's own limit on the tasks of a replaced engine may be overrun by.
const RETIRE_MARGIN: Duration = Duration::from_mins(1);

/// An engine that serves, and what it was started with.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) engine: RunningEngine,
    /// Behind the engine, and so given back when that is gone.
    place: Place,
    pub(super) config: Arc<PoolConfig>,
    /// One for all reports: by it the pool knows the engine again.
    context: Arc<ProvisionedContext>,
    /// What is known of its liveness, whatever is done beside.
    watch: Option<liveness::Watch>,
}

impl Kept {
    pub(super) fn new(engine: RunningEngine, place: Place, config: Arc<PoolConfig>) -> Self {
        let context = Arc::new(engine.context().clone());
        Self {
            engine,
            place,
            config,
            context,
            watch: None,
        }
    }

    fn bound(&self) -> Bound {
        let lines = self.engine.log_lines();
        Bound {
            context: Arc::clone(&self.context),
            log: LogTail::new(move || lines.lines()),
            config: Some(Arc::clone(&self.config)),
        }
    }
}

/// What came of starting an engine beside another.
pub(super) enum Beside {
    Ready(Box<Kept>),
    /// There is no room for two: why.
    NoRoom(String),
}

/// What interrupts whatever is being done.
enum Interruption {
    Stop,
    NewOrder,
}

#[derive(Debug)]
pub(super) struct Keeper {
    parts: Arc<Parts>,
    orders: watch::Receiver<Order>,
    /// The order that is being followed, or was.
    order: u64,
    kept: Option<Kept>,
    /// Why there is no engine, if one has ended.
    last_exit: Option<(RestartCause, Failure)>,
    /// Engines that were replaced and finish their tasks, and the lock that
    /// they share with whoever comes.
    retiring: JoinSet<()>,
    lock: Option<PoolLock>,
}

impl Keeper {
    /// One that follows the orders after `order`.
    pub(super) fn new(parts: Arc<Parts>, order: u64) -> Self {
        Self {
            orders: parts.pool.orders(),
            parts,
            order,
            kept: None,
            last_exit: None,
            retiring: JoinSet::new(),
            lock: None,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            let interruption = match &mut self.kept {
                None => self.parts.interrupted(&mut self.orders, self.order).await,
                Some(kept) => tokio::select! {
                    biased;
                    interruption = self.parts.interrupted(&mut self.orders, self.order) => interruption,
                    ended = self.parts.watch(kept) => {
                        self.lose(ended).await;
                        continue;
                    }
                },
            };
            match interruption {
                Interruption::Stop => return self.end().await,
                Interruption::NewOrder => Box::pin(self.follow()).await,
            }
        }
    }

    async fn follow(&mut self) {
        let Order { serial, wanted } = self.orders.borrow_and_update().clone();
        self.order = serial;
        match wanted {
            Wanted::Start { config, prove } => Box::pin(self.start(config, prove)).await,
            Wanted::Replace(config) if self.kept.is_some() => Box::pin(self.replace(config)).await,
            Wanted::Keep | Wanted::Replace(_) => {
                let change = match &self.kept {
                    Some(kept) => Change::Ready(kept.bound()),
                    None => self.gone(),
                };
                self.report(change).await;
            }
            Wanted::Rest => {
                let crash = self.stop_engine().await;
                // Their tasks are over, or were given up.
                self.retiring.shutdown().await;
                self.lock = None;
                self.report(crash.unwrap_or(Change::Stopped)).await;
            }
        }
    }

    async fn start(&mut self, config: Arc<PoolConfig>, prove: bool) {
        self.stop_engine().await;
        let lock = self.shared_lock();
        let parts = Arc::clone(&self.parts);
        let order = self.order;
        let started = tokio::select! {
            biased;
            // Followed in the next round. Dropping the start ends its processes.
            _ = parts.interrupted(&mut self.orders, order) => return,
            started = parts.bring_up(order, &config, lock, prove) => started,
        };
        let bound = started.and_then(|kept| {
            parts.bind(kept.engine.context())?;
            Ok(kept)
        });
        match bound {
            Ok(kept) => {
                let bound = kept.bound();
                self.kept = Some(kept);
                self.report(Change::Ready(bound)).await;
            }
            Err(error) => {
                let failure = error.failure();
                tell(&parts, "the engine is not started", &failure);
                let log = error.log();
                self.report(Change::NotStarted { failure, log }).await;
            }
        }
    }

    /// Starts an engine beside the one that runs, and gives it the tasks.
    async fn replace(&mut self, config: Arc<PoolConfig>) {
        let parts = Arc::clone(&self.parts);
        let order = self.order;
        let Some(kept) = &mut self.kept else { return };
        let lock = kept.engine.pool_lock();
        let facts = super::room::Running::of(kept);
        let outcome = tokio::select! {
            biased;
            // The new engine is given up.
            _ = parts.interrupted(&mut self.orders, order) => return,
            ended = parts.watch(kept) => {
                self.lose(ended).await;
                return;
            }
            outcome = parts.beside(&config, &facts, lock) => outcome,
        };
        match outcome {
            Ok(Beside::NoRoom(why)) => self.report(Change::NoRoom(why)).await,
            Ok(Beside::Ready(new)) => self.hand_over(*new).await,
            Err(error) => self.not_replaced(&error).await,
        }
    }

    async fn not_replaced(&self, error: &ProvisionError) {
        let failure = error.failure();
        tell(&self.parts, "the engine is not replaced", &failure);
        self.report(Change::NotReplaced(failure)).await;
    }

    async fn hand_over(&mut self, mut new: Kept) {
        let Some(mut old) = self.kept.take() else {
            return;
        };
        if let Err(error) = self.parts.bind(new.engine.context()) {
            self.kept = Some(old);
            return self.not_replaced(&error).await;
        }
        let engines = &self.parts.engines;
        engines.take_over(&mut new.engine, &mut old.engine);
        self.lock = Some(new.engine.pool_lock());
        let before = self.parts.pool.snapshot().engines;
        let bound = new.bound();
        self.kept = Some(new);
        self.report(Change::Replaced(bound)).await;
        let (parts, order) = (Arc::clone(&self.parts), self.order);
        // Ended with the keeper, since the set is.
        self.retiring.spawn(async move {
            parts.retire(old.engine, before).await;
            drop(old.place);
            parts.pool.report(order, Change::Retired).await;
        });
    }

    /// The engine ended without being asked to, or has to be.
    async fn lose(&mut self, ended: Ended) {
        let Some(kept) = self.kept.take() else {
            return;
        };
        let context = kept.engine.context().clone();
        self.parts.unbind(&context);
        let exit = match ended {
            Ended::Exit(exit) => (RestartCause::Crash, crashed(&context, &exit)),
            Ended::Hung(reason) => (RestartCause::Hang, end_hung(kept.engine, &reason).await),
        };
        drop(kept.place);
        self.last_exit = Some(exit);
        let change = self.gone();
        self.report(change).await;
    }

    fn gone(&self) -> Change {
        let exit = self.last_exit.clone();
        let (cause, failure) = exit.unwrap_or_else(|| {
            let failure = Failure::new(ErrorCode::PoolUnavailable, "there is no engine");
            (RestartCause::Crash, failure)
        });
        Change::Exited { cause, failure }
    }

    /// Ends the engine. One that had ended by itself before it was seen is a crash.
    async fn stop_engine(&mut self) -> Option<Change> {
        let kept = self.kept.take()?;
        let context = kept.engine.context().clone();
        self.parts.unbind(&context);
        let meter = kept.engine.meter();
        self.parts.measure_last(meter, &kept.place).await;
        let log = kept.engine.log_lines();
        let report = kept.engine.stop().await;
        drop(kept.place);
        if !report.by_itself {
            return None;
        }
        let exit = EngineExit {
            status: report.status,
            log_tail: log.lines(),
        };
        self.last_exit = Some((RestartCause::Crash, crashed(&context, &exit)));
        Some(self.gone())
    }

    async fn end(mut self) {
        self.stop_engine().await;
        self.retiring.shutdown().await;
        self.report(Change::Stopped).await;
    }

    /// The lock under which an engine retires, if one does.
    fn shared_lock(&mut self) -> Option<PoolLock> {
        while self.retiring.try_join_next().is_some() {}
        if self.retiring.is_empty() {
            self.lock = None;
        }
        self.lock.clone()
    }

    async fn report(&self, change: Change) {
        self.parts.pool.report(self.order, change).await;
    }
}

/// How an engine's service ended.
enum Ended {
    Exit(EngineExit),
    /// It runs and gives no tokens: why it is thought so.
    Hung(String),
}

impl Parts {
    /// Waits until something else is to be done.
    async fn interrupted(&self, orders: &mut watch::Receiver<Order>, seen: u64) -> Interruption {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Interruption::Stop,
            order = orders.wait_for(|order| order.serial > seen) => match order {
                Ok(_) => Interruption::NewOrder,
                // The pool is gone.
                Err(_) => Interruption::Stop,
            },
        }
    }

    /// Waits until the engine ends or can no longer be relied on.
    async fn watch(&self, kept: &mut Kept) -> Ended {
        let meter = kept.engine.meter();
        tokio::select! {
            exit = kept.engine.wait_exit() => Ended::Exit(exit),
            never = self.measure(meter, &kept.place) => match never {},
            reason = self.distrusted() => Ended::Hung(reason),
            reason = liveness::watch(&self.pool, &self.host, &mut kept.watch) => Ended::Hung(reason),
        }
    }

    /// Why the pool no longer relies on its engine, once it does not.
    async fn distrusted(&self) -> String {
        let snapshot = self
            .pool
            .wait_for(|snapshot| snapshot.distrust.is_some())
            .await;
        match snapshot.and_then(|snapshot| snapshot.distrust) {
            Some(reason) => reason,
            // The pool is gone, and we are about to be told.
            None => std::future::pending().await,
        }
    }

    /// Ends an engine that was replaced when its tasks are over. The pool ends
    /// them in time.
    async fn retire(&self, engine: RunningEngine, engines_before: u64) {
        let limit = self.pool.settings().drain + RETIRE_MARGIN;
        let over = self
            .pool
            .wait_for(|snapshot| snapshot.engines > engines_before && snapshot.retiring == 0);
        let begun = Instant::now();
        if tokio::time::timeout(limit, over).await.is_err() {
            tracing::warn!(pool = %self.pool.id(), "the replaced engine is ended with tasks on it");
        }
        tracing::info!(pool = %self.pool.id(), waited_ms = begun.elapsed().as_millis() as u64, "the replaced engine is ended");
        engine.stop().await;
    }

    fn unbind(&self, context: &ProvisionedContext) {
        self.host.unbind(&context.pool_id, &context.replica_id);
    }
}

fn tell(parts: &Parts, what: &str, failure: &Failure) {
    let hint = failure.hint.as_deref().unwrap_or("");
    tracing::error!(pool = %parts.pool.id(), hint, "{what}: {}", failure.message);
}

fn crashed(context: &ProvisionedContext, exit: &EngineExit) -> Failure {
    let status = exit
        .status
        .map_or_else(|| "unknown status".to_owned(), |status| status.to_string());
    let tail = &exit.log_tail[exit.log_tail.len().saturating_sub(TAIL_LINES)..];
    tracing::error!(pool = %context.pool_id, status = status, log = tail.join("\n"), "engine ended by itself");
    let message = format!("the engine ended by itself: {status}");
    Failure::new(ErrorCode::PoolUnavailable, message)
        .with_hint(format!(
            "GET /v2/pools/{} has its last lines, its log in the cache directory all",
            context.pool_id
        ))
        .retriable()
}

/// Ends an engine that runs and gives no tokens.
async fn end_hung(engine: RunningEngine, reason: &str) -> Failure {
    let pool = engine.context().pool_id.clone();
    let report = engine.stop().await;
    tracing::error!(%pool, reason, killed = report.killed, "a hung engine was ended");
    let message = format!("the engine hung and was ended: {reason}");
    Failure::new(ErrorCode::PoolUnavailable, message)
        .with_hint(
            "the machine may be overloaded, or the prompt too long for `first_token_seconds`",
        )
        .retriable()
}
