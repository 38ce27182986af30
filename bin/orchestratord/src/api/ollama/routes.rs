//! The routes that need no engine: what answers here, and what is not offered.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use axum::{Json, Router};
use llama_orch_types::ErrorCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::errors::OllamaError;
use super::request::{check_model, parse};
use super::{models, plain_name};
use crate::api::error::ApiError;
use crate::app::state::AppState;
use crate::services::event_log::Failure;

/// The version of Ollama whose API is followed. Clients ask for it to see what they
/// may use.
const FOLLOWED: &str = "0.12.11";

/// That somebody is here: what these clients ask first.
#[utoipa::path(
    get, path = "/", tag = "ollama",
    responses((status = 200, description = "A line of text", body = String, content_type = "text/plain"))
)]
pub async fn root() -> &'static str {
    "orchestratord is running"
}

/// Which version of Ollama's API is followed, and what follows it.
#[utoipa::path(
    get, path = "/api/version", tag = "ollama",
    responses((status = 200, description = "`version`", body = Object))
)]
pub async fn version() -> Json<Value> {
    Json(json!({
        "version": FOLLOWED,
        "server": "orchestratord",
        "server_version": env!("CARGO_PKG_VERSION"),
    }))
}

/// Body of `POST /api/pull`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PullRequest {
    model: String,
    /// What older clients say.
    name: String,
    stream: Option<bool>,
}

/// Says that a model is here, if it is. None is fetched: which models there are is
/// the configuration's word.
#[utoipa::path(
    post, path = "/api/pull", tag = "ollama",
    request_body(content = Object, description = "`model`"),
    responses(
        (status = 200, description = "`status: success`", body = Object),
        (status = 404, body = OllamaError),
    )
)]
pub async fn pull(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: PullRequest = parse(body?).await?;
    let name = [request.model, request.name]
        .into_iter()
        .find(|name| !name.is_empty())
        .unwrap_or_default();
    check_model(&name)?;
    let pool = state.pool_named(Some(plain_name(&name)));
    let pool = pool.map_err(|failure| {
        let hint = failure.hint.clone().unwrap_or_default();
        failure.with_hint(format!(
            "{hint}; a model is added by a pool in the configuration; `orchestratord models pull <reference>` fetches one"
        ))
    })?;
    if !models::is_here(&state, &pool).await? {
        return Err(models::not_here(&pool).into());
    }
    let kind = if request.stream.unwrap_or(true) {
        "application/x-ndjson"
    } else {
        "application/json; charset=utf-8"
    };
    Ok(([(CONTENT_TYPE, kind)], "{\"status\":\"success\"}\n").into_response())
}

/// Routes that are not offered, and what to do instead.
const NOT_OFFERED: [(&str, &str); 7] = [
    (
        "/api/push",
        "models are not published from here; use the registry's own tools",
    ),
    (
        "/api/create",
        "a model is added by a pool in the configuration; `orchestratord reload` applies it",
    ),
    (
        "/api/copy",
        "a further name is an entry of the pool's `aliases`; `orchestratord reload` applies it",
    ),
    (
        "/api/delete",
        "take the pool out of the configuration, then `orchestratord models remove <model>`",
    ),
    (
        "/api/blobs/{digest}",
        "`orchestratord models pull <reference>` fetches a file; `file:` references use one in place",
    ),
    (
        "/api/signin",
        "there is nothing to sign in to; a token is sent as `Authorization: Bearer <token>`",
    ),
    ("/api/signout", "there is nothing to sign out of"),
];

/// Refuses what is not offered, whatever the method.
pub fn not_offered() -> Router<Arc<AppState>> {
    let mut router = Router::new();
    for (path, instead) in NOT_OFFERED {
        let refuse = move |method: Method, uri: Uri| async move { refusal(&method, &uri, instead) };
        router = router.route(path, any(refuse));
    }
    router
}

fn refusal(method: &Method, uri: &Uri, instead: &str) -> ApiError {
    let path = crate::services::failure::shortened(uri.path());
    let failure = Failure::new(
        ErrorCode::InvalidParams,
        format!("{method} {path} is not offered"),
    )
    .with_hint(instead);
    ApiError::from(failure).with_status(StatusCode::NOT_IMPLEMENTED)
}
