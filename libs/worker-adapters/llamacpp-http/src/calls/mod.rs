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
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use futures::{Stream, StreamExt, stream};
use reqwest::Response;
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
use crate::completion::{ACCEPT_WINDOW, Opening, broken};
use crate::deadlines::PromptSpeed;
use crate::live::LiveTask;
use crate::patience::Patience;
use crate::sse::{SseError, SseEvent, SseLimits, events};
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

type Events = Pin<Box<dyn Stream<Item = Result<SseEvent, SseError<reqwest::Error>>> + Send>>;
type Waiting = Pin<Box<dyn Future<Output = Result<Bytes, WorkerError>> + Send>>;

enum State {
    Opening(Opening),
    Reading(Events),
    Waiting(Waiting, Looks),
    Closed,
}

/// What one step gave.
enum Step {
    Opened(Result<Response, WorkerError>),
    Event(Option<Result<SseEvent, SseError<reqwest::Error>>>),
    Answer(Result<Bytes, WorkerError>),
    Seen(Seen),
}

/// A call on its way.
pub(crate) struct Call {
    /// Gone as soon as the task is over, before its last event is handed out.
    live: Option<LiveTask>,
    state: State,
    ready: VecDeque<TokenEvent>,
    url: String,
    api: CallApi,
    /// Whether the client wants to see the progress in the prompt itself.
    progress_wanted: bool,
    /// Whether a word about the prompt was handed out, or dropped, before.
    progress_seen: bool,
    bytes: usize,
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
        let opening = {
            let client = Arc::clone(client);
            async move {
                let keep = !api.generates();
                client.open_call(api.path(), prepared.body, keep).await
            }
        };
        let state = if streams {
            State::Opening(Box::pin(opening))
        } else {
            let tag = prepared.tagged.then(|| live.handle.tag());
            let looks = Looks::new(Arc::clone(client), tag);
            let client = Arc::clone(client);
            let waiting = async move { client.body(opening.await?).await.map(Bytes::from) };
            State::Waiting(Box::pin(waiting), looks)
        };
        Ok(Self {
            live: Some(live),
            state,
            ready: VecDeque::from([TokenEvent::Started]),
            url,
            api,
            progress_wanted: prepared.progress_wanted,
            progress_seen: false,
            bytes: 0,
            account: Account::new(api),
            patience,
            speed,
            first_event: None,
        })
    }

    /// Waits until the engine has taken the task, or says why it has not.
    pub(crate) async fn accepted(&mut self) -> Result<(), WorkerError> {
        // Time over means that the engine works on it.
        if let Ok(outcome) = timeout(ACCEPT_WINDOW, self.advance()).await {
            return outcome;
        }
        if let Some(live) = &self.live {
            live.handle.set_taken();
        }
        Ok(())
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(stream::unfold(self, |mut call| async {
            let item = call.next().await?;
            Some((item, call))
        }))
    }

    async fn next(&mut self) -> Option<Result<TokenEvent, WorkerError>> {
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            let live = self.live.as_ref();
            if live.is_some_and(|live| live.handle.cancel.is_cancelled()) {
                return Some(Err(self.close(WorkerError::Cancelled)));
            }
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if matches!(self.state, State::Closed) {
                return None;
            }
            if let Err(error) = self.advance().await {
                return Some(Err(self.close(error)));
            }
        }
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.ready.clear();
        self.live = None;
        error
    }

    /// One step: the response's headers, an event, a look, or the answer. May be
    /// dropped and called again without losing anything.
    async fn advance(&mut self) -> Result<(), WorkerError> {
        loop {
            let Some(live) = &self.live else {
                return Ok(());
            };
            let limit = self.patience.limit(live);
            let state = &mut self.state;
            let step = async {
                match state {
                    State::Opening(opening) => Some(Step::Opened(opening.await)),
                    State::Reading(events) => Some(Step::Event(events.next().await)),
                    State::Waiting(answer, looks) => Some(tokio::select! {
                        biased;
                        answer = answer => Step::Answer(answer),
                        seen = looks.next() => Step::Seen(seen),
                    }),
                    State::Closed => None,
                }
            };
            return match limit.apply(&live.handle.cancel, step).await? {
                None => continue,
                Some(None) => Ok(()),
                Some(Some(Step::Opened(response))) => {
                    live.handle.set_taken();
                    let bytes = response?.bytes_stream();
                    self.state = State::Reading(Box::pin(events(bytes, SseLimits::default())));
                    Ok(())
                }
                Some(Some(Step::Event(Some(Ok(event))))) => self.take(event),
                Some(Some(Step::Event(Some(Err(error))))) => Err(broken(error)),
                Some(Some(Step::Event(None))) => Err(WorkerError::Reset {
                    reason: "the response ended before its last event".to_owned(),
                }),
                Some(Some(Step::Answer(answer))) => self.take_answer(answer?),
                Some(Some(Step::Seen(seen))) => {
                    self.take_look(seen);
                    continue;
                }
            };
        }
    }

    /// Takes in one event of a stream.
    fn take(&mut self, event: SseEvent) -> Result<(), WorkerError> {
        let name = event.name.as_ref().map_or(0, String::len);
        self.bytes += EVENT_COST + name + event.data.len();
        if self.bytes > STREAM_LIMIT {
            return Err(WorkerError::Protocol {
                what: format!("an answer of more than {STREAM_LIMIT} bytes"),
            });
        }
        let now = Instant::now();
        if let Some(live) = &self.live {
            live.handle.note_gap(self.patience.waited(now));
        }
        if event.data == DONE {
            self.end(now);
            return Ok(());
        }
        let heard = events::read(self.api, &event.data).map_err(|error| WorkerError::Protocol {
            what: format!("an event that cannot be read: {error}"),
        })?;
        if heard.nothing {
            return Ok(());
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
            };
            if let Some(data) = shown {
                self.hand_out(event.name, data, String::new());
            }
            return Ok(());
        }
        let (text, last) = self.hear(now, heard);
        self.hand_out(event.name, event.data, text);
        if last {
            self.end(now);
        }
        Ok(())
    }

    fn hear_of_prompt(&mut self, now: Instant, progress: PromptProgress) {
        if let Some(live) = &self.live {
            live.handle.set_telling();
            live.handle.set_prompt_left(progress.left());
        }
        self.patience.hear_of_prompt(now, progress);
    }

    /// Takes in what an event tells that is none of the prompt's.
    fn hear(&mut self, now: Instant, heard: Heard<'_>) -> (String, bool) {
        if heard.token {
            self.account.count_token();
        }
        // What comes before the first token says nothing of the prompt: responses
        // are announced as soon as they are taken.
        if heard.token || self.first_event.is_some() {
            self.first_event.get_or_insert(now);
            self.patience.hear_token(now, self.account.counted());
            if let Some(live) = &self.live {
                live.handle.set_decoding();
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
        (heard.text.into_owned(), heard.last)
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

    fn hand_out(&mut self, name: Option<String>, data: String, text: String) {
        self.ready.push_back(TokenEvent::Chunk(CallChunk {
            name: name.map(ByteString::from),
            data: data.into(),
            text: text.into(),
            tokens_out: self.account.counted(),
        }));
    }

    fn take_answer(&mut self, body: Bytes) -> Result<(), WorkerError> {
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
        let text = read.text;
        self.ready
            .push_back(TokenEvent::Answer(CallAnswer { body, text }));
        self.end(Instant::now());
        Ok(())
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
