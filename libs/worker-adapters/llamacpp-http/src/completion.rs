//! A completion in the engine's native API: what its events give.

use std::borrow::Cow;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use bytestring::ByteString;
use tokio::time::Instant;
use worker_adapters_adapter_api::{MetricsSnapshot, TokenEvent, WorkerError};

use crate::answer_stream::{AnswerKind, AnswerStream, Given, InFlight, State};
use crate::client::EngineClient;
use crate::deadlines::PromptSpeed;
use crate::live::LiveTask;
use crate::patience::Patience;
use crate::sse::SseEvent;
use crate::tagging::Tagging;
use crate::wire::Chunk;

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

/// What a completion has given so far.
pub(crate) struct Completion {
    client: Arc<EngineClient>,
    next_index: u64,
    text_bytes: u64,
    max_tokens: u64,
    tagging: Option<Tagging>,
    speed: Arc<PromptSpeed>,
    metrics_told: Instant,
}

impl Completion {
    /// Sends the request.
    pub(crate) fn start(
        client: Arc<EngineClient>,
        live: LiveTask,
        work: Work,
    ) -> AnswerStream<Self> {
        let opening = {
            let (client, body) = (Arc::clone(&client), work.body);
            Box::pin(async move { client.open_completion(body).await })
        };
        let patience = Patience::new(
            &client.settings,
            Arc::clone(&work.speed),
            work.prompt_tokens,
            &live.handle,
        );
        let completion = Self {
            client,
            next_index: 0,
            text_bytes: 0,
            max_tokens: u64::from(work.max_tokens),
            tagging: work.tagging,
            speed: work.speed,
            metrics_told: patience.started(),
        };
        AnswerStream::new(State::Opening(opening), live, patience, completion)
    }

    /// The token that an event's text is, if it has any.
    fn token(&mut self, data: &ByteString, chunk: &mut Chunk<'_>) -> Given {
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

    fn take_last(&self, task: &mut InFlight, chunk: &Chunk<'_>) -> Result<(), WorkerError> {
        let mut summary = chunk.summary()?;
        if let Some(tagging) = &self.tagging {
            tagging.take_from(&mut summary);
        }
        if let Some((tokens, ms)) = chunk.prompt_work() {
            self.speed.record(tokens, ms);
        }
        task.end(summary);
        Ok(())
    }
}

impl AnswerKind for Completion {
    type Waiting = Infallible;

    /// One in a slot tells of its prompt at once; one that tells nothing may be queued.
    const IN_SLOT_IF_NOT_REFUSED: bool = false;

    fn take(&mut self, task: &mut InFlight, event: SseEvent) -> Given {
        let data = &event.data;
        let mut chunk: Chunk<'_> =
            serde_json::from_str(data).map_err(|error| WorkerError::Protocol {
                what: format!("an event that cannot be read: {error}"),
            })?;
        if let Some(progress) = chunk.prompt_progress.filter(|_| !chunk.stop) {
            // No token, whatever else it holds.
            task.hear_of_prompt(progress);
            return Ok(None);
        }
        let now = task.now;
        let context = chunk
            .tokens_evaluated
            .saturating_add(chunk.tokens_predicted);
        task.patience
            .hear_streamed_token(now, context, &task.handle);
        let token = self.token(data, &mut chunk)?;
        if let Some(error) = chunk.error {
            return Err(error.into_worker_error(self.client.url()));
        }
        if chunk.stop {
            self.take_last(task, &chunk)?;
            return Ok(token);
        }
        if now - self.metrics_told >= self.client.settings.metrics_interval {
            self.metrics_told = now;
            task.ready.push_back(TokenEvent::Metrics(MetricsSnapshot {
                tokens_in: chunk.tokens_evaluated,
                tokens_out: chunk.tokens_predicted,
                elapsed_ms: (now - task.patience.started()).as_millis() as u64,
            }));
        }
        Ok(token)
    }

    fn poll_answer(
        &mut self,
        never: &mut Infallible,
        _: &mut InFlight,
        _: &mut Context<'_>,
    ) -> Poll<Given> {
        match *never {}
    }
}

/// A text out of an event's data: a part of it, unless it was written with escapes.
pub(crate) fn part_of(data: &ByteString, text: Cow<'_, str>) -> ByteString {
    match text {
        Cow::Borrowed(text) => data.slice_ref(text),
        Cow::Owned(text) => text.into(),
    }
}
