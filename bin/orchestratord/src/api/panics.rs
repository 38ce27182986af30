//! A panic in a handler is a fault of ours in one request: it is answered, and
//! the daemon goes on.

use std::panic::AssertUnwindSafe;

use axum::extract::Request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;

use super::error::ApiError;
use crate::services::event_log::Failure;

/// Layer around everything that may panic. What handlers share stays whole: its
/// locks are held for single operations only.
pub async fn caught(request: Request, next: Next) -> Response {
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    answer.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no text");
        tracing::error!(panic = ?text, "a handler panicked");
        // What it said may hold anything; it is for the log.
        ApiError::from(Failure::internal("the request could not be handled")).into_response()
    })
}
