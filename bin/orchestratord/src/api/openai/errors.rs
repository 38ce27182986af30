//! Errors as the clients of `OpenAI`'s and of Anthropic's API know them.
//!
//! Here alone our codes become the `type` and `code` of those APIs; the HTTP
//! status is the one that our own API would answer with. Many clients show the
//! message only, so it holds the hint as well.

use axum::http::StatusCode;
use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::services::event_log::Failure;

/// An error in `OpenAI`'s shape, with what we know beyond it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpenAiError {
    pub error: OpenAiErrorDetails,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OpenAiErrorDetails {
    /// With the hint.
    pub message: String,
    /// For example `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The parameter that is wrong, where it is known to be one.
    pub param: Option<String>,
    /// Our own code in small letters, which is `OpenAI`'s where it has one; a wrong
    /// token is `invalid_api_key`.
    pub code: String,
    #[serde(flatten)]
    pub more: MoreDetails,
}

/// An error in Anthropic's shape, with what we know beyond it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AnthropicError {
    /// `error`.
    #[serde(rename = "type")]
    pub kind: String,
    pub error: AnthropicErrorDetails,
    /// The correlation id.
    pub request_id: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct AnthropicErrorDetails {
    /// For example `invalid_request_error`.
    #[serde(rename = "type")]
    pub kind: String,
    /// With the hint.
    pub message: String,
    /// As in `OpenAI`'s shape; Anthropic has none.
    pub code: String,
    #[serde(flatten)]
    pub more: MoreDetails,
}

/// What neither API has a place for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct MoreDetails {
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
    pub correlation_id: Option<String>,
}

impl MoreDetails {
    fn of(failure: &Failure) -> Self {
        Self {
            hint: failure.hint.clone(),
            retriable: failure.retriable,
            retry_after_ms: failure.retry_after_ms,
            policy_label: failure.policy_label.clone(),
            pool_id: failure.pool_id.clone(),
            correlation_id: failure.correlation_id.clone(),
        }
    }
}

impl OpenAiError {
    pub fn of(status: StatusCode, failure: &Failure) -> Self {
        let param = (failure.code == ErrorCode::ModelNotFound).then(|| "model".to_owned());
        Self {
            error: OpenAiErrorDetails {
                message: in_one(failure),
                kind: openai_kind(status).to_owned(),
                param,
                code: code(failure.code),
                more: MoreDetails::of(failure),
            },
        }
    }
}

impl AnthropicError {
    pub fn of(status: StatusCode, failure: &Failure) -> Self {
        Self {
            kind: "error".to_owned(),
            error: AnthropicErrorDetails {
                kind: anthropic_kind(status).to_owned(),
                message: in_one(failure),
                code: code(failure.code),
                more: MoreDetails::of(failure),
            },
            request_id: failure.correlation_id.clone(),
        }
    }
}

/// Message and hint.
fn in_one(failure: &Failure) -> String {
    match &failure.hint {
        Some(hint) => format!("{} ({hint})", failure.message),
        None => failure.message.clone(),
    }
}

fn code(code: ErrorCode) -> String {
    match code {
        ErrorCode::Unauthorized => "invalid_api_key".to_owned(),
        code => code.as_str().to_ascii_lowercase(),
    }
}

fn openai_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        408 | 504 => "timeout_error",
        429 => "rate_limit_error",
        499 => "request_cancelled",
        503 => "service_unavailable_error",
        500.. => "server_error",
        _ => "invalid_request_error",
    }
}

fn anthropic_kind(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 => "authentication_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        408 | 504 => "timeout_error",
        429 => "rate_limit_error",
        503 => "overloaded_error",
        // A cancel is nobody's mistake, and Anthropic has no word for it.
        499.. => "api_error",
        _ => "invalid_request_error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::error::status_of;

    #[test]
    fn each_code_has_its_type_in_both_shapes() {
        for (given, status, openai, anthropic) in [
            (
                ErrorCode::InvalidParams,
                400,
                "invalid_request_error",
                "invalid_request_error",
            ),
            (
                ErrorCode::ContextLengthExceeded,
                400,
                "invalid_request_error",
                "invalid_request_error",
            ),
            (
                ErrorCode::Unauthorized,
                401,
                "authentication_error",
                "authentication_error",
            ),
            (
                ErrorCode::ModelNotFound,
                404,
                "invalid_request_error",
                "not_found_error",
            ),
            (
                ErrorCode::PoolNotFound,
                404,
                "invalid_request_error",
                "not_found_error",
            ),
            (
                ErrorCode::TaskNotFound,
                404,
                "invalid_request_error",
                "not_found_error",
            ),
            (
                ErrorCode::QueueFull,
                429,
                "rate_limit_error",
                "rate_limit_error",
            ),
            (
                ErrorCode::AdmissionReject,
                429,
                "rate_limit_error",
                "rate_limit_error",
            ),
            (ErrorCode::Cancelled, 499, "request_cancelled", "api_error"),
            (ErrorCode::Internal, 500, "server_error", "api_error"),
            (ErrorCode::WorkerReset, 502, "server_error", "api_error"),
            (
                ErrorCode::PoolUnready,
                503,
                "service_unavailable_error",
                "overloaded_error",
            ),
            (
                ErrorCode::PoolUnavailable,
                503,
                "service_unavailable_error",
                "overloaded_error",
            ),
            (
                ErrorCode::DeadlineUnmet,
                503,
                "service_unavailable_error",
                "overloaded_error",
            ),
            (
                ErrorCode::DecodeTimeout,
                504,
                "timeout_error",
                "timeout_error",
            ),
        ] {
            let failure = Failure::new(given, "what happened").with_hint("what to do");
            let found = status_of(given);
            assert_eq!(found.as_u16(), status, "{given}");
            let error = OpenAiError::of(found, &failure).error;
            assert_eq!(
                (error.kind.as_str(), error.message.as_str()),
                (openai, "what happened (what to do)")
            );
            assert_eq!(error.param.is_some(), given == ErrorCode::ModelNotFound);
            let error = AnthropicError::of(found, &failure).error;
            assert_eq!(error.kind, anthropic, "{given}");
        }
    }

    #[test]
    fn both_shapes_as_clients_see_them() {
        let mut failure = Failure::new(ErrorCode::ModelNotFound, "no pool serves `x`")
            .with_hint("did you mean `y`?");
        failure.correlation_id = Some("c-1".to_owned());
        let openai = serde_json::to_string(&OpenAiError::of(StatusCode::NOT_FOUND, &failure));
        insta::assert_snapshot!(openai.unwrap(), @r#"{"error":{"message":"no pool serves `x` (did you mean `y`?)","type":"invalid_request_error","param":"model","code":"model_not_found","hint":"did you mean `y`?","retriable":false,"correlation_id":"c-1"}}"#);
        let anthropic = serde_json::to_string(&AnthropicError::of(StatusCode::NOT_FOUND, &failure));
        insta::assert_snapshot!(anthropic.unwrap(), @r#"{"type":"error","error":{"type":"not_found_error","message":"no pool serves `x` (did you mean `y`?)","code":"model_not_found","hint":"did you mean `y`?","retriable":false,"correlation_id":"c-1"},"request_id":"c-1"}"#);
    }
}
