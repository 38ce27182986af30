//! One task's way through the engine: check that it fits, submit it, append
//! what comes back to its log.

use std::sync::Arc;
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use futures::StreamExt;
use llama_orch_types::{ErrorCode, ProvisionedContext, TaskId};
use metrics::{counter, histogram};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{CancelReport, EndSummary, TaskInput, TokenEvent, TokenStream};

use super::event_log::{End, EngineSays, Failure, Metrics, Receipt, Started, TaskEvent, Token};
use super::pool::Submission;
use super::tasks::TaskRecord;
use super::telemetry;

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
    /// The task itself, if the engine could not be given it.
    pub returned: Option<Box<Submission>>,
    /// Why the engine can no longer be relied on, if it cannot.
    pub distrust: Option<String>,
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
}

impl Outcome {
    pub fn label(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed(code) => code.as_str(),
            Self::NotTaken { .. } => "not_taken",
        }
    }

    /// Whether the time it took says something about tasks to come.
    pub fn tells_service_time(self) -> bool {
        matches!(self, Self::Completed)
    }
}

enum Pumped {
    Ended,
    Cancelled(Option<CancelReport>),
    Failed(Failure),
    NotTaken(Failure),
}

impl TaskRun {
    pub async fn run(mut self) -> Finished {
        let begun = Instant::now();
        let id = self.submission.record.id;
        let pumped = match self.open().await {
            Ok(stream) => self.pump(stream).await,
            Err(ended) => ended,
        };
        let mut returned = None;
        let mut distrust = None;
        let (outcome, cancelled) = match pumped {
            Pumped::Ended => (Outcome::Completed, None),
            Pumped::Cancelled(report) => (Outcome::Cancelled, report),
            Pumped::Failed(failure) => {
                if failure.code == ErrorCode::DecodeTimeout {
                    distrust = Some(failure.message.clone());
                }
                (Outcome::Failed(self.close_with(failure)), None)
            }
            Pumped::NotTaken(_) if self.cancel.is_cancelled() => (Outcome::Cancelled, None),
            Pumped::NotTaken(failure) => {
                self.submission.attempts += match failure.code {
                    ErrorCode::WorkerReset => RESET_ATTEMPTS,
                    _ => 1,
                };
                if self.submission.attempts >= MAX_ATTEMPTS {
                    (Outcome::Failed(self.close_with(failure)), None)
                } else {
                    tracing::info!(task = %id, reason = failure.message, "the engine could not take the task; it is kept");
                    let again = failure.code == ErrorCode::WorkerReset;
                    returned = Some(Box::new(self.submission));
                    (Outcome::NotTaken { reset: again }, None)
                }
            }
        };
        Finished {
            id,
            took: begun.elapsed(),
            outcome,
            cancelled,
            returned,
            distrust,
        }
    }

    /// Hands the task to the engine, unless it is refused or cancelled first.
    async fn open(&mut self) -> Result<TokenStream, Pumped> {
        if !self.submission.fits {
            let fits = fit(&self.host, &self.context, &mut self.submission);
            tokio::select! {
                // Nothing is in the engine's slot yet.
                () = self.cancel.cancelled() => return Err(Pumped::Cancelled(Some(CancelReport::NotRunning))),
                fits = fits => fits.map_err(not_begun)?,
            }
        }
        let submit = self
            .host
            .submit(&self.context.pool_id, self.submission.task.clone());
        let mut submit = std::pin::pin!(submit);
        tokio::select! {
            biased;
            submitted = &mut submit => {
                submitted.map_err(|error| not_begun(Failure::from_host(&error)))
            }
            () = self.cancel.cancelled() => {
                // Waited for together, since only going on with the submission
                // closes its connection to the engine.
                let cancel = self.host.cancel(&self.context.pool_id, self.submission.record.id);
                let (report, _) = tokio::join!(cancel, submit);
                Err(Pumped::Cancelled(report.ok()))
            }
        }
    }

    async fn pump(&self, mut stream: TokenStream) -> Pumped {
        loop {
            let event = tokio::select! {
                biased;
                () = self.cancel.cancelled() => return Pumped::Cancelled(self.free_slot(stream).await),
                event = stream.next() => event,
            };
            let kept = match event {
                Some(Ok(TokenEvent::End(summary))) => return self.end(&summary),
                Some(Ok(event)) => self.append(event),
                Some(Err(error)) => return Pumped::Failed(Failure::from_worker(&error)),
                None => {
                    return Pumped::Failed(Failure::internal(
                        "the engine's stream ended without an end",
                    ));
                }
            };
            if !kept {
                // Somebody closed the log: whoever did also cancels us.
                return Pumped::Cancelled(self.free_slot(stream).await);
            }
        }
    }

    /// Appends an event that is not the last; says whether the log took it.
    fn append(&self, event: TokenEvent) -> bool {
        let record = &self.submission.record;
        let event = match event {
            TokenEvent::Started => {
                let _ = record.started.set(Instant::now());
                histogram!(telemetry::QUEUE_WAIT, "pool" => self.pool_label())
                    .record(record.created.elapsed());
                TaskEvent::Started(started(record))
            }
            TokenEvent::Token { text, index } => {
                if index == 0 {
                    histogram!(telemetry::FIRST_TOKEN, "pool" => self.pool_label())
                        .record(record.created.elapsed());
                }
                TaskEvent::Token(Token { t: text, i: index })
            }
            TokenEvent::Metrics(figures) => TaskEvent::Metrics(Metrics {
                tokens_in: figures.tokens_in,
                tokens_out: figures.tokens_out,
                elapsed_ms: figures.elapsed_ms,
            }),
            TokenEvent::End(_) => unreachable!("the pump handles the end"),
        };
        record.log.append(event).is_ok()
    }

    fn end(&self, summary: &EndSummary) -> Pumped {
        counter!(telemetry::TOKENS_IN, "pool" => self.pool_label()).increment(summary.tokens_in);
        counter!(telemetry::TOKENS_OUT, "pool" => self.pool_label()).increment(summary.tokens_out);
        let end = End {
            tokens_in: Some(summary.tokens_in),
            tokens_out: summary.tokens_out,
            decode_time_ms: summary.decode_time_ms,
            finish_reason: summary.finish_reason,
            receipt: Some(receipt(&self.context, Some(summary))),
        };
        match self
            .submission
            .record
            .log
            .append(TaskEvent::End(Box::new(end)))
        {
            Ok(()) => Pumped::Ended,
            Err(_) => Pumped::Cancelled(None),
        }
    }

    /// Waits until the engine's slot is free. The stream has to be read
    /// meanwhile, since reading it is what closes its connection.
    async fn free_slot(&self, mut stream: TokenStream) -> Option<CancelReport> {
        let drain = async { while stream.next().await.is_some_and(|event| event.is_ok()) {} };
        let cancel = self
            .host
            .cancel(&self.context.pool_id, self.submission.record.id);
        let (report, ()) = tokio::join!(cancel, drain);
        match report {
            Ok(report) => Some(report),
            Err(error) => {
                tracing::warn!(task = %self.submission.record.id, %error, "the engine could not be asked to cancel");
                None
            }
        }
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

    fn pool_label(&self) -> String {
        self.context.pool_id.to_string()
    }
}

/// A failure before the engine had begun: if the engine was not there, as it
/// is when it has just ended, the task can wait for the next one.
fn not_begun(failure: Failure) -> Pumped {
    match failure.code {
        ErrorCode::PoolUnready | ErrorCode::PoolUnavailable | ErrorCode::WorkerReset => {
            Pumped::NotTaken(failure)
        }
        _ => Pumped::Failed(failure),
    }
}

fn started(record: &TaskRecord) -> Started {
    // A task runs only after it was admitted.
    let admitted = record.admitted.get();
    Started {
        queue_position: admitted.map_or(0, |admitted| admitted.queue_position as u32),
        predicted_start_ms: admitted
            .map_or(0, |admitted| admitted.predicted_start.as_millis() as u64),
        waited_ms: record.created.elapsed().as_millis() as u64,
    }
}

/// What answered; with the engine's own words where it came to them.
pub fn receipt(context: &ProvisionedContext, summary: Option<&EndSummary>) -> Receipt {
    let model = context.model.as_ref();
    Receipt {
        engine: context.engine.to_string(),
        engine_version: context.engine_version.clone(),
        engine_digest: context.engine_digest.map(|digest| digest.to_string()),
        provisioning_mode: context.provisioning_mode.to_string(),
        model: model.map(|model| model.id.clone()),
        model_digest: model.map(|model| model.digest.to_string()),
        engine_says: summary.map(|summary| EngineSays {
            tokens_cached: summary.tokens_cached,
            prompt_time_ms: summary.prompt_time_ms,
            effective: summary.effective.clone(),
        }),
    }
}

/// Makes sure that prompt and answer fit the context. Counting costs a call to
/// the engine, so it is done only where the text's length leaves a doubt.
pub async fn fit(
    host: &AdapterHost,
    context: &ProvisionedContext,
    submission: &mut Submission,
) -> Result<(), Failure> {
    let task = &mut submission.task;
    let model = context.model.as_ref();
    let template = model.and_then(|model| model.chat_template.as_deref());
    if certainly_fits(&task.input, template, task.max_tokens, context.ctx) {
        submission.fits = true;
        return Ok(());
    }
    let prompt = host
        .count_tokens(&context.pool_id, &task.input)
        .await
        .map_err(|error| Failure::from_host(&error))?;
    let room = context.ctx.saturating_sub(prompt);
    if room == 0 {
        return Err(Failure::context_exceeded(prompt, None, context.ctx).in_pool(&context.pool_id));
    }
    if task.max_tokens > room {
        if submission.max_tokens_given {
            let failure = Failure::context_exceeded(prompt, Some(task.max_tokens), context.ctx);
            return Err(failure.in_pool(&context.pool_id));
        }
        task.max_tokens = room;
    }
    submission.fits = true;
    Ok(())
}

/// A token of text is at least one byte long, so few bytes are few tokens. What
/// a chat template adds is bounded by its own length, once for the whole and a
/// few tokens for each message; an unknown template bounds nothing.
fn certainly_fits(input: &TaskInput, template: Option<&str>, max_tokens: u32, ctx: u32) -> bool {
    const AROUND_PROMPT: usize = 4;
    const PER_MESSAGE: usize = 16;
    let added = match (input, template) {
        (TaskInput::Prompt(_), _) => AROUND_PROMPT,
        (TaskInput::Messages(messages), Some(template)) => {
            template.len() + PER_MESSAGE * messages.len()
        }
        (TaskInput::Messages(_), None) => return false,
    };
    input.len_bytes() + added + max_tokens as usize <= ctx as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_text_shorter_than_the_room_is_known_to_fit() {
        let prompt = |bytes: usize| TaskInput::Prompt("x".repeat(bytes));
        assert!(certainly_fits(&prompt(100), None, 100, 1000));
        assert!(!certainly_fits(&prompt(950), None, 100, 1000));
        let chat = TaskInput::Messages(Vec::new());
        assert!(certainly_fits(&chat, Some("{{ messages }}"), 900, 1000));
        assert!(!certainly_fits(&chat, Some("{{ messages }}"), 990, 1000));
        assert!(!certainly_fits(&chat, None, 1, 1000), "an unknown template");
    }
}
