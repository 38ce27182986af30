//! Into memory and out of it, as these clients ask for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_orch_types::ErrorCode;

use crate::services::event_log::Failure;
use crate::services::pool::lifecycle::ReloadState;
use crate::services::pool::{Phase, PoolHandle, PoolSnapshot, Unload, UnloadCause};
use crate::services::tasks::TaskRecord;

/// How long a client is made to wait for a model. A load that gets on may take
/// longer; the client may ask again then.
const LOAD_LIMIT: Duration = Duration::from_mins(30);

/// When it shall.
const COME_BACK: Duration = Duration::from_secs(30);

/// How long after a task's end the pool may take to count it as over, and others
/// may keep it busy, before it is not unloaded after all.
const SETTLE_LIMIT: Duration = Duration::from_secs(5);

/// Has the pool's engine loaded, and says how long that took.
///
/// # Errors
/// Why it cannot be, as a task would be told: a pool that somebody drained stays so.
pub(super) async fn load(pool: &PoolHandle) -> Result<Duration, Failure> {
    let begun = Instant::now();
    let snapshot = pool.snapshot();
    let unloaded = snapshot.phase == Phase::Unloaded || snapshot.unloading;
    if unloaded {
        pool.resume().await?;
    } else if let Some(refusal) = never_ready(pool, &snapshot) {
        return Err(refusal);
    }
    let settled = |snapshot: &PoolSnapshot| {
        snapshot.phase == Phase::Ready || never_ready(pool, snapshot).is_some()
    };
    match tokio::time::timeout(LOAD_LIMIT, pool.wait_for(settled)).await {
        Ok(Some(snapshot)) => match never_ready(pool, &snapshot) {
            Some(refusal) => Err(refusal),
            None => Ok(begun.elapsed()),
        },
        Ok(None) => Err(Failure::new(
            ErrorCode::PoolUnavailable,
            format!("pool {} is gone", pool.id()),
        )
        .retriable()),
        Err(_) => Err(
            Failure::new(ErrorCode::PoolUnready, "the model is still being loaded")
                .retry_after(COME_BACK)
                .in_pool(pool.id()),
        ),
    }
}

/// Why the pool does not become ready by itself, if it does not.
fn never_ready(pool: &PoolHandle, snapshot: &PoolSnapshot) -> Option<Failure> {
    match snapshot.phase {
        Phase::Failed => {
            let last = snapshot.last_error.clone();
            let failure = last
                .unwrap_or_else(|| Failure::new(ErrorCode::PoolUnavailable, "the pool has failed"));
            Some(failure.in_pool(pool.id()))
        }
        _ if snapshot.leaving.is_some() => {
            snapshot.leaving.map(|why| Failure::leaving(pool.id(), why))
        }
        Phase::Draining | Phase::Stopping | Phase::Stopped if !on_the_way(snapshot) => {
            Some(Failure::drained(pool.id()))
        }
        _ => None,
    }
}

/// Whether an engine that ends is followed by another.
fn on_the_way(snapshot: &PoolSnapshot) -> bool {
    use ReloadState::{Draining, Preparing, RollingBack, Starting};
    let reload = snapshot.reload.as_ref().map(|reload| reload.state);
    snapshot.unloading || matches!(reload, Some(Preparing | Draining | Starting | RollingBack))
}

/// Unloads the pool when nobody has a task in it any more, if that is soon.
///
/// # Errors
/// Why it stays.
pub(super) async fn unload(pool: &PoolHandle) -> Result<(), Failure> {
    let idle = |snapshot: &PoolSnapshot| snapshot.running == 0 && snapshot.queued() == 0;
    // Whether it is idle is the pool's own decision; this only gives it the time.
    let _ = tokio::time::timeout(SETTLE_LIMIT, pool.wait_for(idle)).await;
    pool.unload(Unload::IfIdle, UnloadCause::Asked).await
}

/// Unloads the pool once the task is over, however it ends and whether or not its
/// client is still there. The watcher ends with the task.
pub(super) fn unload_after(record: Arc<TaskRecord>, pool: PoolHandle) {
    tokio::spawn(async move {
        record.log.closed().await;
        if let Err(refused) = unload(&pool).await {
            tracing::debug!(pool = %pool.id(), reason = refused.message, "not unloaded after its task");
        }
    });
}
