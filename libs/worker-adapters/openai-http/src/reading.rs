//! What the events of an answer mean. Pure: texts come in, a task's events come out.

use std::collections::VecDeque;

use bytes::Bytes;
use bytestring::ByteString;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::json;
use serde_json::value::RawValue;
use worker_adapters_adapter_api::{
    CallAnswer, CallApi, CallChunk, EndSummary, FinishReason, TokenEvent, WorkerError,
};

use crate::wire::{ErrorObject, error_event};

/// What ends a stream of chat chunks or completions.
const DONE: &str = "[DONE]";

/// No token is longer, in bytes.
const LONGEST_TOKEN: u64 = 4096;

/// The most that a call's events may hold together, in bytes: all of them are kept.
const STREAM_LIMIT: usize = 256 << 20;
/// What keeping an event takes beside its data, in bytes, from below.
const EVENT_COST: usize = 128;

/// Whose words the events are in, and what becomes of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A task of ours, whose answer is text of so many tokens at the most.
    Native { max_tokens: u32 },
    /// A call; its events are handed on.
    Call {
        api: CallApi,
        /// The client did not ask for the event that counts the tokens.
        usage_is_ours: bool,
    },
}

/// Reads one answer.
#[derive(Debug)]
pub(crate) struct Reader {
    kind: Kind,
    pieces: u64,
    text_bytes: u64,
    /// Of all events, with what keeping them takes.
    event_bytes: usize,
    usage: Usage,
    finish: Option<FinishReason>,
    model: Option<String>,
    over: bool,
}

impl Reader {
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            pieces: 0,
            text_bytes: 0,
            event_bytes: 0,
            usage: Usage::default(),
            finish: None,
            model: None,
            over: false,
        }
    }

    /// Whether the last event has come.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Whether the answer is whole, should the stream end here.
    pub(crate) fn may_end(&self) -> bool {
        self.over || self.finish.is_some()
    }

    /// Whether any of the answer's text has come.
    pub(crate) fn has_begun(&self) -> bool {
        self.pieces > 0
    }

    /// Takes in one event's data.
    pub(crate) fn take(
        &mut self,
        data: &str,
        out: &mut VecDeque<TokenEvent>,
    ) -> Result<(), WorkerError> {
        self.event_bytes += EVENT_COST + data.len();
        if self.event_bytes > STREAM_LIMIT {
            return Err(WorkerError::Protocol {
                what: format!("an answer of more than {STREAM_LIMIT} bytes"),
            });
        }
        if data.trim() == DONE {
            self.over = true;
            return Ok(());
        }
        let event: Event = serde_json::from_str(data).map_err(|error| WorkerError::Protocol {
            what: format!("an event that cannot be read: {error}"),
        })?;
        if let Some(error) = &event.error {
            return Err(error_event(error));
        }
        let only_counts = event.only_counts();
        let name = self.name_of(&event);
        let text = self.note(event);
        if !text.is_empty() {
            self.pieces += 1;
            self.text_bytes += text.len() as u64;
        }
        match self.kind {
            Kind::Native { max_tokens } => self.token(text, u64::from(max_tokens), out)?,
            Kind::Call { usage_is_ours, .. } if usage_is_ours && only_counts => {}
            Kind::Call { .. } => out.push_back(TokenEvent::Chunk(CallChunk {
                name: name.map(ByteString::from),
                data: data.into(),
                text: text.into(),
                tokens_out: self.tokens_out(),
            })),
        }
        Ok(())
    }

    /// Where an API's events have names, their data repeats them.
    fn name_of(&self, event: &Event) -> Option<Box<str>> {
        match self.kind {
            Kind::Call {
                api: CallApi::Responses | CallApi::Messages,
                ..
            } => event.r#type.clone().map(Into::into),
            _ => None,
        }
    }

    /// Takes in a whole answer that did not stream.
    pub(crate) fn take_whole(&mut self, body: Vec<u8>) -> Result<CallAnswer, WorkerError> {
        if let Err(error) = serde_json::from_slice::<&RawValue>(&body) {
            return Err(WorkerError::Protocol {
                what: format!("an answer that is no JSON: {error}"),
            });
        }
        // Answers of which nothing is known here are handed on all the same.
        let answer: Whole = serde_json::from_slice(&body).unwrap_or_default();
        self.usage.merge(answer.usage.unwrap_or_default());
        self.model = answer.model;
        let reasons = answer.choices.iter().map(|choice| &choice.finish_reason);
        let reason = reasons.flatten().next().or(answer.stop_reason.as_ref());
        self.finish = Some(finish_of(reason.map_or("stop", String::as_str)));
        if answer.status.as_deref() == Some("incomplete") {
            self.finish = Some(FinishReason::Length);
        }
        let choice = answer.choices.into_iter().next();
        let of_choice = choice.and_then(|choice| choice.message.map(|m| m.content).or(choice.text));
        let text = of_choice.map_or_else(
            || {
                let output = answer.output.into_iter().flat_map(|item| item.content);
                let parts = output.chain(answer.content);
                parts.map(|part| part.text.into_string()).collect()
            },
            Text::into_string,
        );
        self.over = true;
        Ok(CallAnswer {
            body: Bytes::from(body),
            text,
        })
    }

    /// Takes note of what an event says of the whole, and gives its text.
    fn note(&mut self, event: Event) -> String {
        self.usage.merge(event.usage.unwrap_or_default());
        if event.model.is_some() {
            self.model = event.model;
        }
        for part in [event.message, event.response].into_iter().flatten() {
            self.usage.merge(part.usage.unwrap_or_default());
            self.model = part.model.or(self.model.take());
        }
        match event.r#type.as_deref() {
            Some("response.output_text.delta" | "content_block_delta") => {
                event.delta.map(Delta::into_text).unwrap_or_default()
            }
            Some("message_delta") => {
                let reason = event.delta.and_then(Delta::stop_reason);
                self.finish = Some(finish_of(reason.as_deref().unwrap_or("stop")));
                String::new()
            }
            Some("message_stop" | "response.completed" | "response.failed") => {
                self.finish = self.finish.or(Some(FinishReason::Stop));
                self.over = true;
                String::new()
            }
            Some("response.incomplete") => {
                self.finish = Some(FinishReason::Length);
                self.over = true;
                String::new()
            }
            _ => {
                let mut text = String::new();
                for choice in event.choices.unwrap_or_default() {
                    if let Some(reason) = &choice.finish_reason {
                        self.finish = Some(finish_of(reason));
                    }
                    // Of several answers to one question, readers of text see the first.
                    if choice.index == 0 {
                        let piece = choice.delta.map(|delta| delta.content).or(choice.text);
                        text.push_str(&piece.unwrap_or_default().into_string());
                    }
                }
                text
            }
        }
    }

    fn token(
        &mut self,
        text: String,
        max_tokens: u64,
        out: &mut VecDeque<TokenEvent>,
    ) -> Result<(), WorkerError> {
        if text.is_empty() {
            return Ok(());
        }
        // A server may count what it held back as one piece more.
        let at_most = max_tokens + 1;
        if self.pieces > at_most || self.text_bytes > at_most * LONGEST_TOKEN {
            return Err(WorkerError::Protocol {
                what: format!("more text than {max_tokens} tokens hold"),
            });
        }
        out.push_back(TokenEvent::Token {
            text: text.into(),
            index: self.pieces - 1,
            tokens_in: self.usage.tokens_in,
            tokens_out: self.tokens_out(),
        });
        Ok(())
    }

    /// By the server's count where it has told, else the pieces of text.
    fn tokens_out(&self) -> u64 {
        if self.usage.tokens_out > 0 {
            self.usage.tokens_out
        } else {
            self.pieces
        }
    }

    /// The end, with the times that were measured here, in milliseconds.
    pub(crate) fn summary(&self, prompt_time_ms: f64, decode_time_ms: f64) -> EndSummary {
        let effective = match &self.model {
            Some(model) => json!({ "model": model }),
            None => serde_json::Value::Null,
        };
        EndSummary {
            tokens_in: self.usage.tokens_in,
            tokens_cached: self.usage.tokens_cached,
            tokens_out: self.tokens_out(),
            prompt_time_ms,
            decode_time_ms,
            finish_reason: self.finish.unwrap_or(FinishReason::Stop),
            effective,
        }
    }
}

fn finish_of(reason: &str) -> FinishReason {
    match reason {
        "length" | "max_tokens" => FinishReason::Length,
        _ => FinishReason::Stop,
    }
}

/// Tokens, in all the words for them.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(from = "UsageWords")]
#[allow(
    clippy::struct_field_names,
    reason = "the words of everybody else for them"
)]
struct Usage {
    tokens_in: u64,
    tokens_cached: u64,
    tokens_out: u64,
}

impl Usage {
    /// Counts only grow: an event that does not tell one changes nothing.
    fn merge(&mut self, other: Self) {
        self.tokens_in = self.tokens_in.max(other.tokens_in);
        self.tokens_cached = self.tokens_cached.max(other.tokens_cached);
        self.tokens_out = self.tokens_out.max(other.tokens_out);
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct UsageWords {
    prompt_tokens: Option<u64>,
    input_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    output_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
    cache_read_input_tokens: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Details {
    cached_tokens: Option<u64>,
}

impl From<UsageWords> for Usage {
    fn from(words: UsageWords) -> Self {
        let details = words.prompt_tokens_details.or(words.input_tokens_details);
        let cached = details.and_then(|details| details.cached_tokens);
        Self {
            tokens_in: words.prompt_tokens.or(words.input_tokens).unwrap_or(0),
            tokens_cached: cached.or(words.cache_read_input_tokens).unwrap_or(0),
            tokens_out: words.completion_tokens.or(words.output_tokens).unwrap_or(0),
        }
    }
}

/// One event of any of the APIs, as far as it matters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Event {
    r#type: Option<String>,
    choices: Option<Vec<Choice>>,
    usage: Option<Usage>,
    model: Option<String>,
    error: Option<ErrorObject>,
    /// Of the responses and the messages APIs.
    delta: Option<Delta>,
    message: Option<Part>,
    response: Option<Part>,
}

impl Event {
    /// Whether it is there for the tokens' count alone.
    fn only_counts(&self) -> bool {
        self.usage.is_some() && self.choices.as_ref().is_some_and(Vec::is_empty)
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Part {
    usage: Option<Usage>,
    model: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice {
    index: u64,
    delta: Option<Message>,
    message: Option<Message>,
    text: Option<Text>,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Message {
    content: Text,
}

/// A text, or something else in its place, which counts as none.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Text {
    Text(String),
    Other(IgnoredAny),
}

impl Default for Text {
    fn default() -> Self {
        Self::Other(IgnoredAny)
    }
}

impl Text {
    fn into_string(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Other(_) => String::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Delta {
    Text(String),
    Object {
        #[serde(default)]
        text: Option<String>,
        #[serde(default)]
        stop_reason: Option<String>,
    },
    Other(IgnoredAny),
}

impl Delta {
    fn into_text(self) -> String {
        match self {
            Self::Text(text) => text,
            Self::Object { text, .. } => text.unwrap_or_default(),
            Self::Other(_) => String::new(),
        }
    }

    fn stop_reason(self) -> Option<String> {
        match self {
            Self::Object { stop_reason, .. } => stop_reason,
            Self::Text(_) | Self::Other(_) => None,
        }
    }
}

/// A whole answer of any of the APIs, as far as it matters.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Whole {
    choices: Vec<Choice>,
    usage: Option<Usage>,
    model: Option<String>,
    /// Of the responses API.
    output: Vec<OutputItem>,
    status: Option<String>,
    /// Of the messages API.
    content: Vec<ContentPart>,
    stop_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OutputItem {
    content: Vec<ContentPart>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ContentPart {
    text: Text,
}

#[cfg(test)]
#[path = "reading_tests.rs"]
mod tests;
