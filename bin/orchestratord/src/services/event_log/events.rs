//! What happens to a task: the events of its log, kept and lent.

use bytes::Bytes;
use bytestring::ByteString;
use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use worker_adapters_adapter_api::FinishReason;

/// What happened to a task, in the words of the SSE stream.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskEvent {
    Started(Started),
    Token(Token),
    /// One event of the answer to a call; native readers see its text as a token.
    Chunk(Chunk),
    /// The whole answer to a call that does not stream.
    Answer(Box<Answer>),
    Metrics(Metrics),
    End(Box<End>),
    Error(Box<Failure>),
}

impl TaskEvent {
    /// The piece of the answer's text in it, if there is one.
    pub fn token(&self) -> Option<TokenRef<'_>> {
        self.view().token()
    }

    /// The event as a log shows it.
    pub fn view(&self) -> EventRef<'_> {
        match self {
            Self::Started(started) => EventRef::Started(started),
            Self::Token(token) => EventRef::Token(token.view()),
            Self::Chunk(chunk) => EventRef::Chunk(chunk.view()),
            Self::Answer(answer) => EventRef::Answer(answer),
            Self::Metrics(metrics) => EventRef::Metrics(metrics),
            Self::End(end) => EventRef::End(end),
            Self::Error(failure) => EventRef::Error(failure),
        }
    }

    /// Whether this event closes the log.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::End(_) | Self::Error(_))
    }
}

/// An event that is somebody else's memory, as a log lends it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum EventRef<'a> {
    Started(&'a Started),
    Token(TokenRef<'a>),
    Chunk(ChunkRef<'a>),
    Answer(&'a Answer),
    Metrics(&'a Metrics),
    End(&'a End),
    Error(&'a Failure),
}

/// A [`Token`] that is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRef<'a> {
    pub t: &'a str,
    pub i: u64,
}

/// A [`Chunk`] that is lent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRef<'a> {
    pub name: Option<&'a str>,
    pub data: &'a str,
    pub token: TokenRef<'a>,
}

impl<'a> EventRef<'a> {
    /// The piece of the answer's text in it, if there is one.
    pub fn token(self) -> Option<TokenRef<'a>> {
        let token = match self {
            Self::Token(token) => return Some(token),
            Self::Chunk(chunk) => chunk.token,
            Self::Answer(answer) => answer.token.view(),
            _ => return None,
        };
        (!token.t.is_empty()).then_some(token)
    }

    /// What it counts for in a batch: the bytes that make a stream's event large.
    pub(super) fn weight(self) -> usize {
        match self {
            Self::Token(token) => token.t.len(),
            Self::Chunk(chunk) => chunk.data.len(),
            Self::Answer(answer) => answer.body.len(),
            _ => 0,
        }
    }

    /// A copy for whoever wants to keep it.
    pub fn to_event(self) -> TaskEvent {
        match self {
            Self::Started(started) => TaskEvent::Started(started.clone()),
            Self::Token(token) => TaskEvent::Token(token.to_token()),
            Self::Chunk(chunk) => TaskEvent::Chunk(Chunk {
                name: chunk.name.map(Into::into),
                data: chunk.data.into(),
                token: chunk.token.to_token(),
            }),
            Self::Answer(answer) => TaskEvent::Answer(Box::new(answer.clone())),
            Self::Metrics(metrics) => TaskEvent::Metrics(metrics.clone()),
            Self::End(end) => TaskEvent::End(Box::new(end.clone())),
            Self::Error(failure) => TaskEvent::Error(Box::new(failure.clone())),
        }
    }
}

impl TokenRef<'_> {
    fn to_token(self) -> Token {
        Token {
            t: self.t.into(),
            i: self.i,
        }
    }
}

impl Token {
    pub(super) fn view(&self) -> TokenRef<'_> {
        TokenRef {
            t: &self.t,
            i: self.i,
        }
    }
}

impl Chunk {
    pub(super) fn view(&self) -> ChunkRef<'_> {
        ChunkRef {
            name: self.name.as_deref(),
            data: &self.data,
            token: self.token.view(),
        }
    }
}

/// Data of `event: started`: the engine has begun with the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// The queue position the task was admitted with; 0 is next.
    pub queue_position: u32,
    /// What was predicted at admission, in milliseconds.
    pub predicted_start_ms: u64,
    /// What it came to, in milliseconds.
    pub waited_ms: u64,
}

/// Data of `event: token`: a piece of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// The text.
    #[schema(value_type = String)]
    pub t: ByteString,
    /// Counts pieces: 0, 1, 2 and so on without a gap.
    pub i: u64,
}

/// One event of a call's answer, as the engine sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Its `event:` name, where the API gives one.
    pub name: Option<ByteString>,
    pub data: ByteString,
    /// What it adds to the answer's text, if it does; `i` counts those that do.
    pub token: Token,
}

/// The whole answer to a call that does not stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub body: Bytes,
    /// The text in it, if there is any.
    pub token: Token,
}

/// Data of `event: metrics`, sent to verbose readers only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// Milliseconds since the engine took the task.
    pub elapsed_ms: u64,
}

/// Data of `event: end`: the task is over and its answer complete, or it was
/// cancelled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// Tokens of the prompt; absent if the task was cancelled before the engine
    /// had told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_in: Option<u64>,
    /// Tokens generated; of a cancelled task, the pieces it had streamed.
    pub tokens_out: u64,
    /// Time the engine spent on generating, in milliseconds; of a cancelled
    /// task, the time since the engine took it.
    pub decode_time_ms: f64,
    /// `stop`, `length` or `cancelled`.
    #[schema(value_type = String)]
    pub finish_reason: FinishReason,
    /// How often it lost its engine and was gone on with on another; left out for
    /// most tasks, which never did.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resumed: u32,
    /// What answered and how; absent where no engine took part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// Says which engine and model answered, and with which parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    pub engine: String,
    pub engine_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_digest: Option<String>,
    pub provisioning_mode: String,
    /// Which of the pool's replicas answered, where it has several places to ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// What the engine said at the end; absent if the task was cancelled.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub engine_says: Option<EngineSays>,
}

/// The engine's own words about a finished task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EngineSays {
    /// Prompt tokens taken from the engine's prompt cache.
    pub tokens_cached: u64,
    /// Time the engine spent on the prompt, in milliseconds.
    pub prompt_time_ms: f64,
    /// The parameters really in force.
    pub effective: serde_json::Value,
}

/// Data of `event: error`: the task is over without a complete answer. The
/// same body is the `error` member of an HTTP error answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// Stable; see the list in the API specification.
    #[schema(value_type = String)]
    pub code: ErrorCode,
    pub message: String,
    /// The next thing to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the same request may succeed later.
    pub retriable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The admission rule that refused the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            retriable: false,
            retry_after_ms: None,
            policy_label: None,
            pool_id: None,
            engine: None,
            correlation_id: None,
        }
    }
}
