//! From a task's log to an answer, piece by piece. Pure: no clock, no IO.
//!
//! The engine's events are read for text, thoughts, tool calls and log
//! probabilities. A tool call comes in fragments, and is handed out whole, before
//! the end.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::Duration;

use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use worker_adapters_adapter_api::FinishReason;

use crate::services::event_log::{End, EventRef, Failure};

/// What one event adds to the answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Piece<'a> {
    pub(super) text: Cow<'a, str>,
    pub(super) thinking: Cow<'a, str>,
    pub(super) tool_calls: Vec<ToolCall>,
    pub(super) logprobs: Vec<Value>,
}

impl Piece<'_> {
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Takes on what comes after it.
    pub(super) fn extend(&mut self, next: Piece<'_>) {
        self.text.to_mut().push_str(&next.text);
        self.thinking.to_mut().push_str(&next.thinking);
        self.tool_calls.extend(next.tool_calls);
        self.logprobs.extend(next.logprobs);
    }
}

/// A whole tool call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct ToolCall {
    #[serde(skip_serializing_if = "String::is_empty")]
    id: String,
    function: Function,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct Function {
    index: u64,
    name: String,
    arguments: Map<String, Value>,
}

/// Figures of a finished answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Figures {
    pub(super) done_reason: &'static str,
    /// Until the engine had taken the task: loading, and waiting in the queue.
    pub(super) load: Duration,
    pub(super) prompt_tokens: u64,
    pub(super) prompt: Duration,
    pub(super) tokens: u64,
    pub(super) decode: Duration,
}

/// What came of one event.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Step<'a> {
    Nothing,
    Piece(Piece<'a>),
    /// The answer is complete, with what was held back until now.
    Done(Piece<'static>, Figures),
    Failed(Box<Failure>),
}

/// Reads the events of one task in their order.
#[derive(Debug, Default)]
pub(super) struct Reading {
    calls: BTreeMap<u64, Fragments>,
    load: Duration,
}

/// A tool call so far.
#[derive(Debug, Default)]
struct Fragments {
    id: String,
    name: String,
    arguments: String,
}

impl Reading {
    pub(super) fn step<'a>(&mut self, event: EventRef<'a>) -> Step<'a> {
        match event {
            EventRef::Started(started) => {
                self.load = Duration::from_millis(started.waited_ms);
                Step::Nothing
            }
            EventRef::Chunk(chunk) => self.read(serde_json::from_str(chunk.data)),
            // Of an engine that does not stream this.
            EventRef::Answer(answer) => self.read(serde_json::from_slice(&answer.body)),
            EventRef::End(end) if end.finish_reason == FinishReason::Cancelled => {
                Step::Failed(Box::new(Failure::cancelled()))
            }
            EventRef::End(end) => self.end(end),
            EventRef::Error(failure) => Step::Failed(Box::new(failure.clone())),
            // The words of our own API.
            EventRef::Token(_) | EventRef::Metrics(_) => Step::Nothing,
        }
    }

    fn read<'a>(&mut self, event: serde_json::Result<Event<'a>>) -> Step<'a> {
        let event = match event {
            Ok(event) => event,
            Err(error) => return unreadable(&error.to_string()),
        };
        if let Some(error) = event.error {
            return unreadable(error.message.as_deref().unwrap_or("an error"));
        }
        // Only one answer was asked for.
        let Some(choice) = event.choices.into_iter().next() else {
            return Step::Nothing;
        };
        let delta = choice.delta.unwrap_or_default();
        for (place, call) in delta.tool_calls.into_iter().flatten().enumerate() {
            let index = call.index.unwrap_or(place as u64);
            self.calls.entry(index).or_default().extend(call);
        }
        let piece = Piece {
            text: delta.content.or(choice.text).unwrap_or_default().0,
            thinking: delta.reasoning_content.unwrap_or_default().0,
            tool_calls: Vec::new(),
            logprobs: choice
                .logprobs
                .and_then(|logprobs| logprobs.content)
                .unwrap_or_default(),
        };
        if piece.is_empty() {
            Step::Nothing
        } else {
            Step::Piece(piece)
        }
    }

    fn end(&mut self, end: &End) -> Step<'static> {
        let length = end.finish_reason == FinishReason::Length;
        let mut tool_calls = Vec::new();
        for (index, fragments) in std::mem::take(&mut self.calls) {
            match fragments.whole(index) {
                Ok(call) => tool_calls.push(call),
                Err(name) => return Step::Failed(Box::new(broken_call(&name, length))),
            }
        }
        let says = end.receipt.as_ref();
        let says = says.and_then(|receipt| receipt.engine_says.as_ref());
        let figures = Figures {
            done_reason: if length { "length" } else { "stop" },
            load: self.load,
            prompt_tokens: end.tokens_in.unwrap_or_default(),
            prompt: millis(says.map_or(0.0, |says| says.prompt_time_ms)),
            tokens: end.tokens_out,
            decode: millis(end.decode_time_ms),
        };
        let held_back = Piece {
            tool_calls,
            ..Piece::default()
        };
        Step::Done(held_back, figures)
    }
}

/// Nothing for what is no time.
fn millis(millis: f64) -> Duration {
    Duration::try_from_secs_f64(millis / 1000.0).unwrap_or_default()
}

fn unreadable(why: &str) -> Step<'static> {
    let failure = Failure::new(
        ErrorCode::WorkerReset,
        format!("the engine's answer cannot be read: {why}"),
    );
    Step::Failed(Box::new(failure.retriable()))
}

fn broken_call(name: &str, length: bool) -> Failure {
    let failure = Failure::new(
        ErrorCode::WorkerReset,
        format!("the model called the tool `{name}` with arguments that are no JSON object"),
    )
    .retriable();
    if length {
        failure.with_hint("the answer was cut: raise `options.num_predict`, or the pool's `ctx`")
    } else {
        failure
    }
}

impl Fragments {
    fn extend(&mut self, delta: CallDelta) {
        if let Some(id) = delta.id.filter(|id| !id.is_empty()) {
            self.id = id;
        }
        let Some(function) = delta.function else {
            return;
        };
        self.name.push_str(&function.name.unwrap_or_default());
        match function.arguments {
            Some(Value::String(text)) => self.arguments.push_str(&text),
            None | Some(Value::Null) => {}
            Some(whole) => self.arguments = whole.to_string(),
        }
    }

    /// The call, or the name of one whose arguments cannot be read.
    fn whole(self, index: u64) -> Result<ToolCall, String> {
        let arguments = match self.arguments.trim() {
            "" => Map::new(),
            text => match serde_json::from_str(text) {
                Ok(arguments) => arguments,
                Err(_) => return Err(self.name),
            },
        };
        Ok(ToolCall {
            id: self.id,
            function: Function {
                index,
                name: self.name,
                arguments,
            },
        })
    }
}

/// What is read of one of the engine's events, or of a whole answer.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Event<'a> {
    #[serde(borrow)]
    choices: Vec<Choice<'a>>,
    error: Option<EngineError>,
}

#[derive(Debug, Deserialize)]
struct EngineError {
    message: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Choice<'a> {
    /// Of a chat.
    #[serde(alias = "message", borrow)]
    delta: Option<Delta<'a>>,
    /// Of a completion.
    text: Option<Text<'a>>,
    logprobs: Option<Logprobs>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Logprobs {
    content: Option<Vec<Value>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Delta<'a> {
    #[serde(borrow)]
    content: Option<Text<'a>>,
    #[serde(alias = "reasoning")]
    reasoning_content: Option<Text<'a>>,
    tool_calls: Option<Vec<CallDelta>>,
}

/// A text where it stands, unless JSON writes it in another way.
#[derive(Debug, Default, Deserialize)]
#[serde(transparent)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Debug, Deserialize)]
struct CallDelta {
    index: Option<u64>,
    id: Option<String>,
    function: Option<FunctionDelta>,
}

#[derive(Debug, Deserialize)]
struct FunctionDelta {
    name: Option<String>,
    arguments: Option<Value>,
}

#[cfg(test)]
#[path = "answer_tests.rs"]
pub(super) mod tests;
