//! The one owner of a pool's queue and running tasks.
//!
//! Commands come in, decisions are made here and nowhere else, and the result
//! is published. Nothing in here waits for the engine: a running task is a
//! future of its own in a [`JoinSet`], and its end is one more thing to handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, ProvisionedContext, TaskId};
use metrics::{counter, gauge};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::work::Running;
use super::{Change, Command, Phase, PoolSettings, PoolSnapshot, Submission};
use crate::app::current::Current;
use crate::services::admission::{AdmissionQueue, Priority};
use crate::services::dispatch::{Finished, NotFreed};
use crate::services::estimates::ServiceTimes;
use crate::services::event_log::Failure;
use crate::services::preparation::PreparationBoard;
use crate::services::telemetry;

/// Notes of runs that may wait for the actor: each run sends one at the most.
const NOTES: usize = 64;

pub(super) struct Actor {
    pub(super) settings: Arc<PoolSettings>,
    /// The same, for everybody else.
    published_settings: Arc<Current<PoolSettings>>,
    pub(super) host: AdapterHost,
    pub(super) board: Arc<PreparationBoard>,
    pub(super) phase: Phase,
    pub(super) since: Instant,
    pub(super) last_error: Option<Failure>,
    pub(super) context: Option<Arc<ProvisionedContext>>,
    pub(super) queue: AdmissionQueue<Submission>,
    pub(super) running: HashMap<TaskId, Running>,
    pub(super) runs: JoinSet<Finished>,
    pub(super) times: ServiceTimes,
    pub(super) engine_exits: u64,
    /// No task is taken to the engine before.
    pub(super) hold: Option<tokio::time::Instant>,
    pub(super) distrust: Option<String>,
    pub(super) doubt: u64,
    /// For runs: a cancelled task's slot is not seen free.
    pub(super) not_freed: mpsc::Sender<NotFreed>,
    pub(super) drained: Vec<oneshot::Sender<()>>,
    pub(super) publish: watch::Sender<PoolSnapshot>,
}

pub(super) fn spawn(
    published_settings: Arc<Current<PoolSettings>>,
    host: AdapterHost,
    board: Arc<PreparationBoard>,
    commands: mpsc::Receiver<Command>,
) -> watch::Receiver<PoolSnapshot> {
    let settings = published_settings.get();
    let (publish, snapshot) = watch::channel(PoolSnapshot {
        phase: Phase::Provisioning,
        since: Instant::now(),
        last_error: None,
        context: None,
        queued_interactive: 0,
        queued_batch: 0,
        running: 0,
        slots: settings.slots,
        engine_exits: 0,
        distrust: None,
        doubt: 0,
        times: ServiceTimes::default(),
    });
    let (not_freed, notes) = mpsc::channel(NOTES);
    let actor = Actor {
        queue: AdmissionQueue::new(settings.queue_capacity, settings.batch_ageing),
        settings,
        published_settings,
        host,
        board,
        phase: Phase::Provisioning,
        since: Instant::now(),
        last_error: None,
        context: None,
        running: HashMap::new(),
        runs: JoinSet::new(),
        times: ServiceTimes::default(),
        engine_exits: 0,
        hold: None,
        distrust: None,
        doubt: 0,
        not_freed,
        drained: Vec::new(),
        publish,
    };
    // Owned by the handles: it ends with the last of them, or when drained.
    tokio::spawn(actor.run(commands, notes));
    snapshot
}

impl Actor {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut notes: mpsc::Receiver<NotFreed>,
    ) {
        let mut drain_deadline = None;
        while self.phase != Phase::Stopped {
            self.end_expired();
            self.dispatch();
            self.publish();
            let next_deadline = self.queue.next_deadline().map(Into::into);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Drain(limit, reply)) => {
                        drain_deadline.get_or_insert(tokio::time::Instant::now() + limit);
                        self.begin_drain(reply);
                    }
                    Some(command) => self.handle(command),
                    None => break,
                },
                Some(note) = notes.recv() => self.not_freed(note),
                Some(finished) = self.runs.join_next() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => self.bury(&error),
                },
                () = at(next_deadline), if next_deadline.is_some() => {}
                () = at(self.hold), if self.hold.is_some() => self.hold = None,
                () = at(drain_deadline), if drain_deadline.is_some() => {
                    drain_deadline = None;
                    self.cancel_all();
                }
            }
            if self.phase == Phase::Draining && self.runs.is_empty() {
                self.enter(Phase::Stopped);
            }
        }
        self.publish();
        for reply in self.drained {
            let _ = reply.send(());
        }
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Submit(submission, reply) => {
                let admitted = self.admit(*submission);
                let _ = reply.send(admitted);
            }
            Command::Cancel(id, reply) => self.cancel(id, reply),
            Command::Position(id, reply) => {
                let position = self.queue.position(id, Instant::now());
                let _ = reply.send(position.map(|ahead| (ahead, self.until_start(ahead))));
            }
            Command::Change(change) => self.change(change),
            Command::Settings(settings, reply) => {
                self.queue
                    .set_limits(settings.queue_capacity, settings.batch_ageing);
                self.published_settings.set(settings);
                self.settings = self.published_settings.get();
                let _ = reply.send(());
            }
            Command::Drain(..) => unreachable!("handled by the loop, which holds the deadline"),
        }
    }

    pub(super) fn refusal(&self) -> Option<Failure> {
        match self.phase {
            Phase::Failed => Some(self.unavailable()),
            Phase::Draining | Phase::Stopped => Some(Failure::shutting_down(&self.settings.id)),
            Phase::Provisioning | Phase::Starting | Phase::Ready | Phase::Backoff => None,
        }
    }

    pub(super) fn unavailable(&self) -> Failure {
        let last = self.last_error.clone();
        last.unwrap_or_else(|| Failure::new(ErrorCode::PoolUnavailable, "the pool has failed"))
            .in_pool(&self.settings.id)
    }

    fn change(&mut self, change: Change) {
        if matches!(self.phase, Phase::Draining | Phase::Stopped) {
            return;
        }
        match change {
            Change::Provisioning => self.enter(Phase::Provisioning),
            Change::Starting => self.enter(Phase::Starting),
            Change::Ready(context) => {
                self.context = Some(context);
                self.hold = None;
                self.distrust = None;
                self.enter(Phase::Ready);
            }
            Change::Backoff(failure) => {
                self.count_exit();
                self.lose_engine(failure);
                self.enter(Phase::Backoff);
            }
            Change::Failed { failure, exited } => {
                if exited {
                    self.count_exit();
                }
                self.lose_engine(failure);
                self.enter(Phase::Failed);
                self.end_queued(&self.unavailable());
            }
        }
    }

    fn count_exit(&mut self) {
        self.engine_exits += 1;
        counter!(telemetry::ENGINE_EXITS, "pool" => self.label()).increment(1);
    }

    fn lose_engine(&mut self, failure: Failure) {
        self.context = None;
        self.distrust = None;
        self.last_error = Some(failure);
    }

    /// Takes note that the engine may not be sound.
    pub(super) fn raise_doubt(&mut self, reason: &str) {
        tracing::warn!(pool = %self.settings.id, reason, "the engine may not be sound");
        self.doubt += 1;
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        if self.phase != phase {
            let cause = match phase {
                Phase::Backoff | Phase::Failed => self.last_error.as_ref(),
                _ => None,
            };
            let cause = cause.map(|error| error.message.as_str());
            let (pool, from, to) = (&self.settings.id, self.phase.as_str(), phase.as_str());
            tracing::info!(%pool, from, to, cause, "pool phase");
            self.phase = phase;
            self.since = Instant::now();
        }
    }

    fn begin_drain(&mut self, reply: oneshot::Sender<()>) {
        self.enter(Phase::Draining);
        self.end_queued(&Failure::shutting_down(&self.settings.id));
        self.drained.push(reply);
    }

    pub(super) fn label(&self) -> String {
        self.settings.id.to_string()
    }

    fn publish(&self) {
        let snapshot = PoolSnapshot {
            phase: self.phase,
            since: self.since,
            last_error: self.last_error.clone(),
            context: self.context.clone(),
            queued_interactive: self.queue.len_of(Priority::Interactive),
            queued_batch: self.queue.len_of(Priority::Batch),
            running: self.running.len(),
            slots: self.slots(),
            engine_exits: self.engine_exits,
            distrust: self.distrust.clone(),
            doubt: self.doubt,
            times: self.times,
        };
        for priority in [Priority::Interactive, Priority::Batch] {
            gauge!(telemetry::QUEUED, "pool" => self.label(), "priority" => priority.as_str())
                .set(self.queue.len_of(priority) as f64);
        }
        gauge!(telemetry::RUNNING, "pool" => self.label()).set(self.running.len() as f64);
        gauge!(telemetry::SLOTS, "pool" => self.label()).set(f64::from(snapshot.slots));
        gauge!(telemetry::READY, "pool" => self.label())
            .set(f64::from(u8::from(self.phase == Phase::Ready)));
        self.publish.send_replace(snapshot);
    }
}

/// Waits until the deadline; for ever where there is none.
async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
