//! One task's way through the engine: check that it fits, submit it, append
//! what comes back to its log.

mod fit;
mod pump;
mod slot;
mod trouble;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, ProvisionedContext, TaskId};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{CancelReport, EndSummary, TokenStream};

pub use self::fit::fit;
use self::fit::make_fit;
use self::pump::Pumped;
pub use self::slot::NotFreed;
use self::trouble::{Silence, Trouble};
use super::event_log::{EngineSays, Failure, Receipt, TaskEvent};
use super::pool::{Submission, TaskMeters};
use super::resume::{Loss, Seen};
use super::tasks::TaskRecord;

/// How often a task is offered to an engine that counts as ready and yet
/// cannot be reached, before the task fails.
const MAX_ATTEMPTS: u32 = 10;

/// What it counts for if the engine ended over the task before it had begun to
/// answer. The second time it fails: the task itself may be what ends engines.
const RESET_ATTEMPTS: u32 = MAX_ATTEMPTS / 2;

/// Everything one run needs. It owns the engine's stream and is the only one
/// that appends tokens to the task's log.
#[derive(Debug)]
pub struct TaskRun {
    pub host: AdapterHost,
    pub context: Arc<ProvisionedContext>,
    pub submission: Submission,
    pub cancel: CancellationToken,
    /// The engine is to end, and another goes on with the task.
    pub give_back: CancellationToken,
    /// Where the pool is told that a cancelled task's slot is not seen free.
    pub not_freed: mpsc::Sender<NotFreed>,
    pub meters: Arc<TaskMeters>,
    pub seen: Seen,
    /// Pieces of text of a call's answer so far.
    pub pieces: u64,
}

/// What the pool learns of a run that is over.
#[derive(Debug)]
pub struct Finished {
    pub id: TaskId,
    /// From dispatch to the end.
    pub took: Duration,
    pub outcome: Outcome,
    /// What was seen of the engine's slot, if the task was cancelled.
    pub cancelled: Option<CancelReport>,
    /// The task itself, if the engine could not be given it, or was lost over it
    /// and the task is gone on with.
    pub returned: Option<Box<Submission>>,
    /// Why the engine can no longer be relied on, if it cannot.
    pub distrust: Option<String>,
    /// Why it cannot, if nothing else that it does shows that it can.
    pub silence: Option<String>,
    /// Why the engine may not be sound, if it was to blame for a failure.
    pub doubt: Option<String>,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    Cancelled,
    Failed(ErrorCode),
    /// The engine was not there to take it, or ended over it; the task has not
    /// begun.
    NotTaken {
        reset: bool,
    },
    /// The engine was lost in mid-stream; the task is gone on with on the next.
    Lost,
}

impl Outcome {
    pub fn label(self) -> &'static str {
        match self {
            Self::Completed => TaskMeters::COMPLETED,
            Self::Cancelled => "cancelled",
            Self::Failed(code) => code.as_str(),
            Self::NotTaken { .. } => "not_taken",
            Self::Lost => "lost",
        }
    }

    /// Whether the time it took says something about tasks to come.
    pub fn tells_service_time(self) -> bool {
        matches!(self, Self::Completed)
    }
}

impl TaskRun {
    pub async fn run(mut self) -> Finished {
        let begun = Instant::now();
        let id = self.submission.record.id;
        let pumped = match self.open().await {
            Ok(stream) => self.pump(stream).await,
            Err(ended) => ended,
        };
        let mut finished = Finished {
            id,
            took: begun.elapsed(),
            outcome: Outcome::Cancelled,
            cancelled: None,
            returned: None,
            distrust: None,
            silence: None,
            doubt: None,
        };
        match pumped {
            Pumped::Ended => finished.outcome = Outcome::Completed,
            Pumped::Cancelled(report) => finished.cancelled = report,
            Pumped::NotTaken(_) | Pumped::GivenBack if self.cancel.is_cancelled() => {}
            Pumped::GivenBack => self.given_back(&mut finished),
            Pumped::Failed(trouble) => {
                let why = trouble.silence.map(|_| trouble.failure.message.clone());
                match trouble.silence {
                    Some(Silence::Tokens) => finished.distrust = why,
                    Some(Silence::Answer) => finished.silence = why,
                    None => {}
                }
                finished.doubt = trouble.doubt();
                self.lost(trouble.failure, Loss::Failed, &mut finished);
            }
            Pumped::NotTaken(trouble) => {
                finished.doubt = trouble.doubt();
                let silence = trouble.silence.map(|_| trouble.failure.message.clone());
                self.not_taken(trouble.failure, &mut finished);
                if matches!(finished.outcome, Outcome::Failed(_)) {
                    // Tried often enough to mean something.
                    finished.silence = silence;
                }
            }
        }
        finished
    }

    /// The task lost its engine: the end, unless the next one may go on.
    fn lost(mut self, failure: Failure, loss: Loss, finished: &mut Finished) {
        let engine_lost = matches!(
            failure.code,
            ErrorCode::WorkerReset | ErrorCode::DecodeTimeout
        );
        let record = Arc::clone(&self.submission.record);
        let resumes = record.resumes
            && engine_lost
            && self.submission.carried.may_resume(loss)
            && !self.cancel.is_cancelled();
        if !resumes {
            finished.outcome = Outcome::Failed(self.close_with(failure));
            return;
        }
        self.submission.go_on_after(self.seen, loss);
        let resets = self.submission.carried.resets;
        record.resumed.store(resets, Ordering::Relaxed);
        self.meters.resumed.increment(1);
        tracing::warn!(
            pool = %record.pool, task = %record.id, correlation_id = record.correlation_id,
            reason = failure.message, pieces = self.submission.carried.pieces,
            "the engine was lost in mid-stream; the task is gone on with"
        );
        if self.submission.task.max_tokens == 0 {
            // All tokens had come, and only the word that they were all had not.
            finished.outcome = match self.end_complete() {
                Pumped::Ended => Outcome::Completed,
                _ => Outcome::Cancelled,
            };
            return;
        }
        finished.outcome = Outcome::Lost;
        finished.returned = Some(Box::new(self.submission));
    }

    /// The engine is to end: a task that it has sent nothing of waits for the next.
    fn given_back(self, finished: &mut Finished) {
        if self.seen.pieces > 0 {
            let failure = Failure::engine_replaced(&self.submission.record.pool);
            return self.lost(failure, Loss::Replaced, finished);
        }
        finished.outcome = Outcome::NotTaken { reset: true };
        finished.returned = Some(Box::new(self.submission));
    }

    fn not_taken(mut self, failure: Failure, finished: &mut Finished) {
        let reset = failure.code == ErrorCode::WorkerReset;
        self.submission.attempts += if reset { RESET_ATTEMPTS } else { 1 };
        if self.submission.attempts >= MAX_ATTEMPTS {
            finished.outcome = Outcome::Failed(self.close_with(failure));
            return;
        }
        tracing::info!(task = %finished.id, reason = failure.message, "the engine could not take the task; it is kept");
        finished.outcome = Outcome::NotTaken { reset };
        finished.returned = Some(Box::new(self.submission));
    }

    /// Hands the task to the engine, unless it is refused or cancelled first.
    async fn open(&mut self) -> Result<TokenStream, Pumped> {
        if !self.submission.fits {
            let fits = make_fit(&self.host, &self.context, &mut self.submission);
            tokio::select! {
                // Nothing is in the engine's slot yet.
                () = self.cancel.cancelled() => return Err(Pumped::Cancelled(Some(CancelReport::NotRunning))),
                () = self.give_back.cancelled() => return Err(Pumped::GivenBack),
                fits = fits => fits.map_err(not_begun)?,
            }
        }
        self.check_in_time()?;
        let submit = self.host.submit_to(
            &self.context,
            self.submission.task.clone(),
            &self.submission.record.correlation_id,
        );
        let mut submit = std::pin::pin!(submit);
        tokio::select! {
            biased;
            submitted = &mut submit => {
                submitted.map_err(|error| not_begun((&error).into()))
            }
            () = self.cancel.cancelled() => {
                // Waited for together, since only going on with the submission
                // closes its connection to the engine.
                let (report, _) = tokio::join!(self.free(), submit);
                Err(Pumped::Cancelled(report))
            }
            // Dropping the submission closes its connection. Its slot is of no
            // more use to anybody.
            () = self.give_back.cancelled() => Err(Pumped::GivenBack),
        }
    }

    /// Counting the prompt may have taken longer than the task could wait.
    fn check_in_time(&self) -> Result<(), Pumped> {
        let record = &self.submission.record;
        let late = record.deadline.is_some_and(|by| by < Instant::now());
        if late && record.started.get().is_none() {
            let failure = Failure::deadline_passed(record.created.elapsed());
            return Err(Pumped::Failed(failure.into()));
        }
        Ok(())
    }

    /// Closes the log with a failure and gives its code back. A log that was
    /// closed already keeps its first ending.
    fn close_with(&self, mut failure: Failure) -> ErrorCode {
        let record = &self.submission.record;
        let code = failure.code;
        failure.pool_id = Some(record.pool.to_string());
        failure.engine = Some(self.context.engine.to_string());
        failure.correlation_id = Some(record.correlation_id.clone());
        tracing::warn!(
            pool = %record.pool, task = %record.id, correlation_id = record.correlation_id,
            %code, reason = failure.message, "task failed"
        );
        let _ = record.log.append(TaskEvent::Error(Box::new(failure)));
        code
    }
}

/// A failure before the engine had begun: if the engine was not there, as it
/// is when it has just ended, the task can wait for the next one.
fn not_begun(trouble: Trouble) -> Pumped {
    match trouble.failure.code {
        ErrorCode::PoolUnready | ErrorCode::PoolUnavailable | ErrorCode::WorkerReset => {
            Pumped::NotTaken(trouble)
        }
        _ => Pumped::Failed(trouble),
    }
}

/// What answered; with the engine's own words where it came to them.
pub fn receipt(
    context: &ProvisionedContext,
    record: &TaskRecord,
    summary: Option<&EndSummary>,
) -> Receipt {
    let model = context.model.as_ref();
    Receipt {
        engine: context.engine.to_string(),
        engine_version: context.engine_version.clone(),
        engine_digest: context.engine_digest.map(|digest| digest.to_string()),
        provisioning_mode: context.provisioning_mode.to_string(),
        replica: record.replica.get().map(ToString::to_string),
        model: model.map(|model| model.id.clone()),
        model_digest: model.map(|model| model.digest.to_string()),
        engine_says: summary.map(|summary| EngineSays {
            tokens_cached: summary.tokens_cached,
            prompt_time_ms: summary.prompt_time_ms,
            effective: summary.effective.clone(),
        }),
    }
}
