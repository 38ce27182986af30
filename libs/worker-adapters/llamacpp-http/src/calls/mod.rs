//! A call: a request in the engine's own API, and what its answer gives.
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

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use futures::{Stream, StreamExt, stream};
use tokio::time::Instant;
use worker_adapters_adapter_api::{
    CallAnswer, CallApi, CallChunk, EngineCall, TokenEvent, WorkerError,
};

use self::account::{Account, Costs};
pub(crate) use self::answer::read as read_answer;
use self::body::{Wanted, prepare};
use self::events::Heard;
use self::looks::{Looks, Seen};
use crate::answer_stream::{AnswerKind, AnswerStream, Given, InFlight, State};
use crate::client::EngineClient;
use crate::completion::part_of;
use crate::deadlines::PromptSpeed;
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

/// An answer in one piece that is waited for, and what is seen of the engine meanwhile.
pub(crate) struct Waiting {
    answer: Pin<Box<dyn Future<Output = Result<Bytes, WorkerError>> + Send>>,
    sights: Pin<Box<dyn Stream<Item = Seen> + Send>>,
}

/// What a call has given so far.
pub(crate) struct Call {
    url: String,
    api: CallApi,
    /// Whether the client wants to see the progress in the prompt itself.
    progress_wanted: bool,
    /// Whether a word about the prompt was handed out, or dropped, before.
    progress_seen: bool,
    bytes: usize,
    reader: events::Reader,
    account: Account,
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
    ) -> Result<AnswerStream<Self>, WorkerError> {
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
            let answer = async move {
                let keep = !api.generates();
                let response = engine.open_call(api.path(), prepared.body, keep).await?;
                engine.body(response).await.map(Bytes::from)
            };
            State::Waiting(Waiting {
                answer: Box::pin(answer),
                sights: Box::pin(sights),
            })
        };
        let call = Self {
            url,
            api,
            progress_wanted: prepared.progress_wanted,
            progress_seen: false,
            bytes: 0,
            reader: events::Reader::default(),
            account: Account::new(api),
            speed,
            first_event: None,
        };
        Ok(AnswerStream::new(state, live, patience, call))
    }

    /// Takes in what an event tells that is none of the prompt's.
    fn hear(&mut self, task: &mut InFlight, heard: &Heard<'_>) {
        if heard.token {
            self.account.count_token();
        }
        // What comes before the first token says nothing of the prompt: responses
        // are announced as soon as they are taken.
        if heard.token || self.first_event.is_some() {
            self.first_event.get_or_insert(task.now);
            let context = self.account.counted();
            task.patience
                .hear_streamed_token(task.now, context, &task.handle);
        }
        if let Some(costs) = &heard.costs {
            self.add_costs(costs);
        }
        if let Some(reason) = heard.finish {
            self.account.finish(reason);
        }
    }

    fn add_costs(&mut self, costs: &Costs) {
        self.account.add(costs);
        if let Some(timings) = costs.timings {
            self.speed.record(timings.prompt_n, timings.prompt_ms);
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

    fn take_answer(&mut self, task: &mut InFlight, body: Bytes) -> Given {
        let read = read_answer(self.api, &body).map_err(|error| WorkerError::Protocol {
            what: format!("an answer that cannot be read: {error}"),
        })?;
        self.add_costs(&read.costs);
        if let Some(reason) = read.finish {
            self.account.finish(reason);
        }
        self.end(task, Instant::now());
        let text = read.text;
        Ok(Some(TokenEvent::Answer(CallAnswer { body, text })))
    }

    fn end(&self, task: &mut InFlight, now: Instant) {
        let started = task.patience.started();
        let first = self.first_event.unwrap_or(now);
        task.end(self.account.summary(first - started, now - first));
    }
}

impl AnswerKind for Call {
    type Waiting = Waiting;

    /// Messages tell nothing before their first token, and an answer in one piece
    /// nothing before its end.
    const IN_SLOT_IF_NOT_REFUSED: bool = true;

    fn take(&mut self, task: &mut InFlight, event: SseEvent) -> Given {
        let name = event.name.as_ref().map_or(0, |name| name.len());
        self.bytes += EVENT_COST + name + event.data.len();
        if self.bytes > STREAM_LIMIT {
            return Err(WorkerError::Protocol {
                what: format!("an answer of more than {STREAM_LIMIT} bytes"),
            });
        }
        if event.data == DONE {
            self.end(task, task.now);
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
            task.hear_of_prompt(progress.prompt);
            let raw = progress.raw;
            let shown = if self.progress_wanted {
                Some(event.data)
            } else {
                self.without_progress(&event.data, raw)
                    .map(ByteString::from)
            };
            return Ok(shown.map(|data| self.chunk(event.name, data, ByteString::new())));
        }
        self.hear(task, &heard);
        let last = heard.last;
        let text = part_of(&event.data, heard.text);
        let chunk = self.chunk(event.name, event.data, text);
        if last {
            self.end(task, task.now);
        }
        Ok(Some(chunk))
    }

    fn poll_answer(
        &mut self,
        waiting: &mut Waiting,
        task: &mut InFlight,
        context: &mut Context<'_>,
    ) -> Poll<Given> {
        loop {
            if let Poll::Ready(answer) = waiting.answer.as_mut().poll(context) {
                return Poll::Ready(self.take_answer(task, answer?));
            }
            match waiting.sights.poll_next_unpin(context) {
                // No step of the answer: the next look is waited for.
                Poll::Ready(Some(seen)) => take_look(task, seen),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

/// A slot that got on is a sign of life, as an event of a stream would be.
fn take_look(task: &mut InFlight, seen: Seen) {
    let now = Instant::now();
    match seen {
        Seen::Nothing => {}
        Seen::NotShown => {
            if now - task.patience.started() < UNSEEN_LIMIT {
                task.patience.hear_token(now, 0);
            }
        }
        Seen::Progress(slot) if slot.decoded == 0 => {
            let progress = PromptProgress {
                total: slot.prompt_tokens,
                processed: slot.processed,
            };
            task.handle.set_prompt_left(progress.left());
            task.patience.hear_of_prompt(now, progress);
        }
        Seen::Progress(slot) => {
            task.handle.set_prompt_left(0);
            let context = slot.prompt_tokens.saturating_add(slot.decoded);
            task.patience.hear_token(now, context);
        }
    }
}
