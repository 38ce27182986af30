//! Which API a path belongs to, and how an error looks there.
//!
//! Clients of other APIs read errors in the shape that they know. The shape
//! follows from the path alone, so that it holds as well for what is answered
//! before a route is found: a wrong token, an unknown route, a body that is too
//! large.

use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::error::ErrorBody;
use super::openai::errors::{AnthropicError, OpenAiError};
use crate::services::event_log::Failure;

/// When to come back, in milliseconds, as the `OpenAI` libraries read it.
const RETRY_AFTER_MS: HeaderName = HeaderName::from_static("retry-after-ms");

/// Whether the libraries of `OpenAI` and Anthropic send the request again by
/// themselves; without it they go by the status.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// Whose API is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// Our own.
    Native,
    OpenAi,
    Anthropic,
}

impl Dialect {
    pub fn of(path: &str) -> Self {
        let below = |root: &str| {
            let rest = path.strip_prefix(root);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        if below("/v1/messages") {
            Self::Anthropic
        } else if below("/v1") || super::openai::is_short(path) {
            Self::OpenAi
        } else {
            Self::Native
        }
    }

    /// The name that the shape of its errors has in the API's description.
    pub fn error_schema(self) -> &'static str {
        match self {
            Self::Native => "ErrorBody",
            Self::OpenAi => "OpenAiError",
            Self::Anthropic => "AnthropicError",
        }
    }

    /// JSON; the failure holds the correlation id already.
    pub fn error_body(self, status: StatusCode, failure: &Failure) -> Vec<u8> {
        let written = match self {
            Self::Native => serde_json::to_vec(&ErrorBody {
                error: failure.clone(),
            }),
            Self::OpenAi => serde_json::to_vec(&OpenAiError::of(status, failure)),
            Self::Anthropic => serde_json::to_vec(&AnthropicError::of(status, failure)),
        };
        // They are strings and numbers, which JSON always holds.
        written.unwrap_or_default()
    }

    /// Adds what its clients look for beside `Retry-After`.
    pub fn error_headers(self, headers: &mut HeaderMap, failure: &Failure) {
        if self == Self::Native {
            return;
        }
        if let Some(after) = failure.retry_after_ms {
            headers.insert(RETRY_AFTER_MS, HeaderValue::from(after));
        }
        let again = if failure.retriable { "true" } else { "false" };
        headers.insert(SHOULD_RETRY, HeaderValue::from_static(again));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_tells_the_dialect() {
        for (path, dialect) in [
            ("/v1", Dialect::OpenAi),
            ("/v1/chat/completions", Dialect::OpenAi),
            ("/v1/nothing", Dialect::OpenAi),
            ("/v1/messages", Dialect::Anthropic),
            ("/v1/messages/count_tokens", Dialect::Anthropic),
            ("/v1/messagesx", Dialect::OpenAi),
            ("/rerank", Dialect::OpenAi),
            ("/tokenize", Dialect::OpenAi),
            ("/v10", Dialect::Native),
            ("/v2/tasks", Dialect::Native),
            ("/health", Dialect::Native),
            ("", Dialect::Native),
        ] {
            assert_eq!(Dialect::of(path), dialect, "{path}");
        }
    }
}
