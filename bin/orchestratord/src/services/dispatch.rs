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

use super::event_log::{End, Failure, Metrics, Receipt, Started, TaskEvent, Token};
use super::pool::Submission;
use super::tasks::TaskRecord;
use super::telemetry;

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
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Completed,
    Cancelled,
    Failed(ErrorCode),
}

impl Outcome {
    pub fn label(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed(code) => code.as_str(),
        }
    }

    /// Whether the time it took says something about tasks to come.
    pub fn tells_service_time(self) -> bool {
        matches!(self, Self::Completed | Self::Cancelled)
    }
}

enum Pumped {
    Ended,
    Cancelled(Option<CancelReport>),
    Failed(Failure),
}

impl TaskRun {
    pub async fn run(mut self) -> Finished {
        let begun = Instant::now();
        let id = self.submission.record.id;
        let pumped = match self.open().await {
            Ok(stream) => self.pump(stream).await,
            Err(ended) => ended,
        };
        let (outcome, cancelled) = match pumped {
            Pumped::Ended => (Outcome::Completed, None),
            Pumped::Cancelled(report) => (Outcome::Cancelled, report),
            Pumped::Failed(failure) => (Outcome::Failed(self.close_with(failure)), None),
        };
        Finished {
            id,
            took: begun.elapsed(),
            outcome,
            cancelled,
        }
    }

    /// Hands the task to the engine, unless it is refused or cancelled first.
    async fn open(&mut self) -> Result<TokenStream, Pumped> {
        if !self.submission.fits {
            let fits = fit(&self.host, &self.context, &mut self.submission);
            tokio::select! {
                // Nothing is in the engine's slot yet.
                () = self.cancel.cancelled() => return Err(Pumped::Cancelled(Some(CancelReport::NotRunning))),
                fits = fits => fits.map_err(Pumped::Failed)?,
            }
        }
        let submit = self
            .host
            .submit(&self.context.pool_id, self.submission.task.clone());
        let mut submit = std::pin::pin!(submit);
        tokio::select! {
            biased;
            submitted = &mut submit => {
                submitted.map_err(|error| Pumped::Failed(Failure::from_host(&error)))
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
            tokens_in: summary.tokens_in,
            tokens_out: summary.tokens_out,
            decode_time_ms: summary.decode_time_ms,
            finish_reason: summary.finish_reason,
            receipt: Some(Box::new(receipt(&self.context, summary))),
        };
        match self.submission.record.log.append(TaskEvent::End(end)) {
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
            %code, message = failure.message, "task failed"
        );
        let _ = record.log.append(TaskEvent::Error(failure));
        code
    }

    fn pool_label(&self) -> String {
        self.context.pool_id.to_string()
    }
}

fn started(record: &TaskRecord) -> Started {
    // A task runs only after it was admitted.
    let admitted = record.admitted.get();
    Started {
        queue_position: admitted.map_or(0, |admitted| admitted.queue_position as u32),
        predicted_start_ms: admitted
            .map_or(0, |admitted| admitted.predicted_start.as_millis() as u64),
    }
}

fn receipt(context: &ProvisionedContext, summary: &EndSummary) -> Receipt {
    let model = context.model.as_ref();
    Receipt {
        engine: context.engine.to_string(),
        engine_version: context.engine_version.clone(),
        engine_digest: context.engine_digest.map(|digest| digest.to_string()),
        provisioning_mode: context.provisioning_mode.to_string(),
        model: model.map(|model| model.id.clone()),
        model_digest: model.map(|model| model.digest.to_string()),
        tokens_cached: summary.tokens_cached,
        prompt_time_ms: summary.prompt_time_ms,
        effective: summary.effective.clone(),
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
    if certainly_fits(&task.input, task.max_tokens, context.ctx) {
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

/// A token of text is at least one byte long, so few bytes are few tokens. A
/// chat template adds tokens of its own for every message: a bound on those
/// is part of the sum.
fn certainly_fits(input: &TaskInput, max_tokens: u32, ctx: u32) -> bool {
    const TEMPLATE: usize = 256;
    const PER_MESSAGE: usize = 16;
    let template = match input {
        TaskInput::Prompt(_) => 4,
        TaskInput::Messages(messages) => TEMPLATE + PER_MESSAGE * messages.len(),
    };
    input.len_bytes() + template + max_tokens as usize <= ctx as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_text_shorter_than_the_room_is_known_to_fit() {
        let prompt = |bytes: usize| TaskInput::Prompt("x".repeat(bytes));
        assert!(certainly_fits(&prompt(100), 100, 1000));
        assert!(!certainly_fits(&prompt(950), 100, 1000));
        assert!(!certainly_fits(&TaskInput::Messages(Vec::new()), 900, 1000));
    }
}
