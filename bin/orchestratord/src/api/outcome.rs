//! Waiting for what comes of a task, for APIs that answer in the same request.
//!
//! Whoever waits is a reader of the task: when the client goes away the handler's
//! future is dropped, and with it the reader's [`Presence`], which cancels a task
//! that asked for that.

use std::sync::Arc;
use std::time::Duration;

use llama_orch_types::ErrorCode;
use tokio::time::{Instant, timeout_at};
use worker_adapters_adapter_api::{EngineCall, FinishReason};

use super::submission::{CallOptions, submit_call};
use crate::app::state::AppState;
use crate::services::event_log::{Answer, Cursor, Failure, TaskEvent};
use crate::services::pool::PoolHandle;
use crate::services::streaming::Presence;
use crate::services::tasks::{Admitted, TaskRecord};

/// One reader's presence at a task; see [`presence_at`].
pub type Reader = Presence<Box<dyn FnOnce() + Send>>;

/// From now on the task has one reader more. If it was the last one when it is
/// dropped, and the task asked for that, the task is cancelled.
pub fn presence_at(record: &Arc<TaskRecord>, pool: Option<PoolHandle>) -> Reader {
    let task = record.id;
    let cancel = move || {
        if let Some(pool) = pool {
            // Dropped by the server's own task, so there is a runtime; the
            // cancel has a bound of its own.
            tokio::spawn(async move { pool.cancel(task).await });
        }
    };
    Presence::new(Arc::clone(record), Box::new(cancel))
}

/// A call in the queue, with the reader that waits for it.
#[derive(Debug)]
pub struct Called {
    pub record: Arc<TaskRecord>,
    pub admitted: Admitted,
    pub reader: Reader,
}

/// Puts a call into the pool's queue. In a task of its own: a client that goes
/// away while the pool is asked would else leave a task without a reader.
pub async fn call(
    state: Arc<AppState>,
    pool: PoolHandle,
    call: EngineCall,
    options: CallOptions,
) -> Result<Called, Failure> {
    let submitted = tokio::spawn(async move {
        let (record, admitted) = submit_call(&state, &pool, call, options).await?;
        let reader = presence_at(&record, Some(pool));
        Ok(Called {
            record,
            admitted,
            reader,
        })
    });
    submitted
        .await
        .unwrap_or_else(|_| Err(Failure::internal("the task could not be submitted")))
}

/// Waits for the whole answer of a call that does not stream.
///
/// # Errors
/// Why there is none; [`ErrorCode::Cancelled`] if somebody cancelled the task.
pub async fn answer(record: &TaskRecord) -> Result<Answer, Failure> {
    let mut cursor = record.log.cursor(0);
    let mut answer = None;
    while let Some(batch) = cursor.read().await {
        for (_, event) in batch {
            match event {
                TaskEvent::Answer(whole) => answer = Some(*whole),
                TaskEvent::Error(failure) => return Err(*failure),
                TaskEvent::End(end) if end.finish_reason == FinishReason::Cancelled => {
                    return Err(failure_of(record, Failure::cancelled()));
                }
                _ => {}
            }
        }
    }
    answer.ok_or_else(|| {
        let failure = Failure::new(ErrorCode::WorkerReset, "the engine ended without an answer");
        failure_of(record, failure.retriable())
    })
}

fn failure_of(record: &TaskRecord, failure: Failure) -> Failure {
    let mut failure = failure.in_pool(&record.pool);
    failure.correlation_id = Some(record.correlation_id.clone());
    failure
}

/// The first events that say anything of the answer, if they come within the
/// grace; what was read is kept.
///
/// # Errors
/// Why the task ended before anything of its answer came.
pub async fn beginning(
    record: &TaskRecord,
    cursor: &mut Cursor,
    grace: Duration,
) -> Result<Vec<TaskEvent>, Failure> {
    let until = Instant::now() + grace;
    let mut events = Vec::new();
    while let Ok(Some(batch)) = timeout_at(until, cursor.read()).await {
        events.extend(batch.into_iter().map(|(_, event)| event));
        let said = events
            .iter()
            .find(|event| !matches!(event, TaskEvent::Started(_) | TaskEvent::Metrics(_)));
        match said {
            None => {}
            Some(TaskEvent::Error(failure)) => return Err((**failure).clone()),
            Some(TaskEvent::End(end)) if end.finish_reason == FinishReason::Cancelled => {
                return Err(failure_of(record, Failure::cancelled()));
            }
            Some(_) => break,
        }
    }
    Ok(events)
}
