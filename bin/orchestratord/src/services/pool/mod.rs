//! A pool: one model served by one engine, its queue, and its running tasks.
//!
//! ```text
//!              ┌──────────────────────────────────────────────┐
//!              ▼                                              │ engine exited
//!   Provisioning ──► Starting ──► Ready ──────────────────► Backoff
//!        │  ▲           │           │
//!        ▼  │ retry     ▼           ▼ shutdown
//!      Failed ◄─────────┘        Draining ──► Stopped
//! ```
//!
//! Tasks are queued in every phase but `Failed`, `Draining` and `Stopped`,
//! and go to the engine only in `Ready`. In `Failed` new tasks are refused and
//! queued ones end with the reason; in `Backoff` queued ones are kept.
//!
//! One actor owns all of it ([`actor`]). Everybody else holds a
//! [`PoolHandle`]: it sends commands with a place for the answer, and reads
//! the last published [`PoolSnapshot`].

mod actor;
#[cfg(test)]
mod tests;
mod work;

use std::sync::Arc;
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, PoolId, ProvisionedContext, TaskId};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use utoipa::ToSchema;
use worker_adapters_adapter_api::{CancelReport, EngineTask};

use super::admission::Place;
use super::estimates::ServiceTimes;
use super::event_log::{Failure, TaskEvent};
use super::preparation::PreparationBoard;
use super::resume::{Carried, Seen};
use super::tasks::{Admitted, TaskRecord};
use crate::app::config::PoolConfig;
use crate::app::current::Current;

/// How long a command may take. The actor only decides, so only a fault of
/// ours takes that long.
const COMMAND_LIMIT: Duration = Duration::from_secs(10);

/// How long the answer to a cancel may take: the adapter waits with bounds of
/// its own until the engine's slot is free.
const CANCEL_LIMIT: Duration = Duration::from_secs(30);

/// Commands that may wait for the actor before senders have to.
const COMMAND_QUEUE: usize = 256;

/// Where a pool stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The engine and the model are being provided.
    Provisioning,
    /// The engine is loading the model.
    Starting,
    /// Tasks go to the engine.
    Ready,
    /// The engine ended, or had to be ended, and will be started again.
    Backoff,
    /// The engine or the model could not be provided or started.
    Failed,
    /// The daemon is shutting down; running tasks are finishing.
    Draining,
    Stopped,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
        }
    }
}

/// What the supervisor tells the pool.
#[derive(Debug)]
pub enum Change {
    Provisioning,
    Starting,
    /// The engine is bound in the adapter host.
    Ready(Arc<ProvisionedContext>),
    Backoff(Failure),
    Failed {
        failure: Failure,
        /// An engine that was ready has ended, for the last time in a row.
        exited: bool,
    },
}

/// What a pool is made from.
#[derive(Debug, Clone)]
pub struct PoolSettings {
    pub id: PoolId,
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
    pub fn new(id: &PoolId, config: &PoolConfig) -> Self {
        Self {
            id: id.clone(),
            engine: config.engine,
            model: config.model.clone(),
            slots: config.slots,
            queue_capacity: usize::try_from(config.queue_capacity).unwrap_or(usize::MAX),
            batch_ageing: Duration::from_secs(config.batch_ageing_seconds),
            default_max_tokens: config.default_max_tokens,
        }
    }
}

/// A pool as last published.
#[derive(Debug, Clone)]
pub struct PoolSnapshot {
    pub phase: Phase,
    pub since: Instant,
    /// Why the pool failed or is backing off; the last such reason otherwise.
    pub last_error: Option<Failure>,
    /// The bound engine, in `Ready` and `Draining`.
    pub context: Option<Arc<ProvisionedContext>>,
    pub queued_interactive: usize,
    pub queued_batch: usize,
    pub running: usize,
    pub slots: u32,
    /// Engines that ended without being asked to, or had to be ended.
    pub engine_exits: u64,
    /// Why the engine is not given tasks although it runs: it gave no token in
    /// time. Its supervisor ends it.
    pub distrust: Option<String>,
    /// Counts up whenever a task failed by the engine's own fault.
    pub doubt: u64,
    pub times: ServiceTimes,
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
    pub fn go_on_after(&mut self, seen: Seen) {
        self.carried = self.carried.after(seen);
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

enum Command {
    Submit(Box<Submission>, oneshot::Sender<Result<Admitted, Failure>>),
    Cancel(TaskId, oneshot::Sender<Cancelled>),
    Position(TaskId, oneshot::Sender<Option<(usize, Duration)>>),
    Change(Change),
    Drain(Duration, oneshot::Sender<()>),
    /// Other limits for the queue and for tasks to come.
    Settings(PoolSettings, oneshot::Sender<()>),
}

/// The way to a pool's actor. Cheap to clone.
#[derive(Debug, Clone)]
pub struct PoolHandle {
    /// Set by the actor alone.
    settings: Arc<Current<PoolSettings>>,
    commands: mpsc::Sender<Command>,
    snapshot: watch::Receiver<PoolSnapshot>,
    board: Arc<PreparationBoard>,
}

impl PoolHandle {
    /// Starts the pool's actor. It ends when it has been drained, or when all
    /// handles are gone.
    pub fn start(settings: PoolSettings, host: AdapterHost, board: Arc<PreparationBoard>) -> Self {
        let settings = Arc::new(Current::new(settings));
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let snapshot = actor::spawn(Arc::clone(&settings), host, Arc::clone(&board), receiver);
        Self {
            settings,
            commands,
            snapshot,
            board,
        }
    }

    pub fn settings(&self) -> Arc<PoolSettings> {
        self.settings.get()
    }

    /// Takes over the settings that a running engine does not notice: the
    /// queue's limits and the default for `max_tokens`.
    pub async fn apply(&self, config: PoolConfig) -> Result<(), Failure> {
        let settings = PoolSettings::new(&self.settings().id, &config);
        self.ask(|reply| Command::Settings(settings, reply), COMMAND_LIMIT)
            .await
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
        let gone = || Failure::shutting_down(&self.settings().id);
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

    /// For the supervisor. Fails only when the actor is gone, in which case
    /// nobody is left to be told.
    pub async fn change(&self, change: Change) {
        let _ = self.commands.send(Command::Change(change)).await;
    }

    /// Refuses new tasks, ends queued ones, and returns when the running ones
    /// are over, at the latest after `limit` plus what cancelling them takes.
    pub async fn drain(&self, limit: Duration) {
        let _ = self
            .ask(|reply| Command::Drain(limit, reply), limit + CANCEL_LIMIT)
            .await;
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
            Ok(None) => Err(Failure::shutting_down(&self.settings().id)),
            Err(_) => Err(Failure::internal(format!(
                "pool {} did not answer within {} s",
                self.settings().id,
                limit.as_secs()
            ))),
        }
    }
}
