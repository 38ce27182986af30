//! `/v2/pools`: what there is, and how it is.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Json;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use llama_orch_types::ErrorCode;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use worker_adapters_adapter_api::ReplicaStatus;

use super::error::{ApiError, ErrorBody};
use super::tasks::Preparation;
#[cfg(feature = "provisioning")]
use crate::app::config::Unfit;
use crate::app::state::AppState;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle, ReloadRequest, ReloadView, Restarts, Transition};

/// Log lines that a view shows.
const LOG_LINES: usize = 20;

/// A day.
const MAX_DEADLINE_MS: u64 = 86_400_000;

/// A pool as it is now.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    pub pool_id: String,
    pub engine: String,
    /// The model as the configuration names it.
    pub model: String,
    /// The engine's further flags: the configuration's, or those of the last
    /// reload.
    pub flags: Vec<String>,
    pub state: Phase,
    /// Milliseconds in this state.
    pub in_state_ms: u64,
    pub queue: QueueView,
    /// Tasks in the engine.
    pub running: u64,
    pub slots: u32,
    /// The running mean of what tasks take in the engine, in milliseconds.
    pub mean_service_ms: u64,
    /// How many tasks that mean rests on.
    pub measured_tasks: u64,
    /// Engines that ended without being asked to.
    pub engine_exits: u64,
    /// Engines that had to be started again, by cause.
    pub restarts: Restarts,
    /// How long until the engine is tried again, in milliseconds, in `backoff`
    /// and `failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_try_ms: Option<u64>,
    /// The last changes of state, the oldest first; at most 20. Only where one
    /// pool is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transitions: Vec<TransitionView>,
    /// The reload under way, or the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reload: Option<ReloadView>,
    /// The last lines of the engine's log; of the last engine, if none runs.
    /// Only where one pool is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub engine_log: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaView>,
    /// The places where an engine elsewhere runs. Only where one pool is asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replicas: Vec<RemoteView>,
    /// Why the pool failed or backs off; once it is ready, the last such reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<Failure>,
    /// When that was, as RFC 3339 has it, in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error_at: Option<String>,
    pub preparation: Preparation,
}

/// One change of a pool's state.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct TransitionView {
    pub from: Phase,
    pub to: Phase,
    pub cause: String,
    /// When, as RFC 3339 has it, in UTC.
    pub at: String,
}

impl TransitionView {
    fn of(transition: &Transition) -> Self {
        Self {
            from: transition.from,
            to: transition.to,
            cause: transition.cause.clone(),
            at: rfc3339(transition.at),
        }
    }
}

/// A time for clients, to the millisecond.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    // Fails only where the clock is thousands of years off.
    let time = Timestamp::try_from(time).unwrap_or_default();
    format!("{time:.3}")
}

/// How a pool is to be drained.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// How long admitted tasks may go on, in milliseconds (0 to 86400000).
    /// Default: `drain_seconds` of the configuration.
    #[schema(maximum = 86_400_000)]
    pub deadline_ms: Option<u64>,
}

/// What waits in a pool.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct QueueView {
    pub interactive: u64,
    pub batch: u64,
    pub capacity: u64,
}

/// The engine process behind a pool.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ReplicaView {
    pub replica_id: String,
    pub engine_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_digest: Option<String>,
    pub provisioning_mode: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// Context length of one slot, in tokens.
    pub ctx: u32,
    pub url: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
}

/// One replica of an engine elsewhere.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct RemoteView {
    pub replica_id: String,
    /// Without credentials.
    pub url: String,
    /// Whether it is given tasks.
    pub healthy: bool,
    /// Tasks on it.
    pub running: u32,
    pub slots: u32,
    /// Why it is given none, or the last such reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error: Option<String>,
}

impl From<ReplicaStatus> for RemoteView {
    fn from(status: ReplicaStatus) -> Self {
        Self {
            replica_id: status.id.to_string(),
            url: status.url,
            healthy: status.healthy,
            running: status.running,
            slots: status.slots,
            last_error: status.last_error,
        }
    }
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolsView {
    pub pools: Vec<PoolView>,
}

/// Whether a pool takes tasks to its engine.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolHealth {
    pub pool_id: String,
    pub ready: bool,
    pub state: Phase,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<Failure>,
    /// When that was, as RFC 3339 has it, in UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_error_at: Option<String>,
    pub preparation: Preparation,
}

impl PoolView {
    /// Without what has happened: for a list.
    pub fn brief(pool: &PoolHandle) -> Self {
        Self {
            transitions: Vec::new(),
            engine_log: Vec::new(),
            ..Self::of(pool)
        }
    }

    pub fn of(pool: &PoolHandle) -> Self {
        let snapshot = pool.snapshot();
        let settings = &snapshot.settings;
        let replica = snapshot.context.as_ref().map(|context| ReplicaView {
            replica_id: context.replica_id.to_string(),
            engine_version: context.engine_version.clone(),
            engine_digest: context.engine_digest.map(|digest| digest.to_string()),
            provisioning_mode: context.provisioning_mode.to_string(),
            model_digest: context.model.as_ref().map(|model| model.digest.to_string()),
            ctx: context.ctx,
            url: context.url.clone(),
            pid: context.pid,
        });
        Self {
            pool_id: settings.id.to_string(),
            engine: settings.engine.to_string(),
            model: settings.model.clone(),
            flags: settings.config.flags.clone(),
            state: snapshot.phase,
            in_state_ms: snapshot.since.elapsed().as_millis() as u64,
            queue: QueueView {
                interactive: snapshot.queued_interactive as u64,
                batch: snapshot.queued_batch as u64,
                capacity: settings.queue_capacity as u64,
            },
            running: snapshot.running as u64,
            slots: snapshot.slots,
            mean_service_ms: snapshot.times.mean().as_millis() as u64,
            measured_tasks: snapshot.times.measured(),
            engine_exits: snapshot.engine_exits,
            restarts: snapshot.restarts,
            next_try_ms: snapshot.next_try.map(|next| {
                let left = next.saturating_duration_since(Instant::now());
                left.as_millis() as u64
            }),
            transitions: snapshot
                .transitions
                .iter()
                .map(TransitionView::of)
                .collect(),
            reload: snapshot.reload,
            engine_log: snapshot.engine_log.last(LOG_LINES),
            replica,
            replicas: Vec::new(),
            last_error: snapshot.last_error,
            last_error_at: snapshot.last_error_at.map(rfc3339),
            preparation: Preparation::of(pool),
        }
    }
}

/// All pools.
#[utoipa::path(get, path = "/v2/pools", tag = "pools", responses((status = 200, body = PoolsView)))]
pub async fn list(State(state): State<Arc<AppState>>) -> Json<PoolsView> {
    Json(PoolsView {
        pools: state.pools.get().values().map(PoolView::brief).collect(),
    })
}

/// One pool.
#[utoipa::path(
    get, path = "/v2/pools/{id}", tag = "pools",
    params(("id" = String, Path)),
    responses((status = 200, body = PoolView), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<PoolView>, ApiError> {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let replicas = state.host.replicas(pool.id());
    Ok(Json(PoolView {
        replicas: replicas.into_iter().map(Into::into).collect(),
        ..PoolView::of(&pool)
    }))
}

/// Whether a pool is ready: 200 if it is, 503 with the same body if not.
#[utoipa::path(
    get, path = "/v2/pools/{id}/health", tag = "pools",
    params(("id" = String, Path)),
    responses((status = 200, body = PoolHealth), (status = 404, body = ErrorBody), (status = 503, body = PoolHealth))
)]
pub async fn health(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let snapshot = pool.snapshot();
    let ready = snapshot.phase == Phase::Ready && snapshot.distrust.is_none();
    let body = Json(PoolHealth {
        pool_id: id,
        ready,
        state: snapshot.phase,
        last_error: snapshot.last_error,
        last_error_at: snapshot.last_error_at.map(rfc3339),
        preparation: Preparation::of(&pool),
    });
    Ok(if ready {
        body.into_response()
    } else {
        let after = pool.board().remaining().as_secs().clamp(1, 600);
        (
            StatusCode::SERVICE_UNAVAILABLE,
            [(RETRY_AFTER, after.to_string())],
            body,
        )
            .into_response()
    })
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
) -> Result<(StatusCode, Json<PoolView>), ApiError> {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let request: DrainRequest = parse(&body?)?;
    let deadline = match request.deadline_ms {
        Some(ms) if ms > MAX_DEADLINE_MS => {
            let message = format!("`deadline_ms` must be at most {MAX_DEADLINE_MS}");
            return Err(ApiError::invalid(message));
        }
        Some(ms) => Duration::from_millis(ms),
        None => pool.settings().drain,
    };
    pool.drain_pool(deadline).await?;
    Ok((StatusCode::ACCEPTED, Json(PoolView::of(&pool))))
}

/// Take tasks again: ends a drain, and starts the engine of a pool that is
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
) -> Result<(StatusCode, Json<PoolView>), ApiError> {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    pool.resume().await?;
    Ok((StatusCode::ACCEPTED, Json(PoolView::of(&pool))))
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
) -> Result<(StatusCode, Json<PoolView>), ApiError> {
    let Path(id) = path?;
    let pool = state.pool(&id)?;
    let request: ReloadRequest = parse(&body?)?;
    #[cfg(feature = "provisioning")]
    request
        .applied_to(&pool.settings().config)
        .check_launch(&pool.settings().id, &state.model_settings)
        .map_err(unfit)?;
    pool.reload(request).await.map_err(conflict)?;
    Ok((StatusCode::ACCEPTED, Json(PoolView::of(&pool))))
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
pub(super) fn parse<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, ApiError> {
    match body.trim_ascii_start().first() {
        None => return Ok(T::default()),
        Some(b'{') => {}
        // A list would otherwise be taken for the fields in their order.
        Some(_) => return Err(ApiError::invalid("a JSON object is expected")),
    }
    serde_json::from_slice(body)
        .map_err(|error| ApiError::invalid(format!("the body cannot be read: {error}")))
}
