//! What can be asked of a pool: start, stop, unload, drain, resume, reload.
//! Each answers at once with the pool as it is then; `state` tells how it goes on.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use llama_orch_types::ErrorCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::PoolView;
use crate::api::error::{ApiError, ErrorBody};
#[cfg(feature = "provisioning")]
use crate::app::config::Unfit;
use crate::app::state::AppState;
use crate::services::event_log::Failure;
use crate::services::pool::{PoolHandle, ReloadRequest, Unload, UnloadCause};

/// A day.
const MAX_DEADLINE_MS: u64 = 86_400_000;

type Answer = Result<(StatusCode, Json<PoolView>), ApiError>;

/// How a pool is to be drained.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// How long admitted tasks may go on, in milliseconds (0 to 86400000).
    /// Default: `drain_seconds` of the configuration.
    #[schema(maximum = 86_400_000)]
    pub deadline_ms: Option<u64>,
}

/// How a pool's engine is to be unloaded.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct UnloadRequest {
    /// Also while tasks run or wait: running ones finish, in their own time, no
    /// further one begins, and those that wait then have the engine loaded again.
    #[serde(rename = "yield")]
    pub yields: bool,
}

fn accepted(pool: &PoolHandle) -> (StatusCode, Json<PoolView>) {
    (StatusCode::ACCEPTED, Json(PoolView::of(pool)))
}

/// Free the memory of a pool's engine. Tasks are taken all along, and the next
/// one has an engine loaded again, whatever the pool's `load` says. 409 while
/// tasks run or wait, unless `yield` is true; 409 while the engine is loaded for
/// tasks that wait, while a reload is under way, and for a pool that is drained or
/// stopped.
#[utoipa::path(
    post, path = "/v2/pools/{id}/unload", tag = "pools",
    params(("id" = String, Path)), request_body = Option<UnloadRequest>,
    responses(
        (status = 202, body = PoolView), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn unload(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let request: UnloadRequest = parse(&body?)?;
    let how = if request.yields {
        Unload::Yield
    } else {
        Unload::IfIdle
    };
    let unloaded = pool.unload(how, UnloadCause::Asked).await;
    unloaded.map_err(conflict)?;
    Ok(accepted(&pool))
}

/// Have a pool's engine loaded and take tasks: starts one that is unloaded, is
/// stopped, has failed or waits for its next try, and takes a stop or an unload
/// back that is under way. A pool that is ready or on its way stays as it is.
#[utoipa::path(
    post, path = "/v2/pools/{id}/start", tag = "pools",
    params(("id" = String, Path)),
    responses((status = 202, body = PoolView), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub async fn start(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    pool.resume().await?;
    Ok(accepted(&pool))
}

/// Let a pool finish what it has admitted, stop its engine, and refuse tasks until
/// it is started: the same as `drain`.
#[utoipa::path(
    post, path = "/v2/pools/{id}/stop", tag = "pools",
    params(("id" = String, Path)), request_body = Option<DrainRequest>,
    responses(
        (status = 202, body = PoolView), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn stop(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    drain_by(&pool, &body?).await
}

/// Let a pool finish what it has admitted, and stop its engine. New tasks are
/// refused from now on, until the pool is resumed. Tasks that are not over in
/// time end with one retriable error. Answers at once; `state` shows how far
/// it is.
#[utoipa::path(
    post, path = "/v2/pools/{id}/drain", tag = "pools",
    params(("id" = String, Path)), request_body = Option<DrainRequest>,
    responses(
        (status = 202, body = PoolView), (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn drain(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    drain_by(&pool, &body?).await
}

async fn drain_by(pool: &PoolHandle, body: &[u8]) -> Answer {
    let request: DrainRequest = parse(body)?;
    let deadline = match request.deadline_ms {
        Some(ms) if ms > MAX_DEADLINE_MS => {
            let message = format!("`deadline_ms` must be at most {MAX_DEADLINE_MS}");
            return Err(ApiError::invalid(message));
        }
        Some(ms) => Duration::from_millis(ms),
        None => pool.settings().drain,
    };
    pool.drain_pool(deadline).await?;
    Ok(accepted(pool))
}

/// Take tasks again: the same as `start`. Ends a drain, and starts the engine of a pool that is
/// stopped, has failed or waits for its next try. A pool that is ready or on
/// its way stays as it is.
#[utoipa::path(
    post, path = "/v2/pools/{id}/resume", tag = "pools",
    params(("id" = String, Path)),
    responses((status = 202, body = PoolView), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub async fn resume(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    pool.resume().await?;
    Ok(accepted(&pool))
}

/// Replace a pool's engine by one with another model or other flags, or by a
/// new one of the same. Where memory allows, the new engine is started beside
/// the old one and takes over once it has completed a task; if it cannot, the
/// old one stays. No admitted task is lost. Answers at once; `reload` shows how
/// far it is. 409 while another reload is under way or the pool is drained.
#[utoipa::path(
    post, path = "/v2/pools/{id}/reload", tag = "pools",
    params(("id" = String, Path)), request_body = Option<ReloadRequest>,
    responses(
        (status = 202, body = PoolView), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 503, body = ErrorBody),
    )
)]
pub async fn reload(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
    body: Result<Bytes, BytesRejection>,
) -> Answer {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let request: ReloadRequest = parse(&body?)?;
    #[cfg(feature = "provisioning")]
    request
        .applied_to(&pool.settings().config)
        .check_launch(&pool.settings().id, &state.model_settings)
        .map_err(unfit)?;
    pool.reload(request).await.map_err(conflict)?;
    Ok(accepted(&pool))
}

/// What no engine can be started with is refused before one is.
#[cfg(feature = "provisioning")]
fn unfit(unfit: Unfit) -> ApiError {
    let message = format!("`{}`: {}", unfit.key, unfit.problem);
    Failure::new(ErrorCode::InvalidParams, message)
        .with_hint(unfit.hint)
        .into()
}

/// A reload is refused for the pool's state, not for how often it is asked.
fn conflict(failure: Failure) -> ApiError {
    let refused = failure.code == ErrorCode::AdmissionReject;
    let error = ApiError::from(failure);
    if refused {
        error.with_status(StatusCode::CONFLICT)
    } else {
        error
    }
}

/// A body of JSON; none at all stands for the defaults.
pub(in crate::api) fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    match body.trim_ascii_start().first() {
        None => return Ok(T::default()),
        Some(b'{') => {}
        // A list would otherwise be taken for the fields in their order.
        Some(_) => return Err(ApiError::invalid("a JSON object is expected")),
    }
    serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid(format!("the body cannot be read: {error}")))
}
