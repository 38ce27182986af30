//! What comes back from an engine.

use bytestring::ByteString;
use serde::{Deserialize, Serialize};

use crate::call::{CallAnswer, CallChunk};

/// One step of a task, in order: `Started`, then `Token` and `Metrics`, then
/// `End` exactly once, unless the stream fails first.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The engine has taken the task and begun with the prompt.
    Started,
    /// A piece of the answer: never empty, always whole characters. Indices
    /// count pieces: 0, 1, 2 and so on without a gap. With the prompt's tokens,
    /// and those generated up to and including this piece, by the engine's count:
    /// a piece may be several tokens. The text may be part of the buffer that it
    /// was read into.
    Token {
        text: ByteString,
        index: u64,
        tokens_in: u64,
        tokens_out: u64,
    },
    /// One event of the answer to a call, instead of `Token`.
    Chunk(CallChunk),
    /// The whole answer to a call that does not stream; `End` follows.
    Answer(CallAnswer),
    /// Figures in mid-stream, for verbose readers.
    Metrics(MetricsSnapshot),
    /// The answer is complete.
    End(EndSummary),
}

/// Figures in mid-stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct MetricsSnapshot {
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// Milliseconds since the engine took the task.
    pub elapsed_ms: u64,
}

/// What the engine says of a finished task.
#[derive(Debug, Clone, PartialEq)]
pub struct EndSummary {
    /// Tokens of the prompt, whether evaluated or taken from the cache.
    pub tokens_in: u64,
    /// Of those, how many the engine took from its prompt cache.
    pub tokens_cached: u64,
    /// Tokens generated, the engine's own count.
    pub tokens_out: u64,
    /// Time the engine spent on the prompt, in milliseconds.
    pub prompt_time_ms: f64,
    /// Time the engine spent on generating, in milliseconds.
    pub decode_time_ms: f64,
    pub finish_reason: FinishReason,
    /// The parameters that were really in force, in the engine's words.
    pub effective: serde_json::Value,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop text came.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// Somebody cancelled it.
    Cancelled,
}

/// Whether an engine takes work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EngineHealth {
    Ready,
    Loading,
}

/// What an engine says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineProps {
    /// For example `b11434`.
    pub version: String,
    pub model_path: Option<String>,
    /// Context length of one slot, in tokens.
    pub ctx: u32,
    pub slots: u32,
}

/// How a cancel went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CancelReport {
    /// The task was not running here.
    NotRunning,
    /// The engine was seen to have freed the slot after this many milliseconds.
    Freed { after_ms: u64 },
    /// The stream is closed, but the slot was not seen free within the bound.
    NotSeenFree { waited_ms: u64 },
    /// The stream is closed; this engine does not show its slots.
    NotShown,
}
