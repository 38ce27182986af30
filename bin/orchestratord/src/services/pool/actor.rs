//! The one owner of a pool's queue and running tasks.
//!
//! Commands come in, decisions are made here and nowhere else, and the result
//! is published. Nothing in here waits for the engine: a running task is a
//! future of its own in a [`JoinSet`], and its end is one more thing to handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, ProvisionedContext, TaskId};
use metrics::{counter, gauge, histogram};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{CancelReport, FinishReason};

use super::{Cancelled, Change, Command, Phase, PoolSettings, PoolSnapshot, Submission};
use crate::services::admission::{AdmissionQueue, Entry, Priority};
use crate::services::dispatch::{Finished, Outcome, TaskRun, receipt};
use crate::services::estimates::{Outlook, ServiceTimes};
use crate::services::event_log::{End, Failure, TaskEvent};
use crate::services::preparation::PreparationBoard;
use crate::services::tasks::{Admitted, TaskRecord};
use crate::services::telemetry;

/// How long no task is taken to an engine that was not there. An engine that
/// has ended is noticed by its supervisor long before.
const HOLD: Duration = Duration::from_millis(300);

/// How long no task is taken to an engine whose slot was not seen free after a
/// cancel: it works on a long prompt and looks up only between batches.
const BUSY_HOLD: Duration = Duration::from_secs(5);

struct Actor {
    settings: Arc<PoolSettings>,
    host: AdapterHost,
    board: Arc<PreparationBoard>,
    phase: Phase,
    since: Instant,
    last_error: Option<Failure>,
    context: Option<Arc<ProvisionedContext>>,
    queue: AdmissionQueue<Submission>,
    running: HashMap<TaskId, Running>,
    runs: JoinSet<Finished>,
    times: ServiceTimes,
    engine_exits: u64,
    /// No task is taken to the engine before.
    hold: Option<tokio::time::Instant>,
    distrust: Option<String>,
    drained: Vec<oneshot::Sender<()>>,
    publish: watch::Sender<PoolSnapshot>,
}

struct Running {
    /// The run's own id, by which it is known if it breaks.
    run: tokio::task::Id,
    record: Arc<TaskRecord>,
    cancel: CancellationToken,
    /// Who waits for the engine's slot to be free.
    waiters: Vec<oneshot::Sender<Cancelled>>,
}

pub(super) fn spawn(
    settings: Arc<PoolSettings>,
    host: AdapterHost,
    board: Arc<PreparationBoard>,
    commands: mpsc::Receiver<Command>,
) -> watch::Receiver<PoolSnapshot> {
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
        times: ServiceTimes::default(),
    });
    let actor = Actor {
        queue: AdmissionQueue::new(settings.queue_capacity, settings.batch_ageing),
        settings,
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
        drained: Vec::new(),
        publish,
    };
    // Owned by the handles: it ends with the last of them, or when drained.
    tokio::spawn(actor.run(commands));
    snapshot
}

impl Actor {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
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
            Command::Drain(..) => unreachable!("handled by the loop, which holds the deadline"),
        }
    }

    fn admit(&mut self, submission: Submission) -> Result<Admitted, Failure> {
        let record = Arc::clone(&submission.record);
        let admitted = self.refusal().map_or_else(|| self.enqueue(submission), Err);
        match &admitted {
            Ok(admitted) => {
                // Set once: a record is submitted once.
                let _ = record.admitted.set(*admitted);
                tracing::info!(
                    pool = %self.settings.id, task = %record.id, correlation_id = record.correlation_id,
                    position = admitted.queue_position, "task admitted"
                );
            }
            Err(failure) => {
                counter!(telemetry::REFUSED, "pool" => self.label(), "code" => failure.code.as_str()).increment(1);
            }
        }
        admitted
    }

    fn enqueue(&mut self, submission: Submission) -> Result<Admitted, Failure> {
        let now = Instant::now();
        let priority = submission.record.priority;
        let ahead = self.queue.ahead_of_next(priority, now);
        let predicted_start = self.until_start(ahead);
        if let Some(deadline) = submission.record.deadline
            && now + predicted_start > deadline
        {
            let within = deadline.saturating_duration_since(submission.record.created);
            return Err(Failure::deadline_unmet(within, predicted_start).in_pool(&self.settings.id));
        }
        let entry = entry_of(submission, now);
        if let Err((full, _)) = self.queue.push(entry) {
            let after = self.times.retry_after(self.outlook(full.capacity));
            return Err(Failure::queue_full(full, after).in_pool(&self.settings.id));
        }
        Ok(Admitted {
            queue_position: ahead,
            predicted_start,
            backoff: self.backoff(),
        })
    }

    /// Why no task is taken now, if none is.
    fn refusal(&self) -> Option<Failure> {
        match self.phase {
            Phase::Failed => Some(self.unavailable()),
            Phase::Draining | Phase::Stopped => Some(Failure::shutting_down(&self.settings.id)),
            Phase::Provisioning | Phase::Starting | Phase::Ready | Phase::Backoff => None,
        }
    }

    fn unavailable(&self) -> Failure {
        let last = self.last_error.clone();
        last.unwrap_or_else(|| Failure::new(ErrorCode::PoolUnavailable, "the pool has failed"))
            .in_pool(&self.settings.id)
    }

    fn cancel(&mut self, id: TaskId, reply: oneshot::Sender<Cancelled>) {
        if let Some(entry) = self.queue.remove(id) {
            end_cancelled(&entry.task.record, None);
            self.count_outcome("cancelled");
            let _ = reply.send(Cancelled::Queued);
        } else if let Some(running) = self.running.get_mut(&id) {
            // Closed before the engine is told, so no later token gets in.
            let was_open = end_cancelled(&running.record, self.context.as_deref());
            running.cancel.cancel();
            if was_open || !running.waiters.is_empty() {
                running.waiters.push(reply);
            } else {
                let _ = reply.send(Cancelled::Over);
            }
        } else {
            let _ = reply.send(Cancelled::Over);
        }
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

    fn enter(&mut self, phase: Phase) {
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

    fn cancel_all(&mut self) {
        for running in self.running.values() {
            let mut failure = Failure::shutting_down(&self.settings.id);
            failure.correlation_id = Some(running.record.correlation_id.clone());
            let _ = running
                .record
                .log
                .append(TaskEvent::Error(Box::new(failure)));
            running.cancel.cancel();
        }
    }

    fn end_queued(&mut self, failure: &Failure) {
        while let Some(entry) = self.queue.pop(Instant::now()) {
            self.end_waiting(&entry.task.record, failure.clone());
        }
    }

    /// Ends tasks that can no longer start in time.
    fn end_expired(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.queue.pop_expired(now) {
            let record = &entry.task.record;
            let waited = now.saturating_duration_since(record.created);
            let failure = Failure::deadline_passed(waited).in_pool(&self.settings.id);
            self.end_waiting(record, failure);
        }
    }

    fn end_waiting(&self, record: &TaskRecord, mut failure: Failure) {
        self.count_outcome(failure.code.as_str());
        failure.correlation_id = Some(record.correlation_id.clone());
        // Only its owner closes a queued task's log, and that is us.
        let _ = record.log.append(TaskEvent::Error(Box::new(failure)));
    }

    /// Takes tasks to the engine while it has free slots. The engine is never
    /// given more tasks than it has slots: the queue is ours.
    fn dispatch(&mut self) {
        let Some(context) = self
            .context
            .clone()
            .filter(|_| self.phase == Phase::Ready && self.distrust.is_none())
        else {
            return;
        };
        while self.hold.is_none() && self.running.len() < self.slots() as usize {
            let Some(Entry {
                serial,
                id,
                task: mut submission,
                ..
            }) = self.queue.pop(Instant::now())
            else {
                return;
            };
            submission.serial = serial;
            let cancel = CancellationToken::new();
            let record = Arc::clone(&submission.record);
            let run = TaskRun {
                host: self.host.clone(),
                context: Arc::clone(&context),
                submission,
                cancel: cancel.clone(),
            };
            let run = self.runs.spawn(run.run()).id();
            let running = Running {
                run,
                record,
                cancel,
                waiters: Vec::new(),
            };
            self.running.insert(id, running);
        }
    }

    /// A run that broke, by a fault of ours: its task ends all the same, and
    /// its slot is free again.
    fn bury(&mut self, error: &tokio::task::JoinError) {
        tracing::error!(pool = %self.settings.id, %error, "a task's run broke");
        let mut running = self.running.iter();
        let Some(id) = running.find_map(|(id, running)| (running.run == error.id()).then_some(*id))
        else {
            return;
        };
        if let Some(running) = self.running.remove(&id) {
            let mut failure = Failure::internal("the task's run broke").in_pool(&self.settings.id);
            failure.correlation_id = Some(running.record.correlation_id.clone());
            // A log that is closed keeps its ending.
            let _ = running
                .record
                .log
                .append(TaskEvent::Error(Box::new(failure)));
            self.count_outcome(ErrorCode::Internal.as_str());
        }
    }

    fn finish(&mut self, finished: Finished) {
        let Some(running) = self.running.remove(&finished.id) else {
            return;
        };
        if let Some(reason) = finished.distrust {
            tracing::warn!(pool = %self.settings.id, reason, "the engine is not trusted any more");
            self.distrust = Some(reason);
        }
        let mut outcome = finished.outcome.label();
        if let Some(submission) = finished.returned {
            if !submission.record.log.is_closed() {
                return self.take_back(*submission, finished.outcome);
            }
            // Cancelled in the meantime, and so over.
            outcome = Outcome::Cancelled.label();
        }
        self.count_outcome(outcome);
        if finished.outcome.tells_service_time() {
            self.times.record(finished.took);
        }
        histogram!(telemetry::SERVICE_TIME, "pool" => self.label()).record(finished.took);
        let report = finished.cancelled.unwrap_or(CancelReport::NotRunning);
        if let CancelReport::NotSeenFree { .. } = report {
            self.hold_for(BUSY_HOLD);
        }
        if let CancelReport::Freed { after_ms } = report {
            histogram!(telemetry::CANCEL_FREED, "pool" => self.label())
                .record(Duration::from_millis(after_ms));
        }
        for waiter in running.waiters {
            let _ = waiter.send(Cancelled::Running(report));
        }
        tracing::info!(
            pool = %self.settings.id, task = %finished.id, correlation_id = running.record.correlation_id,
            outcome, took_ms = finished.took.as_millis() as u64, "task over"
        );
    }

    /// A task that the engine could not be given keeps its turn.
    fn take_back(&mut self, submission: Submission, outcome: Outcome) {
        // An engine that answered with a fault of its own is there.
        if outcome != (Outcome::NotTaken { reset: true }) {
            self.hold_for(HOLD);
        }
        let queued = submission.record.created;
        self.queue.put_back(entry_of(submission, queued));
        match self.phase {
            Phase::Failed => self.end_queued(&self.unavailable()),
            Phase::Draining | Phase::Stopped => {
                self.end_queued(&Failure::shutting_down(&self.settings.id));
            }
            Phase::Provisioning | Phase::Starting | Phase::Ready | Phase::Backoff => {}
        }
    }

    fn hold_for(&mut self, pause: Duration) {
        let until = tokio::time::Instant::now() + pause;
        self.hold = Some(self.hold.map_or(until, |hold| hold.max(until)));
    }

    fn slots(&self) -> u32 {
        let bound = self.context.as_ref().map(|context| context.slots);
        bound.unwrap_or(self.settings.slots).max(1)
    }

    fn outlook(&self, ahead: usize) -> Outlook {
        let preparation = match self.phase {
            Phase::Ready => Duration::ZERO,
            _ => self.board.remaining(),
        };
        Outlook {
            ahead,
            running: self.running.len(),
            slots: self.slots() as usize,
            preparation,
        }
    }

    fn until_start(&self, ahead: usize) -> Duration {
        self.times.until_start(self.outlook(ahead))
    }

    fn backoff(&self) -> Duration {
        if self.queue.len() * 2 < self.queue.capacity() {
            Duration::ZERO
        } else {
            self.times.retry_after(self.outlook(self.queue.len()))
        }
    }

    fn label(&self) -> String {
        self.settings.id.to_string()
    }

    fn count_outcome(&self, outcome: &'static str) {
        counter!(telemetry::TASKS, "pool" => self.label(), "outcome" => outcome).increment(1);
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

fn entry_of(submission: Submission, queued: Instant) -> Entry<Submission> {
    Entry {
        // The queue numbers what it admits; one that is put back keeps its number.
        serial: submission.serial,
        id: submission.record.id,
        priority: submission.record.priority,
        queued,
        deadline: submission.record.deadline,
        task: submission,
    }
}

/// Closes a task's log as cancelled; says whether it was open. With the engine
/// that had the task, if one had.
fn end_cancelled(record: &TaskRecord, context: Option<&ProvisionedContext>) -> bool {
    let (_, pieces) = record.log.text();
    let since_start = record.started.get().map(Instant::elapsed);
    let end = End {
        tokens_in: record.log.tokens_in(),
        tokens_out: pieces,
        decode_time_ms: since_start.unwrap_or_default().as_secs_f64() * 1000.0,
        finish_reason: FinishReason::Cancelled,
        receipt: context.map(|context| receipt(context, None)),
    };
    record.log.append(TaskEvent::End(Box::new(end))).is_ok()
}

/// Waits until the deadline; for ever where there is none.
async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
