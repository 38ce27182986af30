//! A pool: one model served by one engine, its queue, and its running tasks.
//!
//! Where its engine stands is a state machine of its own ([`lifecycle`], which
//! has the diagram). Tasks are queued in every phase but `Failed` and in those of
//! a drain, and go to the engine only in `Ready`, or to finish a drain. A pool
//! that is `Unloaded` has no engine until a task comes. In
//! `Failed` new tasks are refused and queued ones end with the reason; in
//! `Backoff` and during a reload queued ones are kept.
//!
//! One actor owns all of it ([`actor`]). Everybody else holds a
//! [`PoolHandle`]: it sends commands with a place for the answer, and reads
//! the last published [`PoolSnapshot`].

mod actor;
mod engine;
pub mod lifecycle;
mod meters;
mod orders;
mod refusals;
mod residence;
pub mod restart;
#[cfg(test)]
pub(in crate::services) mod tests;
mod work;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, PoolId, ProvisionedContext, TaskId};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use utoipa::ToSchema;
use worker_adapters_adapter_api::{CancelReport, EngineTask};

use self::lifecycle::Policy;
pub use self::lifecycle::{Phase, Restarts};
pub use self::meters::TaskMeters;
use self::orders::Request;
pub use self::orders::{
    Bound, Change, LoadCause, LogTail, Order, ReloadRequest, ReloadView, Transition, Unload,
    UnloadCause, Wanted,
};
use super::admission::Place;
use super::estimates::ServiceTimes;
use super::event_log::{Failure, TaskEvent};
use super::preparation::PreparationBoard;
use super::resume::{Carried, Loss, Seen};
use super::tasks::{Admitted, TaskRecord};
use crate::app::config::{PoolConfig, restart_policy, shown_model};

/// How long a command may take. The actor only decides, so only a fault of
/// ours takes that long.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// How long the answer to a cancel may take: the adapter waits with bounds of
/// its own until the engine's slot is free.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);

/// How long cancelling what runs and stopping the engine may take together.
const STOP_LIMIT: Duration = Duration::from_mins(1);

/// Commands that may wait for the actor before senders have to.
const COMMAND_QUEUE: usize = 256;

/// What a pool is made from.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    pub id: PoolId,
    /// The configuration of the engine that serves, or is tried.
    pub config: Arc<PoolConfig>,
    /// How long running tasks may go on when their engine is to end.
    pub drain: Duration,
    pub engine: EngineKind,
    /// The model as the configuration names it.
    pub model: String,
    /// Expected number of slots, until the engine says.
    pub slots: u32,
    pub queue_capacity: usize,
    /// How long a batch task waits before it takes every other turn.
    pub batch_ageing: Duration,
    /// For tasks that name no `max_tokens`.
    pub default_max_tokens: u32,
}

impl PoolSettings {
    /// Those of a configured pool. `drain` is how long running tasks may go on
    /// when their engine is to end.
    pub fn new(id: PoolId, config: Arc<PoolConfig>, drain: Duration) -> Self {
        Self {
            id,
            engine: config.engine,
            model: shown_model(&config.model),
            slots: config.expected_slots(),
            queue_capacity: usize::try_from(config.queue_capacity).unwrap_or(usize::MAX),
            batch_ageing: Duration::from_secs(config.batch_ageing_seconds),
            default_max_tokens: config.default_max_tokens,
            config,
            drain,
        }
    }

    fn policy(&self) -> Policy {
        Policy {
            restart: restart_policy(&self.config.restart),
            drain: self.drain,
        }
    }
}

/// A pool as last published.
#[derive(Debug, Clone)]
pub struct PoolSnapshot {
    /// They change with a reload.
    pub settings: Arc<PoolSettings>,
    pub phase: Phase,
    pub since: Instant,
    /// Why the pool failed or is backing off; the last such reason otherwise.
    pub last_error: Option<Failure>,
    /// When that was.
    pub last_error_at: Option<SystemTime>,
    /// When the engine is tried again, in `Backoff` and `Failed`.
    pub next_try: Option<Instant>,
    /// The last changes of phase, the oldest first.
    pub transitions: Arc<Vec<Transition>>,
    pub restarts: Restarts,
    /// The reload under way, or the last one.
    pub reload: Option<ReloadView>,
    /// The last lines of the engine's log; of the last engine, if none runs.
    pub engine_log: LogTail,
    /// The bound engine, in `Ready` and `Draining`.
    pub context: Option<Arc<ProvisionedContext>>,
    pub queued_interactive: usize,
    pub queued_batch: usize,
    pub running: usize,
    /// Those of them that run on an engine that another has replaced.
    pub retiring: usize,
    /// Tasks taken to an engine so far.
    pub dispatched: u64,
    /// Engines that were ready so far.
    pub engines: u64,
    pub slots: u32,
    /// Engines that ended without being asked to, or had to be ended.
    pub engine_exits: u64,
    /// Why the engine is not given tasks although it runs: it gave no token in
    /// time. Its supervisor ends it.
    pub distrust: Option<String>,
    /// How often a task's end made it doubtful that the engine works.
    pub doubt: u64,
    /// Why the pool ends for ever, if it does.
    pub leaving: Option<Leaving>,
    pub times: ServiceTimes,
    /// Since when no task runs or waits.
    pub idle_since: Option<Instant>,
    /// When it is unloaded for want of tasks, unless one comes.
    pub unloads_at: Option<Instant>,
    /// Since when the engine that serves is ready.
    pub loaded_since: Option<Instant>,
    /// How long the last load took: from the engine's start until it was ready.
    pub load_took: Option<Duration>,
    /// All loads so far.
    pub loads: ServiceTimes,
    /// The engine is on its way out to free its memory; tasks are taken.
    pub unloading: bool,
}

impl PoolSnapshot {
    pub fn queued(&self) -> usize {
        self.queued_interactive + self.queued_batch
    }
}

/// A task on its way into the queue.
#[derive(Debug)]
pub struct Submission {
    pub record: Arc<TaskRecord>,
    pub task: EngineTask,
    /// Whether the client named `max_tokens` itself. If not, an answer may be
    /// cut to what the context has room for.
    pub max_tokens_given: bool,
    /// Whether prompt and answer are known to fit the context.
    pub fits: bool,
    /// How often it was offered to an engine that was not there.
    pub attempts: u32,
    /// What engines that were lost had done of it.
    pub carried: Carried,
    /// Its turn; the pool's business.
    pub place: Place,
}

impl Submission {
    /// Makes of the task what is left of it after an engine that was lost: the
    /// next one goes on from the text that was sent.
    pub fn go_on_after(&mut self, seen: Seen, loss: Loss) {
        self.carried = self.carried.after(seen, loss);
        let (text, _) = self.record.log.text();
        self.task.answered = text;
        let done = u32::try_from(seen.tokens_out).unwrap_or(u32::MAX);
        self.task.max_tokens = self.task.max_tokens.saturating_sub(done);
    }
}

/// Whoever owns a task ends its log. If an owner is lost by a fault of ours,
/// no reader is left waiting for ever.
impl Drop for Submission {
    fn drop(&mut self) {
        if !self.record.log.is_closed() {
            let mut failure = Failure::internal("the task was dropped").in_pool(&self.record.pool);
            failure.correlation_id = Some(self.record.correlation_id.clone());
            // Closed by somebody else in this moment is closed, too.
            let _ = self.record.log.append(TaskEvent::Error(Box::new(failure)));
        }
    }
}

/// How a cancel went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancelled {
    /// It had not begun; nothing had to be freed.
    Queued,
    /// It was running; what was seen of the engine's slot, and what was done
    /// about a slot that was not seen free in time.
    Running {
        report: CancelReport,
        escalated: Option<Escalation>,
    },
    /// It was over already.
    Over,
}

/// What is done about a cancelled task whose slot is not seen free in time. Its
/// connection is closed in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Escalation {
    /// No other task ran on the engine: it was ended, and another is started.
    EngineRestarted,
    /// Others run on the engine, which is left alone: the slot is given to no task
    /// until it is seen free.
    Waiting,
}

/// Why a pool ends for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leaving {
    /// The daemon ends.
    DaemonEnds,
    /// The configuration names it no longer.
    Removed,
    /// A pool with the same name and other settings comes in its place.
    MakesWay,
}

impl Leaving {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::DaemonEnds => "the daemon is shutting down",
            Self::Removed => "the pool was removed from the configuration",
            Self::MakesWay => "the pool is started anew with other settings",
        }
    }
}

enum Command {
    Submit(Box<Submission>, oneshot::Sender<Result<Admitted, Failure>>),
    Cancel(TaskId, oneshot::Sender<Cancelled>),
    Position(TaskId, oneshot::Sender<Option<(usize, Duration)>>),
    /// A report of the supervisor, and the order it had seen last.
    Report(u64, Box<Change>),
    Request(Request, oneshot::Sender<Result<(), Failure>>),
    ShutDown(Leaving, Duration, oneshot::Sender<()>),
}

/// The way to a pool's actor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PoolHandle {
    id: PoolId,
    commands: mpsc::Sender<Command>,
    snapshot: watch::Receiver<PoolSnapshot>,
    orders: watch::Receiver<Order>,
    board: Arc<PreparationBoard>,
}

impl PoolHandle {
    /// Starts the pool's actor. It ends when it has been drained, or when all
    /// handles are gone.
    pub fn start(settings: PoolSettings, host: AdapterHost, board: Arc<PreparationBoard>) -> Self {
        let id = settings.id.clone();
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let (snapshot, orders) =
            actor::spawn(Arc::new(settings), host, Arc::clone(&board), receiver);
        Self {
            id,
            commands,
            snapshot,
            orders,
            board,
        }
    }

    pub fn id(&self) -> &PoolId {
        &self.id
    }

    /// As they are now.
    pub fn settings(&self) -> Arc<PoolSettings> {
        Arc::clone(&self.snapshot.borrow().settings)
    }

    pub fn board(&self) -> &Arc<PreparationBoard> {
        &self.board
    }

    pub fn snapshot(&self) -> PoolSnapshot {
        self.snapshot.borrow().clone()
    }

    /// Waits until the pool's snapshot satisfies `wanted`; `None` if the actor
    /// ends before.
    pub async fn wait_for(
        &self,
        wanted: impl FnMut(&PoolSnapshot) -> bool,
    ) -> Option<PoolSnapshot> {
        let mut snapshot = self.snapshot.clone();
        snapshot
            .wait_for(wanted)
            .await
            .ok()
            .map(|found| found.clone())
    }

    /// Puts a task into the queue.
    pub async fn submit(&self, submission: Submission) -> Result<Admitted, Failure> {
        let send = |reply| Command::Submit(Box::new(submission), reply);
        self.ask(send, COMMAND_LIMIT).await?
    }

    /// Ends a task. Its log is closed at once; the answer comes when the
    /// engine's slot was seen free, or the adapter gave up waiting for that.
    pub async fn cancel(&self, task: TaskId) -> Result<Cancelled, Failure> {
        let (reply, answer) = oneshot::channel();
        let gone = || self.gone();
        let sent = self.commands.send(Command::Cancel(task, reply));
        match tokio::time::timeout(COMMAND_LIMIT, sent).await {
            Ok(sent) => sent.map_err(|_| gone())?,
            Err(_) => return Err(Failure::internal("the pool takes no commands")),
        }
        let begun = Instant::now();
        match tokio::time::timeout(CANCEL_LIMIT, answer).await {
            Ok(answer) => answer.map_err(|_| gone()),
            // An engine so slow that its bounds are longer than ours.
            Err(_) => Ok(Cancelled::Running {
                report: CancelReport::NotSeenFree {
                    waited_ms: begun.elapsed().as_millis() as u64,
                },
                escalated: Some(Escalation::Waiting),
            }),
        }
    }

    /// How many tasks go first, and the time until this one starts; `None` if
    /// it does not wait.
    pub async fn position(&self, task: TaskId) -> Result<Option<(usize, Duration)>, Failure> {
        self.ask(|reply| Command::Position(task, reply), COMMAND_LIMIT)
            .await
    }

    /// What the pool wants of its supervisor.
    pub fn orders(&self) -> watch::Receiver<Order> {
        self.orders.clone()
    }

    /// For a supervisor that has seen every order.
    pub async fn change(&self, change: Change) {
        let serial = self.orders.borrow().serial;
        self.report(serial, change).await;
    }

    /// For a supervisor that has seen this order and those before it. A report
    /// that a later order overtook is dropped: that order has its own answer.
    /// Fails only when the actor is gone, in which case nobody is left to be
    /// told.
    pub async fn report(&self, serial: u64, change: Change) {
        let report = Command::Report(serial, Box::new(change));
        let _ = self.commands.send(report).await;
    }

    /// Refuses new tasks and stops the engine when those that were admitted
    /// are over, at the latest after `deadline`. Answers at once.
    pub async fn drain_pool(&self, deadline: Duration) -> Result<(), Failure> {
        self.request(Request::Drain(deadline)).await
    }

    /// Ends a drain, or tries a pool that waits or has failed again. Answers
    /// at once.
    pub async fn resume(&self) -> Result<(), Failure> {
        self.request(Request::Resume).await
    }

    /// Replaces the engine by one with another model or other flags, or, if
    /// none are named, by a new one. Answers at once; how it goes on is in the
    /// snapshot. Refused while another reload can still be rolled back, and
    /// while the pool is drained.
    pub async fn reload(&self, request: ReloadRequest) -> Result<(), Failure> {
        self.request(Request::Reload(request)).await
    }

    /// Gives the pool another configuration. The engine is reloaded only if it
    /// is concerned; a configuration that is in force changes nothing.
    pub async fn apply(&self, config: PoolConfig) -> Result<(), Failure> {
        self.request(Request::Apply(Box::new(config))).await
    }

    /// Frees the memory of the pool's engine; tasks are taken all along, and the
    /// next one has an engine loaded again. Answers at once; the engine is gone
    /// when its supervisor lets go of it, and a pool in which tasks wait may by
    /// then be about to start again. Refused with `ADMISSION_REJECT` where `how`
    /// wants an idle pool and tasks run or wait, where the pool is pinned and its
    /// memory is wanted for another, while an engine is loaded for tasks that wait or
    /// a reload is under way, and for a pool that is drained or stopped.
    pub async fn unload(&self, how: Unload, why: UnloadCause) -> Result<(), Failure> {
        self.request(Request::Unload(how, why)).await
    }

    async fn request(&self, request: Request) -> Result<(), Failure> {
        self.ask(|reply| Command::Request(request, reply), COMMAND_LIMIT)
            .await?
    }

    /// Nobody is left to be asked.
    fn gone(&self) -> Failure {
        let leaving = self.snapshot.borrow().leaving;
        Failure::leaving(&self.id, leaving.unwrap_or(Leaving::DaemonEnds))
    }

    /// For ever, and for the reason `why`: refuses new tasks, ends queued ones, and returns
    /// when the running ones are over and the engine is stopped, at the latest
    /// after `limit` plus what cancelling and stopping take.
    pub async fn end(&self, why: Leaving, limit: Duration) {
        let command = |reply| Command::ShutDown(why, limit, reply);
        let _ = self.ask(command, limit + STOP_LIMIT).await;
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
        limit: Duration,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let command = command(reply);
        let asked = async {
            self.commands.send(command).await.ok()?;
            answer.await.ok()
        };
        match tokio::time::timeout(limit, asked).await {
            Ok(Some(answer)) => Ok(answer),
            Ok(None) => Err(self.gone()),
            Err(_) => Err(Failure::internal(format!(
                "pool {} did not answer within {} s",
                self.id,
                limit.as_secs()
            ))),
        }
    }
}
