//! `/v2/catalog`: the models on this machine, and those on their way to it.
//!
//! - [`models`]: list, look at, remove
//! - [`verify`]: read a whole model again
//! - [`pulls`]: fetch a model
//! - [`view`]: a model as clients see it

pub mod models;
pub mod pulls;
pub mod verify;
pub mod view;

use axum::http::{HeaderMap, StatusCode};
use llama_orch_types::ErrorCode;

use super::error::ApiError;
use crate::services::event_log::Failure;

/// What is refused for the state of a model, not for how often it is asked.
fn conflict(failure: Failure) -> ApiError {
    let refused = failure.code == ErrorCode::AdmissionReject;
    let error = ApiError::from(failure);
    if refused {
        error.with_status(StatusCode::CONFLICT)
    } else {
        error
    }
}

/// Whether the client wants to watch instead of waiting for one answer.
fn wants_events(headers: &HeaderMap) -> bool {
    let accept = headers.get("accept").and_then(|value| value.to_str().ok());
    accept.is_some_and(|accept| accept.contains("text/event-stream"))
}
