//! Waiting for what comes of a task, for APIs that answer in the same request.
//!
//! Whoever waits is a reader of the task: when the client goes away the handler's
//! future is dropped, and with it the reader's [`Presence`], which cancels a task
//! that asked for that.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use llama_orch_types::ErrorCode;
use tokio::time::{Instant, timeout_at};
use worker_adapters_adapter_api::{EngineCall, FinishReason};

use super::submission::{CallOptions, submit_call};
use crate::app::state::AppState;
use crate::services::event_log::{Answer, EventRef, Failure};
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
    let (mut answer, mut failed) = (None, None);
    let mut note = |_, event: EventRef<'_>| match event {
        EventRef::Answer(whole) => answer = Some(whole.clone()),
        other => failed = failed.take().or_else(|| failure_in(record, other)),
    };
    while cursor.each(&mut note).await {}
    if let Some(failure) = failed {
        return Err(failure);
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

/// Why an event ends a task without its answer, if it does.
fn failure_in(record: &TaskRecord, event: EventRef<'_>) -> Option<Failure> {
    match event {
        EventRef::Error(failure) => Some(failure.clone()),
        EventRef::End(end) if end.finish_reason == FinishReason::Cancelled => {
            Some(failure_of(record, Failure::cancelled()))
        }
        _ => None,
    }
}

/// Waits for the first event that says anything of the answer, but no longer than the
/// grace. An answer that came all at once is given back.
///
/// # Errors
/// Why the task ended before anything of its answer came.
pub async fn beginning(record: &TaskRecord, grace: Duration) -> Result<Option<Bytes>, Failure> {
    let until = Instant::now() + grace;
    let mut cursor = record.log.cursor(0);
    let mut found = None;
    loop {
        let look = |_, event: EventRef<'_>| {
            if found.is_none() {
                found = beginning_in(record, event);
            }
        };
        let unread = timeout_at(until, cursor.each(look)).await;
        if let Some(found) = found {
            return found;
        }
        if unread != Ok(true) {
            return Ok(None);
        }
    }
}

/// What an event says of an answer's beginning, if it says anything.
fn beginning_in(
    record: &TaskRecord,
    event: EventRef<'_>,
) -> Option<Result<Option<Bytes>, Failure>> {
    match event {
        EventRef::Started(_) | EventRef::Metrics(_) => None,
        EventRef::Answer(answer) => Some(Ok(Some(answer.body.clone()))),
        event => Some(failure_in(record, event).map_or(Ok(None), Err)),
    }
}
