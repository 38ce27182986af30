//! How a task gets into its pool's queue, whatever API it came by.

use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderMap;
use llama_orch_types::EngineKind;
use worker_adapters_adapter_api::{CallApi, EngineCall, EngineTask, SamplingParams, TaskInput};

use super::correlation::{CORRELATION_ID, CorrelationId};
use super::task_request::TaskRequest;
use crate::app::config::Serves;
use crate::app::state::AppState;
use crate::services::admission::{Client, Place, Priority};
use crate::services::dispatch::fit;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle, PoolSettings, Submission};
use crate::services::resume::Carried;
use crate::services::tasks::{Admitted, NewTask, TaskRecord};

/// Who asks, for fairness: whoever sends the same `X-Correlation-Id` is one client,
/// and all who send none are one. There is one token, so it tells nobody apart.
pub fn client_of(headers: &HeaderMap, correlation: &CorrelationId) -> Client {
    // An id that could not be used was replaced, and one that was not sent made.
    let sent = headers.get(&CORRELATION_ID);
    if sent.is_some_and(|sent| sent.as_bytes() == correlation.0.as_bytes()) {
        Client::Named(Arc::clone(&correlation.0))
    } else {
        Client::Unnamed
    }
}

/// Checks a native request and puts its task into the pool's queue.
pub async fn submit_to(
    state: &AppState,
    pool: &PoolHandle,
    request: &TaskRequest,
    correlation: &str,
    client: Client,
) -> Result<(Arc<TaskRecord>, Admitted), Failure> {
    let max_tokens = request.max_tokens()?;
    let settings = pool.settings();
    let record = TaskRecord::new(NewTask {
        pool: settings.id.clone(),
        fallback: settings.engine == EngineKind::Mock,
        priority: request.priority,
        client,
        correlation_id: correlation.to_owned(),
        cancel_on_disconnect: request.cancel_on_disconnect,
        resumes: request.resumes()?,
        start_within: request.start_within()?,
    });
    let task = EngineTask {
        id: record.id,
        input: request.input()?,
        answered: String::new(),
        max_tokens: max_tokens.unwrap_or(settings.default_max_tokens),
        stop: request.stops()?,
        sampling: request.sampling()?,
    };
    enqueue(state, pool, record, task, max_tokens.is_some()).await
}

/// What is said of a call beside the call itself.
#[derive(Debug)]
pub struct CallOptions {
    pub correlation: Arc<str>,
    pub client: Client,
    pub priority: Priority,
    /// Whether it is cancelled when its last reader goes away.
    pub cancel_on_disconnect: bool,
    /// How long it may wait for the engine.
    pub start_within: Option<Duration>,
}

/// Puts a call into the pool's queue.
pub async fn submit_call(
    state: &AppState,
    pool: &PoolHandle,
    call: EngineCall,
    options: CallOptions,
) -> Result<(Arc<TaskRecord>, Admitted), Failure> {
    let settings = pool.settings();
    check_purpose(&settings, call.api)?;
    let record = TaskRecord::new(NewTask {
        pool: settings.id.clone(),
        fallback: settings.engine == EngineKind::Mock,
        priority: options.priority,
        client: options.client,
        correlation_id: options.correlation.to_string(),
        cancel_on_disconnect: options.cancel_on_disconnect,
        // What is resumed is text, and a call's answer may be anything.
        resumes: false,
        start_within: options.start_within,
    });
    let task = EngineTask {
        id: record.id,
        input: TaskInput::Call(call),
        answered: String::new(),
        max_tokens: settings.default_max_tokens,
        stop: Vec::new(),
        sampling: SamplingParams::default(),
    };
    enqueue(state, pool, record, task, false).await
}

/// Refuses what the engine would refuse in any case, before a model is loaded for it.
/// An engine for vectors still chats if its model can, and one elsewhere, or one that
/// the pool's own flags start otherwise, knows best itself.
fn check_purpose(settings: &PoolSettings, api: CallApi) -> Result<(), Failure> {
    const OTHERWISE: [&str; 4] = ["--embeddings", "--embedding", "--reranking", "--rerank"];
    let (what, serves) = match api {
        CallApi::Embeddings => ("embeddings", "embeddings"),
        CallApi::Rerank => ("reranking", "rerank"),
        _ => return Ok(()),
    };
    let config = &settings.config;
    let flags = || {
        config
            .flags
            .iter()
            .flat_map(|words| words.split_whitespace())
    };
    if settings.engine != EngineKind::Llamacpp
        || config.serves != Serves::Text
        || flags().any(|word| OTHERWISE.contains(&word))
    {
        return Ok(());
    }
    Err(Failure::not_served(&settings.id, what, serves))
}

async fn enqueue(
    state: &AppState,
    pool: &PoolHandle,
    record: Arc<TaskRecord>,
    task: EngineTask,
    max_tokens_given: bool,
) -> Result<(Arc<TaskRecord>, Admitted), Failure> {
    let mut submission = Submission {
        task,
        record: Arc::clone(&record),
        max_tokens_given,
        fits: false,
        attempts: 0,
        carried: Carried::default(),
        place: Place::default(),
    };
    // With the engine at hand a task that does not fit is refused here; while
    // it is not, the same check is made when the task's turn comes. Nor is the
    // engine asked about tasks that a full queue refuses anyway.
    let snapshot = pool.snapshot();
    let room = snapshot.queued() < snapshot.settings.queue_capacity;
    if let Some(context) = snapshot
        .context
        .filter(|_| room && snapshot.phase == Phase::Ready)
    {
        match fit(&state.host, &context, &mut submission).await {
            Err(failure) if !failure.retriable => return Err(failure),
            Ok(()) | Err(_) => {}
        }
    }
    // Known before it is queued: it may end at once.
    state.tasks.insert(Arc::clone(&record));
    match pool.submit(submission).await {
        Ok(admitted) => Ok((record, admitted)),
        Err(failure) => {
            state.tasks.remove(record.id);
            Err(failure)
        }
    }
}
