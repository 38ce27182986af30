//! A panic in a handler is a fault of ours in one request: it is answered, and
//! the daemon goes on.

use std::future::Future;
use std::panic::AssertUnwindSafe;

use axum::response::{IntoResponse, Response};
use futures::FutureExt;

use super::error::ApiError;
use crate::services::event_log::Failure;

/// Around everything that may panic. What handlers share stays whole: its locks are
/// held for single operations only.
pub async fn caught(answer: impl Future<Output = Response>) -> Response {
    let answer = AssertUnwindSafe(answer).catch_unwind().await;
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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::StatusCode;

    #[tokio::test]
    async fn a_handler_that_panics_is_answered() {
        let faulty = async { panic!("never mind") };
        let mut answer = caught(faulty).await;
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let error: ApiError = answer.extensions_mut().remove().unwrap();
        assert!(!error.failure.message.contains("never mind"));
        let well = caught(async { "well".into_response() }).await;
        assert_eq!(well.status(), StatusCode::OK);
    }
}
