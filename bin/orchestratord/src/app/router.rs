//! The routes, and what every request passes through: the correlation id
//! (outermost, so that every answer has one), then the net for panics, then the
//! token, then the route.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::Response;
use axum::routing::get;
use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::state::AppState;
use crate::api::error::ApiError;
use crate::api::streams::{self, StreamCounts};
use crate::api::{admin, auth, catalog, correlation, health, meta, metrics, panics, pools, tasks};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "orchestratord",
        description = "Turns a bare machine into a working LLM endpoint: tasks in, tokens out over SSE."
    ),
    tags(
        (name = "tasks", description = "Submit, read and cancel tasks"),
        (name = "pools", description = "What serves, and how it is"),
        (name = "catalog", description = "Models on this machine"),
        (name = "admin", description = "Change the configuration while it runs"),
        (name = "meta", description = "What answers here"),
        (name = "health", description = "For supervisors and monitoring"),
    )
)]
struct Description;

fn described_routes(streams: Arc<StreamCounts>) -> OpenApiRouter<Arc<AppState>> {
    let streaming = OpenApiRouter::new()
        .routes(routes!(tasks::events))
        .route_layer(from_fn_with_state(streams, streams::bounded));
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(health::health))
        .routes(routes!(metrics::metrics))
        .routes(routes!(tasks::submit))
        .routes(routes!(tasks::show))
        .merge(streaming)
        .routes(routes!(tasks::cancel))
        .routes(routes!(pools::list))
        .routes(routes!(pools::show))
        .routes(routes!(pools::health))
        .routes(routes!(pools::drain))
        .routes(routes!(pools::resume))
        .routes(routes!(pools::reload))
        .routes(routes!(meta::capabilities))
        .routes(routes!(catalog::models))
        .routes(routes!(admin::reload, admin::show))
}

/// The description that `/openapi.json` serves, made from the handlers.
pub fn openapi() -> utoipa::openapi::OpenApi {
    described_routes(StreamCounts::new(0)).split_for_parts().1
}

pub fn router(state: Arc<AppState>) -> Router {
    let streams = StreamCounts::new(state.limits.streams_per_client);
    let (routes, description) = described_routes(streams).split_for_parts();
    routes
        .route(
            "/openapi.json",
            get(move || async move { Json(description) }),
        )
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(state.max_body_bytes))
        .layer(from_fn_with_state(Arc::clone(&state), auth::require_token))
        .layer(from_fn(panics::caught))
        .layer(from_fn_with_state(
            Arc::clone(&state),
            correlation::correlate,
        ))
        .with_state(state)
}

async fn no_route(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let mut error =
        ApiError::invalid(format!("there is no route `{path}`")).with_status(StatusCode::NOT_FOUND);
    error.failure.hint = Some("GET /openapi.json lists the routes".to_owned());
    error
}

async fn no_method(method: Method, request: Request) -> Result<Response, ApiError> {
    let path: String = request.uri().path().chars().take(200).collect();
    Err(
        ApiError::invalid(format!("`{path}` does not know the method {method}"))
            .with_status(StatusCode::METHOD_NOT_ALLOWED),
    )
}
