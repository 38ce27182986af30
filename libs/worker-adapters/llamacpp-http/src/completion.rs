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

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use reqwest::Response;
use tokio::time::{Instant, timeout};
use worker_adapters_adapter_api::{MetricsSnapshot, TokenEvent, TokenStream, WorkerError};

use crate::client::{EngineClient, chain};
use crate::deadlines::PromptSpeed;
use crate::live::LiveTask;
use crate::patience::Patience;
use crate::sse::{SseError, SseLimits, event_data};
use crate::tagging::Tagging;
use crate::wire::Chunk;

/// The engine takes or refuses a request within a few milliseconds; one that it
/// has not refused in this time, it has taken. Longer than all tries to reach
/// an engine together, so that one that is not there is never taken for one
/// that works.
pub(crate) const ACCEPT_WINDOW: Duration = Duration::from_secs(1);

pub(crate) type Opening = Pin<Box<dyn Future<Output = Result<Response, WorkerError>> + Send>>;
type Events = Pin<Box<dyn Stream<Item = Result<String, SseError<reqwest::Error>>> + Send>>;

enum State {
    Opening(Opening),
    Reading(Events),
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
    ready: VecDeque<TokenEvent>,
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
            ready: VecDeque::from([TokenEvent::Started]),
            next_index: 0,
            text_bytes: 0,
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
        timeout(ACCEPT_WINDOW, self.advance())
            .await
            .unwrap_or(Ok(()))
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(stream::unfold(self, |mut completion| async {
            let item = completion.next().await?;
            Some((item, completion))
        }))
    }

    async fn next(&mut self) -> Option<Result<TokenEvent, WorkerError>> {
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            if self.cancelled() {
                return Some(Err(self.close(WorkerError::Cancelled)));
            }
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            match &mut self.state {
                State::Closed => return None,
                State::Opening(_) | State::Reading(_) => {
                    if let Err(error) = self.advance().await {
                        return Some(Err(self.close(error)));
                    }
                }
            }
        }
    }

    fn cancelled(&self) -> bool {
        self.live
            .as_ref()
            .is_some_and(|live| live.handle.cancel.is_cancelled())
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.ready.clear();
        self.live = None;
        error
    }

    /// One step: the response's headers, or one event. May be dropped and
    /// called again without losing anything.
    async fn advance(&mut self) -> Result<(), WorkerError> {
        loop {
            let Some(live) = &self.live else {
                return Ok(());
            };
            let limit = self.patience.limit(live);
            let cancel = &live.handle.cancel;
            match &mut self.state {
                State::Opening(opening) => {
                    let Some(response) = limit.apply(cancel, opening).await? else {
                        continue;
                    };
                    let response = response?;
                    live.handle.set_taken();
                    let bytes = response.bytes_stream();
                    self.state = State::Reading(Box::pin(event_data(bytes, SseLimits::default())));
                    return Ok(());
                }
                State::Reading(events) => {
                    let Some(event) = limit.apply(cancel, events.next()).await? else {
                        continue;
                    };
                    return match event {
                        Some(Ok(data)) => self.take(&data),
                        Some(Err(error)) => Err(broken(error)),
                        None => Err(WorkerError::Reset {
                            reason: "the response ended before its last event".to_owned(),
                        }),
                    };
                }
                State::Closed => return Ok(()),
            }
        }
    }

    fn take(&mut self, data: &str) -> Result<(), WorkerError> {
        let chunk: Chunk<'_> =
            serde_json::from_str(data).map_err(|error| WorkerError::Protocol {
                what: format!("an event that cannot be read: {error}"),
            })?;
        let now = Instant::now();
        if let Some(live) = &self.live {
            live.handle.note_gap(self.patience.waited(now));
        }
        if let Some(progress) = chunk.prompt_progress.filter(|_| !chunk.stop) {
            // No token, whatever else it holds.
            if let Some(live) = &self.live {
                live.handle.set_telling();
                live.handle.set_prompt_left(progress.left());
            }
            self.patience.hear_of_prompt(now, progress);
            return Ok(());
        }
        let context = chunk.tokens_evaluated + chunk.tokens_predicted;
        self.patience.hear_token(now, context);
        if let Some(live) = &self.live {
            live.handle.set_decoding();
        }
        self.take_text(&chunk)?;
        if let Some(error) = chunk.error {
            return Err(error.into_worker_error(self.client.url()));
        }
        if chunk.stop {
            return self.take_last(&chunk);
        }
        if now - self.metrics_told >= self.client.settings.metrics_interval {
            self.metrics_told = now;
            self.ready.push_back(TokenEvent::Metrics(MetricsSnapshot {
                tokens_in: chunk.tokens_evaluated,
                tokens_out: chunk.tokens_predicted,
                elapsed_ms: (now - self.patience.started()).as_millis() as u64,
            }));
        }
        Ok(())
    }

    fn take_text(&mut self, chunk: &Chunk<'_>) -> Result<(), WorkerError> {
        if chunk.content.is_empty() {
            return Ok(());
        }
        self.text_bytes += chunk.content.len() as u64;
        // The last event may hold a piece that was held back, so one more.
        let pieces = self.max_tokens + 1;
        if self.next_index >= pieces || self.text_bytes > pieces * LONGEST_TOKEN {
            return Err(WorkerError::Protocol {
                what: format!("more text than {} tokens hold", self.max_tokens),
            });
        }
        self.ready.push_back(TokenEvent::Token {
            text: chunk.content.clone().into_owned().into(),
            index: self.next_index,
            tokens_in: chunk.tokens_evaluated,
            tokens_out: chunk.tokens_predicted,
        });
        self.next_index += 1;
        Ok(())
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

/// What a stream of events that cannot be read on means.
pub(crate) fn broken(error: SseError<reqwest::Error>) -> WorkerError {
    match error {
        SseError::Transport(error) => WorkerError::Reset {
            reason: chain(&error.without_url()),
        },
        error => WorkerError::Protocol {
            what: error.to_string(),
        },
    }
}
