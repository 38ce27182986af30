//! From a [`Failure`] to an HTTP answer.
//!
//! The status is chosen from the code alone. The body is written by the
//! correlation middleware, which knows the id that belongs into it, in the shape
//! of the API that was asked ([`super::dialect`]).

use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::app::server::BodyTimeout;
use crate::services::event_log::Failure;

/// The one shape of every error answer of our own API.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    pub error: Failure,
}

/// An error on its way to the client.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub status: StatusCode,
    pub failure: Failure,
}

impl ApiError {
    /// A request that is wrong in itself.
    pub fn invalid(message: impl Into<String>) -> Self {
        Failure::new(ErrorCode::InvalidParams, message).into()
    }

    /// Overrides the status that the code stands for, for the few cases that
    /// HTTP has a more exact one for.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.status = status;
        self
    }
}

/// What other servers call a client that closed its request; no client sends such
/// a request again by itself.
fn client_closed_request() -> StatusCode {
    // Within the range that the type takes.
    StatusCode::from_u16(499).unwrap_or(StatusCode::BAD_REQUEST)
}

pub(super) fn status_of(code: ErrorCode) -> StatusCode {
    match code {
        ErrorCode::InvalidParams | ErrorCode::ContextLengthExceeded => StatusCode::BAD_REQUEST,
        ErrorCode::Unauthorized => StatusCode::UNAUTHORIZED,
        ErrorCode::PoolNotFound | ErrorCode::ModelNotFound | ErrorCode::TaskNotFound => {
            StatusCode::NOT_FOUND
        }
        ErrorCode::QueueFull | ErrorCode::AdmissionReject => StatusCode::TOO_MANY_REQUESTS,
        ErrorCode::PoolUnready | ErrorCode::PoolUnavailable | ErrorCode::DeadlineUnmet => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        ErrorCode::DecodeTimeout => StatusCode::GATEWAY_TIMEOUT,
        ErrorCode::WorkerReset => StatusCode::BAD_GATEWAY,
        ErrorCode::Cancelled => client_closed_request(),
        ErrorCode::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self {
            status: status_of(failure.code),
            failure,
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        let mut error = Self::invalid(rejection.body_text()).with_status(rejection.status());
        if error.status == StatusCode::PAYLOAD_TOO_LARGE {
            "the body is larger than `tasks.max_body_bytes` allows"
                .clone_into(&mut error.failure.message);
        } else if let Some(timeout) = timeout_in(&rejection) {
            error = Self::invalid(timeout.to_string()).with_status(StatusCode::REQUEST_TIMEOUT);
            error.failure.retriable = true;
            error.failure.hint =
                Some("see `limits.body_stall_seconds` and `limits.body_seconds`".to_owned());
        }
        error
    }
}

/// The clock's word, if it was the clock that ended the body.
fn timeout_in(rejection: &BytesRejection) -> Option<BodyTimeout> {
    let mut cause = std::error::Error::source(rejection);
    while let Some(error) = cause {
        if let Some(timeout) = error.downcast_ref::<BodyTimeout>() {
            return Some(*timeout);
        }
        cause = error.source();
    }
    None
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid(rejection.body_text()).with_status(rejection.status())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid(rejection.body_text()).with_status(rejection.status())
    }
}

impl IntoResponse for ApiError {
    /// Leaves the error in the response's extensions for the middleware.
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}
