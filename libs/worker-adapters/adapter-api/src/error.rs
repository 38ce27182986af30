//! How an engine fails.

use std::fmt;
use std::time::Duration;

use llama_orch_types::{ErrorCode, Hinted};

type Source = Box<dyn std::error::Error + Send + Sync>;

/// Why an engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("the engine refused the request: {message}")]
    InvalidParams { message: String },
    #[error("the prompt has {prompt_tokens} tokens and the context holds {ctx}")]
    ContextLengthExceeded { prompt_tokens: u64, ctx: u64 },
    #[error("the engine at {url} is still loading")]
    Loading { url: String },
    #[error("the engine at {url} could not be reached")]
    Unreachable {
        url: String,
        #[source]
        source: Source,
    },
    /// It is there, and takes no task: not now, or not from us.
    #[error("the engine at {url} takes no task: {reason}")]
    Unavailable {
        url: String,
        reason: String,
        /// How long it is to be left alone, where it is only busy.
        retry_after: Option<Duration>,
    },
    #[error("the engine gave no {phase} within {} ms", .after.as_millis())]
    Timeout {
        phase: TimeoutPhase,
        after: Duration,
    },
    #[error("the engine broke off in mid-stream: {reason}")]
    Reset { reason: String },
    #[error("the engine answered with something that is not its protocol: {what}")]
    Protocol { what: String },
    #[error("this engine does not offer {what}")]
    NotOffered { what: String },
    #[error("the task was cancelled")]
    Cancelled,
}

/// What was being waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeoutPhase {
    Connect,
    /// An answer to a request that streams nothing.
    Response,
    FirstToken,
    NextToken,
}

impl fmt::Display for TimeoutPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connection",
            Self::Response => "answer",
            Self::FirstToken => "first token",
            Self::NextToken => "next token",
        })
    }
}

impl WorkerError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::InvalidParams { .. } | Self::NotOffered { .. } => ErrorCode::InvalidParams,
            Self::ContextLengthExceeded { .. } => ErrorCode::ContextLengthExceeded,
            Self::Loading { .. } => ErrorCode::PoolUnready,
            // An engine that takes no connection has not begun to decode.
            Self::Unreachable { .. }
            | Self::Unavailable { .. }
            | Self::Timeout {
                phase: TimeoutPhase::Connect,
                ..
            } => ErrorCode::PoolUnavailable,
            Self::Timeout { .. } => ErrorCode::DecodeTimeout,
            // The engine's fault, not ours: it is no longer relied on.
            Self::Reset { .. } | Self::Protocol { .. } => ErrorCode::WorkerReset,
            // Cancelled is an outcome, and whoever cancelled knows of it.
            Self::Cancelled => ErrorCode::Internal,
        }
    }

    /// Whether the engine is to blame for it: it answered, and not as a sound
    /// engine does. One that is not there, or is slow, is told apart elsewhere.
    pub fn casts_doubt(&self) -> bool {
        matches!(self, Self::Protocol { .. } | Self::Reset { .. })
    }

    /// Whether the same task may succeed if it is sent again.
    pub fn retriable(&self) -> bool {
        match self {
            Self::InvalidParams { .. }
            | Self::NotOffered { .. }
            | Self::ContextLengthExceeded { .. }
            | Self::Cancelled => false,
            Self::Loading { .. }
            | Self::Unreachable { .. }
            | Self::Unavailable { .. }
            | Self::Timeout { .. }
            | Self::Reset { .. }
            | Self::Protocol { .. } => true,
        }
    }
}

impl Hinted for WorkerError {
    fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::ContextLengthExceeded { .. } => {
                "shorten the prompt or lower max_tokens, or give the pool a larger `ctx`"
            }
            Self::Timeout {
                phase: TimeoutPhase::FirstToken | TimeoutPhase::NextToken,
                ..
            } => {
                "the machine may be overloaded; the engine's log in the cache directory tells more"
            }
            Self::Reset { .. } => "send the task again; the engine is being restarted",
            Self::Protocol { .. } => {
                "send the task again; if it stays so, this build of the engine does not fit: see `engine_version` in GET /v2/pools"
            }
            Self::Loading { .. }
            | Self::Unreachable { .. }
            | Self::Unavailable { .. }
            | Self::Timeout {
                phase: TimeoutPhase::Connect,
                ..
            } => "wait until the pool is ready",
            _ => return None,
        };
        Some(hint.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_that_takes_no_connection_is_not_one_that_hangs() {
        let timeout = |phase| WorkerError::Timeout {
            phase,
            after: Duration::from_secs(1),
        };
        let connect = timeout(TimeoutPhase::Connect);
        assert_eq!(connect.code(), ErrorCode::PoolUnavailable);
        assert!(connect.retriable() && connect.hint().is_some());
        assert_eq!(
            timeout(TimeoutPhase::FirstToken).code(),
            ErrorCode::DecodeTimeout
        );
    }
}
