//! `/v2/catalog/pulls`: models on their way to this machine.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::error::{ApiError, ErrorBody};
use crate::api::pools::requests::parse;
use crate::api::streams::EVENT_STREAM;
use crate::api::tasks::last_event_id;
use crate::app::state::AppState;
use crate::services::pulls::{Pull, PullView, PulledModel};
use crate::services::streaming::KEEP_ALIVE;
use crate::services::watched::stream::Watchable;
use crate::services::watched::{Standing, Work, stream};

/// What to pull.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// A profile, such as `haiku`, or any model reference.
    pub model: String,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PullsView {
    /// The oldest first. Finished ones are kept for an hour, at most a hundred.
    pub pulls: Vec<PullView>,
}

/// Fetch a model. A model that is on its way already is joined, and one that is
/// here is done at once. Two run at a time, others wait. A pull goes on after a
/// restart of the daemon, unless its reference holds a secret (`?…`), which is
/// not written down.
#[utoipa::path(
    post, path = "/v2/catalog/pulls", tag = "catalog", request_body = PullRequest,
    responses(
        (status = 202, body = PullView),
        (status = 400, body = ErrorBody),
        (status = 404, description = "No profile has this name", body = ErrorBody),
        (status = 429, description = "Too many pulls wait", body = ErrorBody),
    )
)]
pub async fn begin(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<PullView>), ApiError> {
    let request: PullRequest = parse(&body?)?;
    if request.model.trim().is_empty() {
        let mut error = ApiError::invalid("`model` is missing: it names what to pull");
        error.failure.hint = Some("send {\"model\": \"haiku\"}".to_owned());
        return Err(error);
    }
    let pull = state.pulls.begin(&request.model).await?;
    Ok((StatusCode::ACCEPTED, Json(pull)))
}

/// The pulls under way and those that are over.
#[utoipa::path(
    get, path = "/v2/catalog/pulls", tag = "catalog",
    responses((status = 200, body = PullsView))
)]
pub async fn list(State(state): State<Arc<AppState>>) -> Result<Json<PullsView>, ApiError> {
    let pulls = state.pulls.list().await?;
    Ok(Json(PullsView { pulls }))
}

/// Look at a pull.
#[utoipa::path(
    get, path = "/v2/catalog/pulls/{id}", tag = "catalog",
    params(("id" = String, Path)),
    responses((status = 200, body = PullView), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<PullView>, ApiError> {
    let Path(id) = path?;
    let (_, view) = state.pulls.show(&id).await?;
    Ok(Json(view))
}

/// Cancel a pull. What has arrived stays, and the next pull goes on with it. A
/// pull that is over is answered as it is.
#[utoipa::path(
    delete, path = "/v2/catalog/pulls/{id}", tag = "catalog",
    params(("id" = String, Path)),
    responses((status = 200, body = PullView), (status = 404, body = ErrorBody))
)]
pub async fn cancel(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<PullView>, ApiError> {
    let Path(id) = path?;
    Ok(Json(state.pulls.cancel(&id).await?))
}

/// Watch a pull. `Last-Event-ID` reads on from there.
#[utoipa::path(
    get, path = "/v2/catalog/pulls/{id}/events", tag = "catalog",
    params(("id" = String, Path), ("Last-Event-ID" = Option<u64>, Header, description = "The last id that was read")),
    responses(
        (status = 200, description = "`progress` at most four times a second, then one `done` (the pull as GET shows it; also of a cancelled one) or `error`", body = String, content_type = "text/event-stream"),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 429, description = "The client has as many streams open as it may", body = ErrorBody),
    )
)]
pub async fn events(
    State(state): State<Arc<AppState>>,
    method: Method,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let Path(id) = path?;
    let (pull, _) = state.pulls.show(&id).await?;
    let after = last_event_id(&headers)?;
    if method == Method::HEAD {
        // Somebody who only looks at the headers is no reader.
        return Ok(EVENT_STREAM.into_response());
    }
    let events = stream::events(pull, after, KEEP_ALIVE);
    Ok((EVENT_STREAM, Body::from_stream(events)).into_response())
}

impl Watchable for Pull {
    type Result = PulledModel;
    type End = PullView;

    fn work(&self) -> &Work<PulledModel> {
        &self.work
    }

    fn end(&self, standing: &Standing<PulledModel>) -> PullView {
        self.view(standing, None)
    }
}
