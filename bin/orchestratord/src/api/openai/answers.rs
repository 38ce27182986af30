//! From a request to its answer: which pool, into its queue, and out of its log.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use worker_adapters_adapter_api::{CallApi, EngineCall};

use super::request::{Asked, Wishes};
use super::stream::{Rendering, render};
use crate::api::correlation::CorrelationId;
use crate::api::error::ApiError;
use crate::api::outcome::{self, Called};
use crate::api::streams::EVENT_STREAM;
use crate::api::submission::{CallOptions, client_of};
use crate::api::tasks::Preparation;
use crate::app::state::AppState;
use crate::runtimes::computed;
use crate::services::event_log::Failure;
use crate::services::pool::PoolHandle;
use crate::services::streaming::KEEP_ALIVE;

/// How long a stream's status line waits for the first event: a refusal that comes
/// within it has an HTTP status of its own.
const GRACE: Duration = Duration::from_secs(1);

const TASK_ID: HeaderName = HeaderName::from_static("x-task-id");
const QUEUE_POSITION: HeaderName = HeaderName::from_static("x-queue-position");
const PREDICTED_START: HeaderName = HeaderName::from_static("x-predicted-start-ms");

pub(super) async fn call(
    api: CallApi,
    state: Arc<AppState>,
    correlation: CorrelationId,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body?;
    let (read, most) = (body.clone(), state.limits.max_prompt_bytes);
    let asked = computed(body.len(), move || Asked::read(&read, most)).await?;
    let wishes = Wishes::read(&headers)?;
    let pool = state.pool_named(asked.model.as_deref())?;
    let stream = asked.stream == Some(true) && api.generates();
    let options = CallOptions {
        client: client_of(&headers, &correlation),
        correlation: correlation.0,
        priority: wishes.priority,
        cancel_on_disconnect: wishes.cancel_on_disconnect,
        start_within: wishes.start_within,
    };
    let call = EngineCall { api, body, stream };
    let called = outcome::call(state, pool.clone(), call, options).await?;
    let told = told_at_admission(&called);
    let answered = if stream {
        let rendering = Rendering {
            api,
            include_usage: asked.include_usage(),
            keep_alive: KEEP_ALIVE,
        };
        streamed(called, pool, rendering).await
    } else {
        whole(called).await
    };
    // An error tells of the task as well: by its id it can be found in the log.
    let mut response = answered.unwrap_or_else(|failure| ApiError::from(failure).into_response());
    response.headers_mut().extend(told);
    Ok(response)
}

fn told_at_admission(called: &Called) -> [(HeaderName, HeaderValue); 3] {
    let start = called.admitted.predicted_start.as_millis() as u64;
    // An id is letters and digits.
    let id = HeaderValue::from_str(&called.record.id.to_string());
    [
        (TASK_ID, id.unwrap_or(HeaderValue::from_static(""))),
        (QUEUE_POSITION, called.admitted.queue_position.into()),
        (PREDICTED_START, start.into()),
    ]
}

/// Waits for the answer. The reader is here as long as the client is: the
/// connection's end drops this future.
async fn whole(called: Called) -> Result<Response, Failure> {
    let Called { record, reader, .. } = called;
    let answer = outcome::answer(&record).await?;
    drop(reader);
    Ok(json(answer.body))
}

fn json(body: Bytes) -> Response {
    ([(CONTENT_TYPE, "application/json")], body).into_response()
}

async fn streamed(
    called: Called,
    pool: PoolHandle,
    rendering: Rendering,
) -> Result<Response, Failure> {
    let Called { record, reader, .. } = called;
    // An engine that cannot stream this answers all at once.
    if let Some(body) = outcome::beginning(&record, GRACE).await? {
        return Ok(json(body));
    }
    let status = move || Preparation::of(&pool).in_words();
    let correlation = record.correlation_id.clone();
    let cursor = record.log.cursor(0);
    let events = render(cursor, rendering, correlation, reader, status);
    Ok((EVENT_STREAM, Body::from_stream(events)).into_response())
}
