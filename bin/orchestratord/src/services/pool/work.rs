//! What the pool's actor does with tasks: takes them in, takes them to the
//! engine, ends them. Its loop and the engine's life are in [`super::actor`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use llama_orch_types::{EngineKind, ErrorCode, ProvisionedContext, TaskId};
use metrics::{counter, histogram};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{CancelReport, FinishReason};

use super::actor::Actor;
use super::lifecycle::Drain;
use super::{Cancelled, Escalation, Submission, TaskMeters};
use crate::services::admission::Entry;
use crate::services::dispatch::{Finished, NotFreed, Outcome, TaskRun, receipt};
use crate::services::estimates::Outlook;
use crate::services::event_log::{End, Failure, TaskEvent};
use crate::services::resume::Seen;
use crate::services::tasks::{Admitted, TaskRecord};
use crate::services::telemetry;

/// How long no task is taken to an engine that was not there. An engine that
/// has ended is noticed by its supervisor long before.
const HOLD: Duration = Duration::from_millis(300);

/// How long no task is taken to an engine whose slot was not seen free after a
/// cancel: it works on a long prompt and looks up only between batches.
const BUSY_HOLD: Duration = Duration::from_secs(5);

pub(super) struct Running {
    /// The run's own id, by which it is known if it breaks.
    run: tokio::task::Id,
    record: Arc<TaskRecord>,
    /// The engine that has it: not always the one that is bound now.
    context: Arc<ProvisionedContext>,
    cancel: CancellationToken,
    give_back: CancellationToken,
    /// It was cancelled, and its slot was not seen free in time.
    stuck: bool,
    escalated: Option<Escalation>,
    /// Who waits for the engine's slot to be free.
    waiters: Vec<oneshot::Sender<Cancelled>>,
}

impl Running {
    pub(super) fn is_on(&self, context: &Arc<ProvisionedContext>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    /// What whoever waits for the cancel is told while the slot is held.
    fn held(&self) -> Cancelled {
        Cancelled::Running {
            report: CancelReport::NotSeenFree { waited_ms: 0 },
            escalated: self.escalated,
        }
    }

    /// Whether another engine can go on with it, or begin it anew without anybody
    /// seeing it.
    fn can_move(&self) -> bool {
        self.record.resumes || !self.record.is_answering()
    }
}

impl Actor {
    pub(super) fn admit(&mut self, submission: Submission) -> Result<Admitted, Failure> {
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

    pub(super) fn enqueue(&mut self, submission: Submission) -> Result<Admitted, Failure> {
        let now = Instant::now();
        let (priority, client) = (submission.record.priority, &submission.record.client);
        let ahead = self.queue.ahead_of_next(priority, client, now);
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

    /// Ends a task wherever it is; answers when its slot is seen free.
    pub(super) fn cancel(&mut self, id: TaskId, reply: oneshot::Sender<Cancelled>) {
        if let Some(entry) = self.queue.remove(id) {
            end_cancelled(&entry.task.record, None);
            self.count_outcome("cancelled");
            let _ = reply.send(Cancelled::Queued);
        } else if let Some(running) = self.running.get_mut(&id) {
            // Closed before the engine is told, so no later token gets in.
            end_cancelled(&running.record, Some(&running.context));
            running.cancel.cancel();
            if !running.record.is_cancelled() {
                // It had another ending before.
                let _ = reply.send(Cancelled::Over);
            } else if running.escalated == Some(Escalation::Waiting) {
                // As those were told who asked before.
                let _ = reply.send(running.held());
            } else {
                running.waiters.push(reply);
            }
        } else {
            let _ = reply.send(Cancelled::Over);
        }
    }

    /// Ends the running tasks that `which` chooses. Where another engine comes,
    /// those that it can begin or go on with are given back instead.
    pub(super) fn end_running(&mut self, which: impl Fn(&Running) -> bool) {
        let failure = self.ends_for();
        let another_comes = matches!(self.lifecycle.drain(), None | Some(Drain::Reload));
        for running in self.running.values().filter(|running| which(running)) {
            if another_comes && running.can_move() {
                running.give_back.cancel();
                continue;
            }
            let mut failure = failure.clone();
            failure.correlation_id = Some(running.record.correlation_id.clone());
            let _ = running
                .record
                .log
                .append(TaskEvent::Error(Box::new(failure)));
            running.cancel.cancel();
        }
    }

    /// How many tasks run on the engine that is bound now. One that was
    /// replaced has slots of its own.
    pub(super) fn running_here(&self) -> usize {
        let Some(context) = &self.context else {
            return 0;
        };
        let here = self.running.values();
        here.filter(|running| running.is_on(context)).count()
    }

    pub(super) fn end_queued(&mut self, failure: &Failure) {
        while let Some(entry) = self.queue.pop(Instant::now()) {
            self.end_waiting(&entry.task.record, failure.clone());
        }
    }

    /// Ends tasks that can no longer start in time.
    pub(super) fn end_expired(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.queue.pop_expired(now) {
            let record = &entry.task.record;
            let waited = now.saturating_duration_since(record.created);
            let failure = Failure::deadline_passed(waited).in_pool(&self.settings.id);
            self.end_waiting(record, failure);
        }
    }

    pub(super) fn end_waiting(&self, record: &TaskRecord, mut failure: Failure) {
        self.count_outcome(failure.code.as_str());
        failure.correlation_id = Some(record.correlation_id.clone());
        // Only its owner closes a queued task's log, and that is us.
        let _ = record.log.append(TaskEvent::Error(Box::new(failure)));
    }

    /// Takes tasks to the engine while it has free slots. The engine is never
    /// given more tasks than it has slots: the queue is ours.
    pub(super) fn dispatch(&mut self) {
        let Some(context) = self
            .context
            .clone()
            .filter(|_| self.lifecycle.runs_tasks() && self.distrust.is_none())
        else {
            return;
        };
        while self.hold.is_none() && self.running_here() < self.slots() as usize {
            let Some(Entry {
                place,
                id,
                task: mut submission,
                ..
            }) = self.queue.pop(Instant::now())
            else {
                return;
            };
            submission.place = place;
            let (cancel, give_back) = (CancellationToken::new(), CancellationToken::new());
            let record = Arc::clone(&submission.record);
            let run = TaskRun {
                host: self.host.clone(),
                context: Arc::clone(&context),
                submission,
                cancel: cancel.clone(),
                give_back: give_back.clone(),
                not_freed: self.not_freed.clone(),
                meters: Arc::clone(&self.meters),
                seen: Seen::default(),
                pieces: 0,
            };
            let run = self.runs.spawn(run.run()).id();
            let running = Running {
                run,
                record,
                context: Arc::clone(&context),
                cancel,
                give_back,
                stuck: false,
                escalated: None,
                waiters: Vec::new(),
            };
            self.running.insert(id, running);
            self.dispatched += 1;
        }
    }

    /// A run that broke, by a fault of ours: its task ends all the same, and
    /// its slot is free again.
    pub(super) fn bury(&mut self, error: &tokio::task::JoinError) {
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
            for waiter in running.waiters {
                let _ = waiter.send(Cancelled::Running {
                    report: CancelReport::NotRunning,
                    escalated: running.escalated,
                });
            }
        }
        self.escalate();
    }

    pub(super) fn finish(&mut self, finished: Finished) {
        let Some(running) = self.running.remove(&finished.id) else {
            return;
        };
        // What an engine did that another has replaced says nothing of that one.
        let here = self.is_current(&running.context);
        if let Some(reason) = &finished.doubt
            && here
        {
            self.raise_doubt(reason);
        }
        if let Some(reason) = finished.distrust {
            self.distrust(&running.context, reason);
        }
        if let Some(reason) = finished.silence
            && here
        {
            // Tasks that it works on have deadlines of their own, which tell if it is
            // true.
            let works = |other: &Running| {
                other.is_on(&running.context) && other.record.started.get().is_some()
            };
            if self.running.values().any(works) {
                self.raise_doubt(&reason);
            } else {
                self.distrust(&running.context, reason);
            }
        }
        // It may have been the last beside one that is stuck.
        self.escalate();
        let mut outcome = finished.outcome.label();
        if let Some(submission) = finished.returned {
            if !submission.record.log.is_closed() {
                // An engine that answered with a fault of its own is there.
                if here && finished.outcome != (Outcome::NotTaken { reset: true }) {
                    self.hold_for(HOLD);
                }
                return self.take_back(*submission);
            }
            // Cancelled in the meantime, and so over.
            outcome = Outcome::Cancelled.label();
        }
        if finished.outcome == Outcome::Cancelled
            && let Some(TaskEvent::Error(failure)) = running.record.log.last()
        {
            // Ended by us, with its engine.
            outcome = failure.code.as_str();
        }
        self.count_outcome(outcome);
        if finished.outcome.tells_service_time() {
            self.times.record(finished.took);
        }
        self.meters.service_time.record(finished.took);
        let report = finished.cancelled.unwrap_or(CancelReport::NotRunning);
        // An engine elsewhere has a queue of its own.
        let elsewhere = running.context.engine == EngineKind::Openai;
        if let CancelReport::NotSeenFree { .. } | CancelReport::NotShown = report
            && here
            && !elsewhere
        {
            self.hold_for(BUSY_HOLD);
        }
        if let CancelReport::Freed { after_ms } = report {
            histogram!(telemetry::CANCEL_FREED, "pool" => self.label())
                .record(Duration::from_millis(after_ms));
        }
        for waiter in running.waiters {
            let _ = waiter.send(Cancelled::Running {
                report,
                escalated: running.escalated,
            });
        }
        tracing::info!(
            pool = %self.settings.id, task = %finished.id, correlation_id = running.record.correlation_id,
            outcome, took_ms = finished.took.as_millis() as u64, "task over"
        );
    }

    /// Stops giving tasks to an engine, which its supervisor then ends. One that
    /// has been replaced is ended anyway.
    fn distrust(&mut self, engine: &Arc<ProvisionedContext>, reason: String) {
        if engine.engine == EngineKind::Openai {
            // Its adapter knows which replica it was, and takes that one out.
            return;
        }
        if self.is_current(engine) && self.distrust.is_none() {
            tracing::warn!(pool = %self.settings.id, reason, "the engine is not trusted any more");
            self.distrust = Some(reason);
        }
    }

    pub(super) fn is_current(&self, engine: &Arc<ProvisionedContext>) -> bool {
        let current = self.context.as_ref();
        current.is_some_and(|current| Arc::ptr_eq(current, engine))
    }

    /// A cancelled task's slot was not seen free in time.
    pub(super) fn not_freed(&mut self, note: NotFreed) {
        let Some(running) = self.running.get_mut(&note.id) else {
            return;
        };
        running.stuck = true;
        let engine = Arc::clone(&running.context);
        let waited = note.waited_ms;
        if self.is_current(&engine) {
            self.raise_doubt(&format!(
                "the slot of a cancelled task was not seen free after {waited} ms"
            ));
        }
        self.escalate();
    }

    /// Ends an engine on which nothing runs but cancelled tasks that it does not
    /// let go of. As long as others run on it, it is left alone, and whoever waits
    /// for the cancel is told so.
    fn escalate(&mut self) {
        let Some(current) = self.context.clone() else {
            return;
        };
        let here = |running: &Running| Arc::ptr_eq(&running.context, &current);
        let mut running: Vec<&mut Running> = self.running.values_mut().collect();
        running.retain(|running| here(running));
        let others = running.iter().any(|running| !running.stuck);
        let mut ended = false;
        for stuck in running.into_iter().filter(|running| running.stuck) {
            if others {
                stuck.escalated = Some(Escalation::Waiting);
                let held = stuck.held();
                for waiter in stuck.waiters.drain(..) {
                    let _ = waiter.send(held);
                }
            } else {
                stuck.escalated = Some(Escalation::EngineRestarted);
                ended = true;
            }
        }
        if ended {
            let reason = "it did not let go of a cancelled task";
            self.distrust(&current, reason.to_owned());
        }
    }

    /// A task that the engine could not be given keeps its turn.
    fn take_back(&mut self, submission: Submission) {
        // Its deadline was to start by, and ageing counts from its admission.
        let queued = submission.record.created;
        self.queue.put_back(entry_of(submission, queued));
        if let Some(failure) = self.doom() {
            self.end_queued(&failure);
        }
    }

    pub(super) fn hold_for(&mut self, pause: Duration) {
        let until = tokio::time::Instant::now() + pause;
        self.hold = Some(self.hold.map_or(until, |hold| hold.max(until)));
    }

    pub(super) fn slots(&self) -> u32 {
        let bound = self.context.as_ref().map(|context| context.slots);
        let bound = bound.map(|slots| self.capacity.unwrap_or(slots));
        bound.unwrap_or(self.settings.slots).max(1)
    }

    pub(super) fn outlook(&self, ahead: usize) -> Outlook {
        Outlook {
            ahead,
            running: self.running_here(),
            slots: self.slots() as usize,
            preparation: self.until_ready(),
        }
    }

    pub(super) fn until_start(&self, ahead: usize) -> Duration {
        self.times.until_start(self.outlook(ahead))
    }

    pub(super) fn backoff(&self) -> Duration {
        if self.queue.len() * 2 < self.queue.capacity() {
            Duration::ZERO
        } else {
            self.times.retry_after(self.outlook(self.queue.len()))
        }
    }

    pub(super) fn count_outcome(&self, outcome: &'static str) {
        if outcome == TaskMeters::COMPLETED {
            return self.meters.completed.increment(1);
        }
        counter!(telemetry::TASKS, "pool" => self.label(), "outcome" => outcome).increment(1);
    }
}

fn entry_of(submission: Submission, queued: Instant) -> Entry<Submission> {
    Entry {
        // The queue gives what it admits a place; one that is put back keeps it.
        place: submission.place,
        id: submission.record.id,
        client: submission.record.client.clone(),
        priority: submission.record.priority,
        queued,
        // It is met once the task has started, whatever becomes of its engine.
        deadline: submission
            .record
            .deadline
            .filter(|_| submission.record.started.get().is_none()),
        task: submission,
    }
}

/// Closes a task's log as cancelled, unless it has an ending. With the engine
/// that had the task, if one had.
fn end_cancelled(record: &TaskRecord, context: Option<&ProvisionedContext>) {
    let pieces = record.log.pieces();
    let since_start = record.started.get().map(Instant::elapsed);
    let end = End {
        tokens_in: record.tokens_in.get().copied(),
        tokens_out: pieces,
        decode_time_ms: since_start.unwrap_or_default().as_secs_f64() * 1000.0,
        finish_reason: FinishReason::Cancelled,
        resumed: record.resumed.load(Ordering::Relaxed),
        receipt: context.map(|context| receipt(context, record, None)),
    };
    // A log that is closed keeps its ending.
    let _ = record.log.append(TaskEvent::End(Box::new(end)));
}
