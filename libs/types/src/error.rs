//! Stable error codes, and hints for people.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The stable name of an error. Clients match on it, so a name never changes
/// its meaning. The mapping to an HTTP status is orchestratord's alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ErrorCode {
    /// The request is wrong; sending it again will not help.
    InvalidParams,
    /// Prompt and answer do not fit the model's context.
    ContextLengthExceeded,
    /// Admission refused the task for a reason other than a full queue.
    AdmissionReject,
    /// The pool's queue is full; come back after `retry_after_ms`.
    QueueFull,
    /// The task could not start before its deadline.
    DeadlineUnmet,
    /// No pool has this name.
    PoolNotFound,
    /// The pool is not ready yet.
    PoolUnready,
    /// The pool cannot serve: its engine or model could not be provided.
    PoolUnavailable,
    /// No model has this name.
    ModelNotFound,
    /// No task has this id (any more).
    TaskNotFound,
    /// The engine gave no token in time.
    DecodeTimeout,
    /// The engine went away in mid-stream.
    WorkerReset,
    /// Somebody cancelled the task that the answer was to come from.
    Cancelled,
    /// The bearer token is missing or wrong.
    Unauthorized,
    /// A fault of ours.
    Internal,
}

impl ErrorCode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidParams => "INVALID_PARAMS",
            Self::ContextLengthExceeded => "CONTEXT_LENGTH_EXCEEDED",
            Self::AdmissionReject => "ADMISSION_REJECT",
            Self::QueueFull => "QUEUE_FULL",
            Self::DeadlineUnmet => "DEADLINE_UNMET",
            Self::PoolNotFound => "POOL_NOT_FOUND",
            Self::PoolUnready => "POOL_UNREADY",
            Self::PoolUnavailable => "POOL_UNAVAILABLE",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::TaskNotFound => "TASK_NOT_FOUND",
            Self::DecodeTimeout => "DECODE_TIMEOUT",
            Self::WorkerReset => "WORKER_RESET",
            Self::Cancelled => "CANCELLED",
            Self::Unauthorized => "UNAUTHORIZED",
            Self::Internal => "INTERNAL",
        }
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error that may know the next thing to try. The hint stands apart from
/// the message, which only states facts: whoever shows the error prints the
/// hint last, after the chain of causes.
pub trait Hinted: std::error::Error {
    fn hint(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_json_name_is_the_displayed_name() {
        for code in [
            ErrorCode::InvalidParams,
            ErrorCode::ContextLengthExceeded,
            ErrorCode::AdmissionReject,
            ErrorCode::QueueFull,
            ErrorCode::DeadlineUnmet,
            ErrorCode::PoolNotFound,
            ErrorCode::PoolUnready,
            ErrorCode::PoolUnavailable,
            ErrorCode::ModelNotFound,
            ErrorCode::TaskNotFound,
            ErrorCode::DecodeTimeout,
            ErrorCode::WorkerReset,
            ErrorCode::Cancelled,
            ErrorCode::Unauthorized,
            ErrorCode::Internal,
        ] {
            assert_eq!(
                serde_json::to_string(&code).unwrap(),
                format!("\"{}\"", code.as_str())
            );
        }
    }
}
