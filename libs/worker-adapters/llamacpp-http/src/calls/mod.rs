//! A call: a request in the engine's own API, from its body to its last event.
//!
//! ```text
//! Opening ──► Reading ──► Closed     (a stream, to its last event)
//! Waiting ──────────────► Closed     (an answer in one piece)
//!    └───────────┴──────► Closed     (error, timeout, cancel)
//! ```
//!
//! - [`body`]: what is added to what the client wrote
//! - [`events`]: what one event of a stream tells
//! - [`answer`]: what a whole answer tells
//! - [`account`]: what all of it cost
//! - [`looks`]: signs of life of an engine that has nothing to say yet

mod account;
mod answer;
mod body;
pub(crate) mod events;
mod looks;

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use futures::{Stream, StreamExt, stream};
use tokio::time::{Instant, timeout};
use worker_adapters_adapter_api::{
    CallAnswer, CallApi, CallChunk, EngineCall, TokenEvent, TokenStream, WorkerError,
};

use self::account::Account;
pub(crate) use self::answer::read as read_answer;
use self::body::{Wanted, prepare};
use self::events::Heard;
use self::looks::{Looks, Seen};
use crate::client::EngineClient;
use crate::completion::{ACCEPT_WINDOW, Opening, ended_early, part_of};
use crate::deadlines::PromptSpeed;
use crate::incoming::Incoming;
use crate::live::LiveTask;
use crate::patience::Patience;
use crate::sse::SseEvent;
use crate::wire::PromptProgress;

/// The most that one answer's events may hold together, in bytes: all of them are
/// kept. Some ten thousand tokens with their log probabilities.
const STREAM_LIMIT: usize = 256 << 20;
/// What keeping an event takes beside its data, in bytes, from below.
const EVENT_COST: usize = 128;

/// The longest that an answer is waited for whose engine does not show its slots, so
/// that nothing tells a slow one from a hung one.
const UNSEEN_LIMIT: Duration = Duration::from_hours(1);

/// What ends the streams of OpenAI's older APIs.
const DONE: &str = "[DONE]";

type Waiting = Pin<Box<dyn Future<Output = Result<Bytes, WorkerError>> + Send>>;
type Sights = Pin<Box<dyn Stream<Item = Seen> + Send>>;

#[allow(
    clippy::large_enum_variant,
    reason = "one for each task, on the heap, and large for as long as the task reads"
)]
enum State {
    Opening(Opening),
    Reading(Incoming),
    Waiting(Waiting, Sights),
    Closed,
}

/// A call on its way.
pub(crate) struct Call {
    /// Gone as soon as the task is over, before its last event is handed out.
    live: Option<LiveTask>,
    state: State,
    /// What is handed out before anything is read on.
    ready: VecDeque<TokenEvent>,
    /// When the engine was last heard of.
    now: Instant,
    url: String,
    api: CallApi,
    /// Whether the client wants to see the progress in the prompt itself.
    progress_wanted: bool,
    /// Whether a word about the prompt was handed out, or dropped, before.
    progress_seen: bool,
    bytes: usize,
    reader: events::Reader,
    account: Account,
    patience: Patience,
    speed: Arc<PromptSpeed>,
    first_event: Option<Instant>,
}

impl Call {
    /// Sends the request. `tags` is whether the engine shows tasks by their tags.
    pub(crate) fn start(
        client: &Arc<EngineClient>,
        live: LiveTask,
        call: &EngineCall,
        tags: bool,
        speed: Arc<PromptSpeed>,
    ) -> Result<Self, WorkerError> {
        let (api, streams) = (call.api, call.stream && call.api.generates());
        // Anthropic's API is translated by the engine, and what it does not know of
        // it is lost.
        let own_keys = api.generates() && api != CallApi::Messages;
        let wanted = Wanted {
            progress: own_keys && streams,
            tag: (own_keys && tags).then(|| live.handle.tag()),
        };
        let prepared = prepare(&call.body, wanted)?;
        if !prepared.tagged {
            live.handle.set_untagged();
        }
        // A guess of three bytes a token, as for other prompts.
        let prompt_tokens = call.body.len() as u64 / 3 + 1;
        let patience = Patience::new(
            &client.settings,
            Arc::clone(&speed),
            prompt_tokens,
            &live.handle,
        );
        let url = client.url().to_owned();
        let engine = Arc::clone(client);
        let state = if streams {
            let opening = async move { engine.open_streamed_call(api.path(), prepared.body).await };
            State::Opening(Box::pin(opening))
        } else {
            let tag = prepared.tagged.then(|| live.handle.tag());
            let looks = Looks::new(Arc::clone(client), tag);
            let sights = stream::unfold(looks, async |mut looks| Some((looks.next().await, looks)));
            let waiting = async move {
                let keep = !api.generates();
                let response = engine.open_call(api.path(), prepared.body, keep).await?;
                engine.body(response).await.map(Bytes::from)
            };
            State::Waiting(Box::pin(waiting), Box::pin(sights))
        };
        Ok(Self {
            live: Some(live),
            state,
            ready: VecDeque::new(),
            now: patience.started(),
            url,
            api,
            progress_wanted: prepared.progress_wanted,
            progress_seen: false,
            bytes: 0,
            reader: events::Reader::default(),
            account: Account::new(api),
            patience,
            speed,
            first_event: None,
        })
    }

    /// Waits until the engine has taken the task, or says why it has not.
    pub(crate) async fn accepted(&mut self) -> Result<(), WorkerError> {
        let step = timeout(ACCEPT_WINDOW, poll_fn(|context| self.poll_step(context)));
        match (step.await, &self.live) {
            (Ok(event), _) => {
                if let Some(event) = event? {
                    self.ready.push_front(event);
                }
            }
            // Time over means that the engine works on it.
            (Err(_), Some(live)) => live.handle.set_taken(),
            (Err(_), None) => {}
        }
        self.ready.push_front(TokenEvent::Started);
        Ok(())
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(self)
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.ready.clear();
        self.live = None;
        error
    }

    /// One step: the response's headers, an event, a look, or the answer, and what it
    /// gives first.
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
                    live.handle.set_taken();
                    self.state = State::Reading(incoming?);
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
                    return Poll::Ready(self.take(event));
                }
            }
            State::Waiting(answer, sights) => {
                if let Poll::Ready(answer) = answer.as_mut().poll(context) {
                    return Poll::Ready(self.take_answer(answer?));
                }
                if let Poll::Ready(Some(seen)) = sights.poll_next_unpin(context) {
                    // No step of the answer: the next look is waited for.
                    self.take_look(seen);
                    return self.poll_step(context);
                }
            }
            State::Closed => return Poll::Ready(Ok(None)),
        }
        self.patience.poll_over(live, context).map(Err)
    }

    /// What one event of a stream gives; what follows it is in `ready`.
    fn take(&mut self, event: SseEvent) -> Result<Option<TokenEvent>, WorkerError> {
        let Some(live) = &self.live else {
            return Ok(None);
        };
        let name = event.name.as_ref().map_or(0, |name| name.len());
        self.bytes += EVENT_COST + name + event.data.len();
        if self.bytes > STREAM_LIMIT {
            return Err(WorkerError::Protocol {
                what: format!("an answer of more than {STREAM_LIMIT} bytes"),
            });
        }
        let now = self.now;
        self.patience.note_event(now, &live.handle);
        if event.data == DONE {
            self.end(now);
            return Ok(None);
        }
        let heard =
            self.reader
                .read(self.api, &event.data)
                .map_err(|error| WorkerError::Protocol {
                    what: format!("an event that cannot be read: {error}"),
                })?;
        if heard.nothing {
            return Ok(None);
        }
        if let Some(error) = heard.error {
            return Err(error.into_worker_error(&self.url));
        }
        if let Some(progress) = &heard.progress {
            self.hear_of_prompt(now, progress.prompt);
            let raw = progress.raw;
            let shown = if self.progress_wanted {
                Some(event.data)
            } else {
                self.without_progress(&event.data, raw)
                    .map(ByteString::from)
            };
            return Ok(shown.map(|data| self.chunk(event.name, data, ByteString::new())));
        }
        self.hear(now, &heard);
        let last = heard.last;
        let text = part_of(&event.data, heard.text);
        let chunk = self.chunk(event.name, event.data, text);
        if last {
            self.end(now);
        }
        Ok(Some(chunk))
    }

    fn hear_of_prompt(&mut self, now: Instant, progress: PromptProgress) {
        if let Some(live) = &self.live {
            live.handle.set_telling();
            live.handle.set_prompt_left(progress.left());
        }
        self.patience.hear_of_prompt(now, progress);
    }

    /// Takes in what an event tells that is none of the prompt's.
    fn hear(&mut self, now: Instant, heard: &Heard<'_>) {
        if heard.token {
            self.account.count_token();
        }
        // What comes before the first token says nothing of the prompt: responses
        // are announced as soon as they are taken.
        if heard.token || self.first_event.is_some() {
            self.first_event.get_or_insert(now);
            if let Some(live) = &self.live {
                let context = self.account.counted();
                self.patience
                    .hear_streamed_token(now, context, &live.handle);
            }
        }
        if let Some(costs) = &heard.costs {
            self.account.add(costs);
            if let Some(timings) = costs.timings {
                self.speed.record(timings.prompt_n, timings.prompt_ms);
            }
        }
        if let Some(reason) = heard.finish {
            self.account.finish(reason);
        }
    }

    /// An event that a client would have got without our asking for progress:
    /// responses have one of the kind in any case, and without it.
    fn without_progress(&mut self, data: &str, raw: &str) -> Option<String> {
        let first = !std::mem::replace(&mut self.progress_seen, true);
        if self.api != CallApi::Responses || !first {
            return None;
        }
        // As a member it is written once; a text that quotes it has escapes.
        let member = format!("\"prompt_progress\":{raw}");
        let (before, after) = data.split_once(&member)?;
        // With it goes the comma on one side of it.
        Some(match before.strip_suffix(',') {
            Some(before) => format!("{before}{after}"),
            None => format!("{before}{}", after.strip_prefix(',').unwrap_or(after)),
        })
    }

    fn chunk(&self, name: Option<ByteString>, data: ByteString, text: ByteString) -> TokenEvent {
        TokenEvent::Chunk(CallChunk {
            name,
            data,
            text,
            tokens_out: self.account.counted(),
        })
    }

    fn take_answer(&mut self, body: Bytes) -> Result<Option<TokenEvent>, WorkerError> {
        let read = read_answer(self.api, &body).map_err(|error| WorkerError::Protocol {
            what: format!("an answer that cannot be read: {error}"),
        })?;
        self.account.add(&read.costs);
        if let Some(timings) = read.costs.timings {
            self.speed.record(timings.prompt_n, timings.prompt_ms);
        }
        if let Some(reason) = read.finish {
            self.account.finish(reason);
        }
        self.end(Instant::now());
        let text = read.text;
        Ok(Some(TokenEvent::Answer(CallAnswer { body, text })))
    }

    /// A slot that got on is a sign of life, as an event of a stream would be.
    fn take_look(&mut self, seen: Seen) {
        let now = Instant::now();
        match seen {
            Seen::Nothing => {}
            Seen::NotShown => {
                if now - self.patience.started() < UNSEEN_LIMIT {
                    self.patience.hear_token(now, 0);
                }
            }
            Seen::Progress(slot) if slot.decoded == 0 => {
                let progress = PromptProgress {
                    total: slot.prompt_tokens,
                    processed: slot.processed,
                };
                if let Some(live) = &self.live {
                    live.handle.set_prompt_left(progress.left());
                }
                self.patience.hear_of_prompt(now, progress);
            }
            Seen::Progress(slot) => {
                if let Some(live) = &self.live {
                    live.handle.set_prompt_left(0);
                }
                let context = slot.prompt_tokens.saturating_add(slot.decoded);
                self.patience.hear_token(now, context);
            }
        }
    }

    fn end(&mut self, now: Instant) {
        let started = self.patience.started();
        let first = self.first_event.unwrap_or(now);
        let summary = self.account.summary(first - started, now - first);
        self.ready.push_back(TokenEvent::End(summary));
        self.live = None;
        self.state = State::Closed;
    }
}

impl Stream for Call {
    type Item = Result<TokenEvent, WorkerError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            let live = this.live.as_ref();
            if live.is_some_and(|live| live.handle.is_cancelled()) {
                return Poll::Ready(Some(Err(this.close(WorkerError::Cancelled))));
            }
            if let Some(event) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if matches!(this.state, State::Closed) {
                return Poll::Ready(None);
            }
            match ready!(this.poll_step(context)) {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(this.close(error)))),
            }
        }
    }
}
