//! One task's stream, from the request to its last event.
//!
//! ```text
//! Opening ──► Reading ──► Closed     (last event)
//!    └───────────┴──────► Closed     (error, timeout, cancel)
//! ```
//!
//! The engine sends its headers when it begins with the prompt, or (older
//! builds) only with the first token. `Opening` may therefore last through the
//! whole prompt, and the task counts as taken when the engine has not refused
//! it for a moment. Whatever closes the stream drops the response, and the
//! engine sees its client gone.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use futures::Stream;
use tokio::time::{Instant, timeout};
use worker_adapters_adapter_api::{MetricsSnapshot, TokenEvent, TokenStream, WorkerError};

use crate::client::EngineClient;
use crate::deadlines::PromptSpeed;
use crate::incoming::Incoming;
use crate::live::LiveTask;
use crate::patience::Patience;
use crate::tagging::Tagging;
use crate::wire::Chunk;

/// The engine takes or refuses a request within a few milliseconds; one that it
/// has not refused in this time, it has taken. Longer than all tries to reach
/// an engine together, so that one that is not there is never taken for one
/// that works.
pub(crate) const ACCEPT_WINDOW: Duration = Duration::from_secs(1);

pub(crate) type Opening = Pin<Box<dyn Future<Output = Result<Incoming, WorkerError>> + Send>>;

#[allow(
    clippy::large_enum_variant,
    reason = "one for each task, on the heap, and large for as long as the task reads"
)]
enum State {
    Opening(Opening),
    Reading(Incoming),
    Closed,
}

/// No token is longer; an engine that sends more text than its tokens can hold is
/// not one, and must not fill our memory.
const LONGEST_TOKEN: u64 = 4096;

/// What is asked of the engine, and what is known before it answers.
pub(crate) struct Work {
    pub(crate) body: Bytes,
    /// A guess, until the engine has counted.
    pub(crate) prompt_tokens: u64,
    pub(crate) max_tokens: u32,
    pub(crate) tagging: Option<Tagging>,
    pub(crate) speed: Arc<PromptSpeed>,
}

/// A task on its way.
pub(crate) struct Completion {
    client: Arc<EngineClient>,
    /// Gone as soon as the task is over, before its last event is handed out.
    live: Option<LiveTask>,
    state: State,
    /// What is handed out before anything is read on.
    ready: VecDeque<TokenEvent>,
    /// When the engine was last heard of.
    now: Instant,
    next_index: u64,
    text_bytes: u64,
    patience: Patience,
    max_tokens: u64,
    tagging: Option<Tagging>,
    speed: Arc<PromptSpeed>,
    metrics_told: Instant,
}

impl Completion {
    /// Sends the request.
    pub(crate) fn start(client: Arc<EngineClient>, live: LiveTask, work: Work) -> Self {
        let opening: Opening = {
            let (client, body) = (Arc::clone(&client), work.body);
            Box::pin(async move { client.open_completion(body).await })
        };
        let patience = Patience::new(
            &client.settings,
            Arc::clone(&work.speed),
            work.prompt_tokens,
            &live.handle,
        );
        Self {
            client,
            live: Some(live),
            state: State::Opening(opening),
            ready: VecDeque::new(),
            next_index: 0,
            text_bytes: 0,
            now: patience.started(),
            metrics_told: patience.started(),
            patience,
            max_tokens: u64::from(work.max_tokens),
            tagging: work.tagging,
            speed: work.speed,
        }
    }

    /// Waits until the engine has taken the task, or says why it has not.
    pub(crate) async fn accepted(&mut self) -> Result<(), WorkerError> {
        // Time over means that the engine works on the prompt.
        let step = timeout(ACCEPT_WINDOW, poll_fn(|context| self.poll_step(context)));
        if let Ok(event) = step.await
            && let Some(event) = event?
        {
            self.ready.push_front(event);
        }
        self.ready.push_front(TokenEvent::Started);
        Ok(())
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(self)
    }

    fn cancelled(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.handle.is_cancelled())
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.ready.clear();
        self.live = None;
        error
    }

    /// One step: the response's headers, or one event and what it gives first.
    fn poll_step(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Result<Option<TokenEvent>, WorkerError>> {
        let Some(live) = &self.live else {
            return Poll::Ready(Ok(None));
        };
        match &mut self.state {
            State::Opening(opening) => {
                if let Poll::Ready(incoming) = opening.as_mut().poll(context) {
                    self.state = State::Reading(incoming?);
                    live.handle.set_taken();
                    return Poll::Ready(Ok(None));
                }
            }
            State::Reading(incoming) => {
                if let Poll::Ready(event) = incoming.poll_event(context) {
                    // Whoever reads the stream may have slept within what one read brought.
                    if incoming.take_has_read() || self.patience.is_due() {
                        self.now = Instant::now();
                    }
                    let event = event.unwrap_or_else(|| Err(ended_early()))?;
                    return Poll::Ready(self.take(&event.data));
                }
            }
            State::Closed => return Poll::Ready(Ok(None)),
        }
        self.patience.poll_over(live, context).map(Err)
    }

    /// What one event gives; where that is more than one, the rest is in `ready`.
    fn take(&mut self, data: &ByteString) -> Result<Option<TokenEvent>, WorkerError> {
        let Some(live) = &self.live else {
            return Ok(None);
        };
        let mut chunk: Chunk<'_> =
            serde_json::from_str(data).map_err(|error| WorkerError::Protocol {
                what: format!("an event that cannot be read: {error}"),
            })?;
        let now = self.now;
        self.patience.note_event(now, &live.handle);
        if let Some(progress) = chunk.prompt_progress.filter(|_| !chunk.stop) {
            // No token, whatever else it holds.
            live.handle.set_telling();
            live.handle.set_prompt_left(progress.left());
            self.patience.hear_of_prompt(now, progress);
            return Ok(None);
        }
        let context = chunk
            .tokens_evaluated
            .saturating_add(chunk.tokens_predicted);
        self.patience
            .hear_streamed_token(now, context, &live.handle);
        let token = self.token(data, &mut chunk)?;
        if let Some(error) = chunk.error {
            return Err(error.into_worker_error(self.client.url()));
        }
        if chunk.stop {
            self.take_last(&chunk)?;
            return Ok(token);
        }
        if now - self.metrics_told >= self.client.settings.metrics_interval {
            self.metrics_told = now;
            self.ready.push_back(TokenEvent::Metrics(MetricsSnapshot {
                tokens_in: chunk.tokens_evaluated,
                tokens_out: chunk.tokens_predicted,
                elapsed_ms: (now - self.patience.started()).as_millis() as u64,
            }));
        }
        Ok(token)
    }

    /// The token that an event's text is, if it has any.
    fn token(
        &mut self,
        data: &ByteString,
        chunk: &mut Chunk<'_>,
    ) -> Result<Option<TokenEvent>, WorkerError> {
        let content = std::mem::take(&mut chunk.content);
        if content.is_empty() {
            return Ok(None);
        }
        self.text_bytes += content.len() as u64;
        // The last event may hold a piece that was held back, so one more.
        let pieces = self.max_tokens + 1;
        if self.next_index >= pieces || self.text_bytes > pieces * LONGEST_TOKEN {
            return Err(WorkerError::Protocol {
                what: format!("more text than {} tokens hold", self.max_tokens),
            });
        }
        let index = self.next_index;
        self.next_index += 1;
        Ok(Some(TokenEvent::Token {
            text: part_of(data, content),
            index,
            tokens_in: chunk.tokens_evaluated,
            tokens_out: chunk.tokens_predicted,
        }))
    }

    fn take_last(&mut self, chunk: &Chunk<'_>) -> Result<(), WorkerError> {
        let mut summary = chunk.summary()?;
        if let Some(tagging) = &self.tagging {
            tagging.take_from(&mut summary);
        }
        if let Some((tokens, ms)) = chunk.prompt_work() {
            self.speed.record(tokens, ms);
        }
        self.ready.push_back(TokenEvent::End(summary));
        self.live = None;
        self.state = State::Closed;
        Ok(())
    }
}

impl Stream for Completion {
    type Item = Result<TokenEvent, WorkerError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            if this.cancelled() {
                return Poll::Ready(Some(Err(this.close(WorkerError::Cancelled))));
            }
            if let Some(event) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if matches!(this.state, State::Closed) {
                return Poll::Ready(None);
            }
            match std::task::ready!(this.poll_step(context)) {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(this.close(error)))),
            }
        }
    }
}

/// A text out of an event's data: a part of it, unless it was written with escapes.
pub(crate) fn part_of(data: &ByteString, text: Cow<'_, str>) -> ByteString {
    match text {
        Cow::Borrowed(text) => data.slice_ref(text),
        Cow::Owned(text) => text.into(),
    }
}

pub(crate) fn ended_early() -> WorkerError {
    WorkerError::Reset {
        reason: "the response ended before its last event".to_owned(),
    }
}
