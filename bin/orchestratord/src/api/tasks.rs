//! `/v2/tasks`: submit, look at, read, cancel.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{Extension, Path, Query, State};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use llama_orch_types::TaskId;
use provision_kit::progress::StepKind;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use worker_adapters_adapter_api::CancelReport;

use super::correlation::CorrelationId;
use super::error::{ApiError, ErrorBody};
use super::outcome::presence_at;
use super::streams::EVENT_STREAM;
use super::submission::{client_of, submit_to};
use super::task_request::TaskRequest;
use crate::app::state::AppState;
use crate::runtimes::computed;
use crate::services::event_log::{End, Failure, TaskEvent};
use crate::services::pool::{Cancelled, Escalation, Phase, PoolHandle};
use crate::services::preparation::PreparationStep;
use crate::services::streaming::{KEEP_ALIVE, View, render_sse_for_task};

/// Answer to an admitted task.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskAccepted {
    pub task_id: String,
    /// How many tasks go first; 0 is next.
    pub queue_position: u64,
    /// When it will start, in milliseconds from now, judged from measured
    /// service times.
    pub predicted_start_ms: u64,
    /// How long to wait before sending the next task; 0 while the queue is
    /// less than half full.
    pub backoff_ms: u64,
    pub streams: Streams,
    pub preparation: Preparation,
}

/// Where the task's events can be read.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Streams {
    pub sse: String,
    /// With `metrics` events as well.
    pub sse_verbose: String,
}

/// What must happen before the pool takes tasks to its engine; no steps if it
/// is ready.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Preparation {
    pub steps: Vec<PreparationStep>,
}

impl Preparation {
    /// Steps under way, or the next one if none has begun.
    pub fn of(pool: &PoolHandle) -> Self {
        let snapshot = pool.snapshot();
        let mut steps = match snapshot.phase {
            Phase::Ready | Phase::Draining | Phase::Stopping | Phase::Stopped | Phase::Unloaded => {
                Vec::new()
            }
            _ => pool.board().steps(),
        };
        let next = match snapshot.phase {
            Phase::Provisioning => Some((
                StepKind::EngineProvision,
                "providing the engine and the model",
            )),
            Phase::Starting => Some((StepKind::PoolWarmup, "loading the model into the engine")),
            Phase::Backoff => Some((StepKind::PoolWarmup, "starting the engine again")),
            _ => None,
        };
        if let (true, Some((kind, description))) = (steps.is_empty(), next) {
            steps.push(PreparationStep {
                kind,
                description: description.to_owned(),
                progress: None,
                estimated_ms: None,
            });
        }
        Self { steps }
    }
}

impl Preparation {
    /// For people, in one line; `None` if nothing is being prepared.
    pub fn in_words(&self) -> Option<String> {
        let step = |step: &PreparationStep| {
            let share = step
                .progress
                .map(|share| format!(" {:.0} %", share * 100.0));
            let left = step
                .estimated_ms
                .map(|left| format!(", about {} s left", left / 1000));
            format!(
                "{}{}{}",
                step.description,
                share.unwrap_or_default(),
                left.unwrap_or_default()
            )
        };
        let steps: Vec<String> = self.steps.iter().map(step).collect();
        (!steps.is_empty()).then(|| format!("preparing: {}", steps.join("; ")))
    }
}

/// Where a task stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum TaskStatus {
    Queued,
    Running,
    Completed,
    Cancelled,
    Failed,
}

/// A task as it is now.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct TaskView {
    pub task_id: String,
    pub pool_id: String,
    pub correlation_id: String,
    pub status: TaskStatus,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// How many tasks go first, while it is queued.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predicted_start_ms: Option<u64>,
    /// The answer so far.
    pub text: String,
    /// How many pieces the answer has so far.
    pub pieces: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<End>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    pub streams: Streams,
}

/// How a cancel went. The task's stream is closed in every case.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CancelAnswer {
    pub task_id: String,
    /// False if the task was over already. A cancel that comes while the slot of
    /// a cancelled task is not free yet is answered as the first one.
    pub cancelled: bool,
    /// Milliseconds until the engine's slot was seen free; 0 for a task that
    /// was queued; absent if that was not seen within the bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub freed_ms: Option<u64>,
    /// What was done about a slot that was not seen free in time: `engine_restarted`
    /// if no other task ran on the engine, else `waiting`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub escalated: Option<Escalation>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields, default)]
pub struct EventsQuery {
    /// Show `metrics` events too.
    pub verbose: bool,
}

fn streams(id: TaskId) -> Streams {
    Streams {
        sse: format!("/v2/tasks/{id}/events"),
        sse_verbose: format!("/v2/tasks/{id}/events?verbose=true"),
    }
}

/// Submit a task.
#[utoipa::path(
    post, path = "/v2/tasks", tag = "tasks",
    request_body = TaskRequest,
    responses(
        (status = 202, body = TaskAccepted),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 429, description = "The queue is full; `Retry-After` and `X-Backoff-Ms` say when to come back", body = ErrorBody),
        (status = 503, body = ErrorBody),
    )
)]
pub async fn submit(
    State(state): State<Arc<AppState>>,
    Extension(correlation): Extension<CorrelationId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<TaskAccepted>), ApiError> {
    let (body, most) = (body?, state.limits.max_prompt_bytes);
    let bytes = body.len();
    let read = move || {
        let request = TaskRequest::parse(&body)?;
        request.check_length(most).map(|()| request)
    };
    let request = computed(bytes, read).await?;
    let pool = state.pool_for(request.pool_id.as_deref(), request.model.as_deref())?;
    let client = client_of(&headers, &correlation);
    let (record, admitted) = submit_to(&state, &pool, &request, &correlation.0, client).await?;
    let accepted = TaskAccepted {
        task_id: record.id.to_string(),
        queue_position: admitted.queue_position as u64,
        predicted_start_ms: admitted.predicted_start.as_millis() as u64,
        backoff_ms: admitted.backoff.as_millis() as u64,
        streams: streams(record.id),
        preparation: Preparation::of(&pool),
    };
    Ok((StatusCode::ACCEPTED, Json(accepted)))
}

/// Look at a task.
#[utoipa::path(
    get, path = "/v2/tasks/{id}", tag = "tasks",
    params(("id" = String, Path)),
    responses((status = 200, body = TaskView), (status = 404, body = ErrorBody))
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<TaskView>, ApiError> {
    let Path(id) = path?;
    let record = state.task(&id)?;
    // A task that is over needs no word from its pool, which may be gone.
    let position = match state.pool_of(&record) {
        Some(pool) if !record.log.is_closed() => match pool.position(record.id).await {
            Err(failure) if !record.log.is_closed() => return Err(failure.into()),
            answered => answered.ok().flatten(),
        },
        _ => None,
    };
    let (text, pieces) = record.log.text();
    let (status, end, error) = match record.log.last() {
        Some(TaskEvent::End(end)) => (ended(&end), Some(*end), None),
        Some(TaskEvent::Error(failure)) => (TaskStatus::Failed, None, Some(*failure)),
        _ if position.is_some() => (TaskStatus::Queued, None, None),
        _ => (TaskStatus::Running, None, None),
    };
    Ok(Json(TaskView {
        task_id: record.id.to_string(),
        pool_id: record.pool.to_string(),
        correlation_id: record.correlation_id.clone(),
        status,
        created_at: unix_seconds(record.created_at),
        queue_position: position.map(|(ahead, _)| ahead as u64),
        predicted_start_ms: position.map(|(_, start)| start.as_millis() as u64),
        text,
        pieces,
        end,
        error,
        streams: streams(record.id),
    }))
}

fn ended(end: &End) -> TaskStatus {
    use worker_adapters_adapter_api::FinishReason;
    match end.finish_reason {
        FinishReason::Cancelled => TaskStatus::Cancelled,
        FinishReason::Stop | FinishReason::Length => TaskStatus::Completed,
    }
}

fn unix_seconds(time: SystemTime) -> u64 {
    // Zero for a clock before 1970, which only a broken one shows.
    time.duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// Read a task's events as they come. `Last-Event-ID` reads on from there.
#[utoipa::path(
    get, path = "/v2/tasks/{id}/events", tag = "tasks",
    params(("id" = String, Path), EventsQuery, ("Last-Event-ID" = Option<u64>, Header, description = "The last id that was read")),
    responses(
        (status = 200, description = "`started`, then `token`s (and `metrics`), then `end` or `error`", body = String, content_type = "text/event-stream"),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 429, description = "The client has as many streams open as it may", body = ErrorBody),
    )
)]
pub async fn events(
    State(state): State<Arc<AppState>>,
    method: Method,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<EventsQuery>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (Path(id), Query(query)) = (path?, query?);
    let record = state.task(&id)?;
    let view = View {
        after: last_event_id(&headers)?,
        verbose: query.verbose,
        fallback: record.fallback,
        keep_alive: KEEP_ALIVE,
    };
    if method == Method::HEAD {
        // Somebody who only looks at the headers is no reader.
        return Ok(EVENT_STREAM.into_response());
    }
    let pool = state.pool_of(&record);
    let presence = presence_at(&record, pool.clone());
    let status = move || Preparation::of(pool.as_ref()?).in_words();
    let cursor = record.log.cursor(view.after);
    let body = Body::from_stream(render_sse_for_task(cursor, view, presence, status));
    Ok((EVENT_STREAM, body).into_response())
}

pub(super) fn last_event_id(headers: &HeaderMap) -> Result<u64, ApiError> {
    let Some(value) = headers.get("last-event-id") else {
        return Ok(0);
    };
    let id = value
        .to_str()
        .ok()
        .and_then(|text| text.trim().parse().ok());
    id.ok_or_else(|| ApiError::invalid("`Last-Event-ID` must be the number of an event"))
}

/// Cancel a task. Answers when the engine's slot was seen free.
#[utoipa::path(
    post, path = "/v2/tasks/{id}/cancel", tag = "tasks",
    params(("id" = String, Path)),
    responses((status = 200, body = CancelAnswer), (status = 404, body = ErrorBody))
)]
pub async fn cancel(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<CancelAnswer>, ApiError> {
    let Path(id) = path?;
    let record = state.task(&id)?;
    let (was_over, was_cancelled) = (record.log.is_closed(), record.is_cancelled());
    let cancelled = match state.pool_of(&record) {
        Some(pool) if !was_over => pool.cancel(record.id).await?,
        // The engine may still have it: this one waits with the first. A pool that
        // is gone has freed its slots.
        Some(pool) if was_cancelled => pool.cancel(record.id).await.unwrap_or(Cancelled::Over),
        _ => Cancelled::Over,
    };
    let (freed_ms, escalated) = match cancelled {
        Cancelled::Queued => (Some(0), None),
        Cancelled::Over => (None, None),
        Cancelled::Running { report, escalated } => (freed_after(report), escalated),
    };
    Ok(Json(CancelAnswer {
        task_id: record.id.to_string(),
        cancelled: cancelled != Cancelled::Over,
        freed_ms,
        escalated,
    }))
}

fn freed_after(report: CancelReport) -> Option<u64> {
    match report {
        // The engine never had it, or had ended with it already.
        CancelReport::NotRunning => Some(0),
        CancelReport::Freed { after_ms } => Some(after_ms),
        CancelReport::NotSeenFree { .. } | CancelReport::NotShown => None,
    }
}
