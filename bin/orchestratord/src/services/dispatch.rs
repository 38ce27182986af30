//! One task's way through the engine: check that it fits, submit it, append
//! what comes back to its log.

mod fit;
mod trouble;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use futures::StreamExt;
use llama_orch_types::{ErrorCode, ProvisionedContext, TaskId};
use metrics::{counter, histogram};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{
    CallChunk, CancelReport, EndSummary, FinishReason, TokenEvent, TokenStream, WorkerAdapter,
    WorkerError,
};

pub use self::fit::fit;
use self::fit::make_fit;
use self::trouble::{Silence, Trouble};
use super::event_log::{
    Answer, Chunk, End, EngineSays, Failure, Metrics, Receipt, Started, TaskEvent, Token,
};
use super::pool::Submission;
use super::resume::{Loss, Seen};
use super::tasks::TaskRecord;
use super::telemetry;

/// How often a task is offered to an engine that counts as ready and yet
/// cannot be reached, before the task fails.
const MAX_ATTEMPTS: u32 = 10;

/// What it counts for if the engine ended over the task before it had begun to
/// answer. The second time it fails: the task itself may be what ends engines.
const RESET_ATTEMPTS: u32 = MAX_ATTEMPTS / 2;

/// How long the slot of a cancelled task is held at the most. Its engine has been
/// ended long before, unless others run on it.
const HELD_AT_MOST: Duration = Duration::from_mins(30);

/// Between two waits for such a slot, each of which has bounds of its own.
const HELD_PAUSE: Duration = Duration::from_millis(200);

/// How many events go to the log before the readers have their turn.
const AT_ONCE: u32 = 128;

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
    pub seen: Seen,
    /// Pieces of text of a call's answer so far.
    pub pieces: u64,
}

/// A cancelled task whose slot was not seen free in time. Its run goes on waiting,
/// and so the slot is given to no other task.
#[derive(Debug, Clone, Copy)]
pub struct NotFreed {
    pub id: TaskId,
    pub waited_ms: u64,
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
            Self::Completed => "completed",
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

enum Pumped {
    Ended,
    Cancelled(Option<CancelReport>),
    Failed(Trouble),
    NotTaken(Trouble),
    /// Asked to give the task back.
    GivenBack,
}

/// Why no more events are taken.
enum Stopped {
    /// The slot has to be seen free.
    Cancelled,
    By(Pumped),
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
        counter!(telemetry::RESUMED, "pool" => self.pool_label()).increment(1);
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

    /// Takes the engine's events to the log as they come: all that are there at a
    /// time, then the readers have their turn.
    async fn pump(&mut self, mut stream: TokenStream) -> Pumped {
        let (cancel, give_back) = (self.cancel.clone(), self.give_back.clone());
        // Made once: a token is no reason to make them anew.
        let mut cancelled = std::pin::pin!(cancel.cancelled());
        let mut given_back = std::pin::pin!(give_back.cancelled());
        let stopped = std::future::poll_fn(|context| {
            if cancelled.as_mut().poll(context).is_ready() {
                return Poll::Ready(Stopped::Cancelled);
            }
            if given_back.as_mut().poll(context).is_ready() {
                return Poll::Ready(Stopped::By(Pumped::GivenBack));
            }
            self.poll_events(&mut stream, context)
        });
        match stopped.await {
            Stopped::By(pumped) => pumped,
            Stopped::Cancelled => Pumped::Cancelled(self.free_slot(stream).await),
        }
    }

    /// Appends what is there, at most [`AT_ONCE`] events.
    fn poll_events(
        &mut self,
        stream: &mut TokenStream,
        context: &mut Context<'_>,
    ) -> Poll<Stopped> {
        let mut now = None;
        for _ in 0..AT_ONCE {
            let event = ready!(stream.poll_next_unpin(context));
            let kept = match event {
                Some(Ok(TokenEvent::End(summary))) => {
                    return Poll::Ready(Stopped::By(self.end(&summary)));
                }
                // What is there together came together.
                Some(Ok(event)) => self.append(event, *now.get_or_insert_with(Instant::now)),
                Some(Err(error)) => {
                    return Poll::Ready(Stopped::By(Pumped::Failed((&error).into())));
                }
                None => {
                    let failure = Failure::internal("the engine's stream ended without an end");
                    return Poll::Ready(Stopped::By(Pumped::Failed(failure.into())));
                }
            };
            if !kept {
                // Somebody closed the log: whoever did also cancels us.
                return Poll::Ready(Stopped::Cancelled);
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Appends an event that is not the last; says whether the log took it.
    fn append(&mut self, event: TokenEvent, now: Instant) -> bool {
        let event = match event {
            TokenEvent::Started => {
                let record = &self.submission.record;
                if record.started.set(now).is_err() {
                    // It has begun on an engine before, and that was said.
                    return !record.log.is_closed();
                }
                histogram!(telemetry::QUEUE_WAIT, "pool" => self.pool_label())
                    .record(record.created.elapsed());
                TaskEvent::Started(started(record))
            }
            TokenEvent::Token {
                text,
                index,
                tokens_in,
                tokens_out,
            } => {
                self.note_answering();
                if tokens_in > 0 {
                    // The first engine's count is the prompt's own. Some tell it only
                    // at the end.
                    let _ = self.submission.record.tokens_in.set(tokens_in);
                }
                let index = self.submission.carried.pieces + index;
                if index == 0 {
                    self.note_first_token();
                }
                self.seen.saw(tokens_out, now);
                TaskEvent::Token(Token { t: text, i: index })
            }
            TokenEvent::Chunk(chunk) => {
                self.note_answering();
                self.seen.saw(chunk.tokens_out, now);
                TaskEvent::Chunk(self.chunk(chunk))
            }
            TokenEvent::Answer(answer) => {
                self.note_answering();
                // Handed out: no other engine may answer once more.
                self.seen.saw(0, now);
                TaskEvent::Answer(Box::new(Answer {
                    body: answer.body,
                    token: Token {
                        t: answer.text.into(),
                        i: 0,
                    },
                }))
            }
            TokenEvent::Metrics(figures) => {
                let (record, carried) = (&self.submission.record, &self.submission.carried);
                TaskEvent::Metrics(Metrics {
                    tokens_in: *record.tokens_in.get_or_init(|| figures.tokens_in),
                    tokens_out: carried.tokens_out + figures.tokens_out,
                    elapsed_ms: millis(record.started.get().map(Instant::elapsed)),
                })
            }
            TokenEvent::End(_) => unreachable!("the pump handles the end"),
        };
        self.submission.record.log.append(event).is_ok()
    }

    /// One event of a call's answer. Only those with text count as pieces.
    fn chunk(&mut self, chunk: CallChunk) -> Chunk {
        let index = self.pieces;
        if !chunk.text.is_empty() {
            if index == 0 {
                self.note_first_token();
            }
            self.pieces += 1;
        }
        Chunk {
            name: chunk.name,
            data: chunk.data,
            token: Token {
                t: chunk.text,
                i: index,
            },
        }
    }

    /// Something of the answer is handed out. From now on it is one replica's.
    fn note_answering(&self) {
        let record = &self.submission.record;
        if record.is_answering() {
            return;
        }
        record.set_answering();
        if let Some(replica) = self.host.replica_of(&self.context.pool_id, record.id) {
            // It begins once.
            let _ = record.replica.set(replica);
        }
    }

    fn note_first_token(&self) {
        histogram!(telemetry::FIRST_TOKEN, "pool" => self.pool_label())
            .record(self.submission.record.created.elapsed());
    }

    fn end(&self, summary: &EndSummary) -> Pumped {
        let (record, carried) = (&self.submission.record, &self.submission.carried);
        let end = End {
            tokens_in: Some(*record.tokens_in.get_or_init(|| summary.tokens_in)),
            tokens_out: carried.tokens_out + summary.tokens_out,
            decode_time_ms: carried.decode.as_secs_f64() * 1000.0 + summary.decode_time_ms,
            finish_reason: summary.finish_reason,
            resumed: carried.resets,
            receipt: Some(receipt(&self.context, record, Some(summary))),
        };
        self.close_complete(end)
    }

    /// Ends a task that lost its engine after its last token.
    fn end_complete(&self) -> Pumped {
        let (record, carried) = (&self.submission.record, &self.submission.carried);
        self.close_complete(End {
            tokens_in: record.tokens_in.get().copied(),
            tokens_out: carried.tokens_out,
            decode_time_ms: carried.decode.as_secs_f64() * 1000.0,
            finish_reason: FinishReason::Length,
            resumed: carried.resets,
            receipt: Some(receipt(&self.context, record, None)),
        })
    }

    fn close_complete(&self, end: End) -> Pumped {
        let tokens_in = end.tokens_in.unwrap_or_default();
        counter!(telemetry::TOKENS_IN, "pool" => self.pool_label()).increment(tokens_in);
        counter!(telemetry::TOKENS_OUT, "pool" => self.pool_label()).increment(end.tokens_out);
        let log = &self.submission.record.log;
        match log.append(TaskEvent::End(Box::new(end))) {
            Ok(()) => Pumped::Ended,
            Err(_) => Pumped::Cancelled(None),
        }
    }

    /// Waits until the engine's slot is free. The stream has to be read
    /// meanwhile, since reading it is what closes its connection.
    async fn free_slot(&self, mut stream: TokenStream) -> Option<CancelReport> {
        let drain = async { while stream.next().await.is_some_and(|event| event.is_ok()) {} };
        let (report, ()) = tokio::join!(self.free(), drain);
        report
    }

    async fn free(&self) -> Option<CancelReport> {
        let id = self.submission.record.id;
        // Found now, since the host forgets the task with its stream.
        let Some(adapter) = self.host.adapter_of(&self.context.pool_id, id) else {
            return Some(CancelReport::NotRunning);
        };
        match self.wait_until_freed(adapter.as_ref()).await {
            Ok(report) => Some(report),
            Err(error) => {
                tracing::warn!(task = %id, %error, "the engine could not be asked to cancel");
                None
            }
        }
    }

    /// Waits on where the slot is not seen free: it is held until it is, or its
    /// engine is gone.
    async fn wait_until_freed(
        &self,
        adapter: &dyn WorkerAdapter,
    ) -> Result<CancelReport, WorkerError> {
        let (id, begun) = (self.submission.record.id, Instant::now());
        let mut told = false;
        loop {
            let report = adapter.cancel(id).await?;
            let CancelReport::NotSeenFree { waited_ms } = report else {
                return Ok(report);
            };
            if begun.elapsed() > HELD_AT_MOST {
                return Ok(report);
            }
            if !told {
                told = true;
                tracing::warn!(task = %id, waited_ms, "a cancelled task's slot is not seen free");
                // Fails only when the pool is gone.
                let _ = self.not_freed.send(NotFreed { id, waited_ms }).await;
            }
            tokio::time::sleep(HELD_PAUSE).await;
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
fn not_begun(trouble: Trouble) -> Pumped {
    match trouble.failure.code {
        ErrorCode::PoolUnready | ErrorCode::PoolUnavailable | ErrorCode::WorkerReset => {
            Pumped::NotTaken(trouble)
        }
        _ => Pumped::Failed(trouble),
    }
}

fn millis(time: Option<Duration>) -> u64 {
    time.unwrap_or_default().as_millis() as u64
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
