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

#[cfg(test)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::middleware::from_fn;
    use axum::routing::get;
    use hyper::service::Service;
    use hyper_util::service::TowerToHyperService;

    #[tokio::test]
    async fn a_handler_that_panics_is_answered() {
        async fn faulty() -> &'static str {
            panic!("never mind")
        }
        let routes = Router::new()
            .route("/faulty", get(faulty))
            .route("/well", get(async || "well"))
            .layer(from_fn(caught));
        let service = TowerToHyperService::new(routes);
        let ask = async |path: &str| {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            service.call(request).await.unwrap()
        };
        let mut answer = ask("/faulty").await;
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        let error: ApiError = answer.extensions_mut().remove().unwrap();
        assert!(!error.failure.message.contains("never mind"));
        assert_eq!(ask("/well").await.status(), StatusCode::OK);
    }
}
