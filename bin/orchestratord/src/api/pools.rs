//! `/v2/pools`: what there is, and how it is.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::tasks::Preparation;
use crate::app::state::AppState;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle};

/// A pool as it is now.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    pub pool_id: String,
    pub engine: String,
    /// The model as the configuration names it.
    pub model: String,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica: Option<ReplicaView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_error: Option<Failure>,
    pub preparation: Preparation,
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
    pub preparation: Preparation,
}

impl PoolView {
    pub fn of(pool: &PoolHandle) -> Self {
        let (settings, snapshot) = (pool.settings(), pool.snapshot());
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
            replica,
            last_error: snapshot.last_error,
            preparation: Preparation::of(pool),
        }
    }
}

/// All pools.
#[utoipa::path(get, path = "/v2/pools", tag = "pools", responses((status = 200, body = PoolsView)))]
pub async fn list(State(state): State<Arc<AppState>>) -> Json<PoolsView> {
    Json(PoolsView {
        pools: state.pools.get().values().map(PoolView::of).collect(),
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
    Ok(Json(PoolView::of(&state.pool(&id)?)))
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
