//! `/v2/pools`: what there is, and how it is. What can be asked of a pool is in
//! [`requests`].

pub mod requests;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use worker_adapters_adapter_api::ReplicaStatus;

use super::error::{ApiError, ErrorBody};
use super::tasks::Preparation;
use crate::app::config::{LoadPolicy, Serves};
use crate::app::state::AppState;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle, PoolSnapshot, ReloadView, Restarts, Transition};
use crate::services::residency::{MemoryView, PoolMemory};

/// Log lines that a view shows.
const LOG_LINES: usize = 20;

/// A pool as it is now.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolView {
    pub pool_id: String,
    pub engine: String,
    /// The model as the configuration names it.
    pub model: String,
    /// Further names by which clients may ask for it.
    #[serde(default)]
    pub aliases: Vec<String>,
    /// What the engine is started for: `text`, `embeddings` or `rerank`.
    #[serde(default)]
    #[schema(value_type = String)]
    pub serves: Serves,
    /// When the engine is loaded: `eager` or `on_demand`.
    #[schema(value_type = String)]
    pub load: LoadPolicy,
    /// Whether it stays loaded whatever else wants its memory.
    pub pin: bool,
    /// After so long without a task the engine is unloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle_ttl_seconds: Option<u64>,
    /// The engine's further flags: the configuration's, or those of the last
    /// reload.
    pub flags: Vec<String>,
    pub state: Phase,
    /// Milliseconds in this state.
    pub in_state_ms: u64,
    pub queue: QueueView,
    /// Tasks in the engine.
    pub running: u64,
    /// How long no task has run or waited, in milliseconds; left out while one does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_ms: Option<u64>,
    /// How long until the engine is unloaded, unless a task comes, in milliseconds;
    /// left out where `idle_ttl_seconds` does not count down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unloads_in_ms: Option<u64>,
    /// The running mean of what loading took in this pool, in milliseconds: from the
    /// engine's start until it was ready. Left out until the first load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mean_load_ms: Option<u64>,
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
    /// What its engine needs of memory, once it has asked for some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<PoolMemory>,
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

fn millis(duration: Duration) -> u64 {
    duration.as_millis() as u64
}

/// Zero for a moment that has passed.
fn millis_until(moment: Instant) -> u64 {
    millis(moment.saturating_duration_since(Instant::now()))
}

/// A time for clients, to the millisecond.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    // Fails only where the clock is thousands of years off.
    let time = Timestamp::try_from(time).unwrap_or_default();
    format!("{time:.3}")
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

/// Whether a pool serves.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolHealth {
    pub pool_id: String,
    /// Whether its engine takes tasks at once. An `unloaded` pool serves without
    /// that: its first task has an engine loaded.
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
            aliases: settings.config.aliases.clone(),
            serves: settings.config.serves,
            load: settings.config.load,
            pin: settings.config.pin,
            idle_ttl_seconds: settings.config.idle_ttl_seconds,
            flags: settings.config.flags.clone(),
            state: snapshot.phase,
            in_state_ms: snapshot.since.elapsed().as_millis() as u64,
            queue: QueueView {
                interactive: snapshot.queued_interactive as u64,
                batch: snapshot.queued_batch as u64,
                capacity: settings.queue_capacity as u64,
            },
            running: snapshot.running as u64,
            idle_ms: snapshot.idle_since.map(|since| millis(since.elapsed())),
            unloads_in_ms: snapshot.unloads_at.map(millis_until),
            mean_load_ms: snapshot.loads.measured_mean().map(millis),
            slots: snapshot.slots,
            mean_service_ms: snapshot.times.mean().as_millis() as u64,
            measured_tasks: snapshot.times.measured(),
            engine_exits: snapshot.engine_exits,
            restarts: snapshot.restarts,
            next_try_ms: snapshot.next_try.map(millis_until),
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
            memory: None,
        }
    }

    /// With what is known of its memory.
    #[must_use]
    pub fn with_memory(mut self, memory: &MemoryView) -> Self {
        let own = memory
            .pools
            .iter()
            .find(|(id, _)| id.as_str() == self.pool_id);
        self.memory = own.map(|(_, memory)| *memory);
        self
    }
}

/// All pools.
#[utoipa::path(get, path = "/v2/pools", tag = "pools", responses((status = 200, body = PoolsView)))]
pub async fn list(State(state): State<Arc<AppState>>) -> Json<PoolsView> {
    let (memory, pools) = (state.residency.view(), state.pools.get());
    let view = |pool| PoolView::brief(pool).with_memory(&memory);
    Json(PoolsView {
        pools: pools.values().map(view).collect(),
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
    let view = PoolView {
        replicas: replicas.into_iter().map(Into::into).collect(),
        ..PoolView::of(&pool)
    };
    Ok(Json(view.with_memory(&state.residency.view())))
}

/// Whether a pool serves: 200 if it is ready, or unloaded and so would be by its
/// first task; 503 with the same body if not.
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
    let serves = ready || loads_on_demand(&snapshot);
    let body = Json(PoolHealth {
        pool_id: id,
        ready,
        state: snapshot.phase,
        last_error: snapshot.last_error,
        last_error_at: snapshot.last_error_at.map(rfc3339),
        preparation: Preparation::of(&pool),
    });
    Ok(if serves {
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

/// Whether the pool has no engine, or soon none, and loads one for the next task.
pub(super) fn loads_on_demand(snapshot: &PoolSnapshot) -> bool {
    snapshot.phase == Phase::Unloaded || snapshot.unloading
}
