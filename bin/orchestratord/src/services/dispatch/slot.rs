//! Waiting until a cancelled task's slot is free again.

use std::time::{Duration, Instant};

use futures::StreamExt;
use llama_orch_types::TaskId;
use worker_adapters_adapter_api::{CancelReport, TokenStream, WorkerAdapter, WorkerError};

use super::TaskRun;

/// How long the slot of a cancelled task is held at the most. Its engine has been
/// ended long before, unless others run on it.
const HELD_AT_MOST: Duration = Duration::from_mins(30);

/// Between two waits for such a slot, each of which has bounds of its own.
const HELD_PAUSE: Duration = Duration::from_millis(200);

/// A cancelled task whose slot was not seen free in time. Its run goes on waiting,
/// and so the slot is given to no other task.
#[derive(Debug, Clone, Copy)]
pub struct NotFreed {
    pub id: TaskId,
    pub waited_ms: u64,
}

impl TaskRun {
    /// Waits until the engine's slot is free. The stream has to be read
    /// meanwhile, since reading it is what closes its connection.
    pub(super) async fn free_slot(&self, mut stream: TokenStream) -> Option<CancelReport> {
        let drain = async { while stream.next().await.is_some_and(|event| event.is_ok()) {} };
        let (report, ()) = tokio::join!(self.free(), drain);
        report
    }

    pub(super) async fn free(&self) -> Option<CancelReport> {
        let id = self.submission.record.id;
        // Found now, since the host forgets the task with its stream.
        let Some(adapter) = self.host.adapter_of(&self.context.pool_id, id) else {
            return Some(CancelReport::NotRunning);
        };
        match self.wait_until_freed(adapter.as_ref()).await {
            Ok(report) => Some(report),
            Err(error) => {
                tracing::warn!(task = %id, %error, "the engine could not be asked to cancel");
                None
            }
        }
    }

    /// Waits on where the slot is not seen free: it is held until it is, or its
    /// engine is gone.
    async fn wait_until_freed(
        &self,
        adapter: &dyn WorkerAdapter,
    ) -> Result<CancelReport, WorkerError> {
        let (id, begun) = (self.submission.record.id, Instant::now());
        let mut told = false;
        loop {
            let report = adapter.cancel(id).await?;
            let CancelReport::NotSeenFree { waited_ms } = report else {
                return Ok(report);
            };
            if begun.elapsed() > HELD_AT_MOST {
                return Ok(report);
            }
            if !told {
                told = true;
                tracing::warn!(task = %id, waited_ms, "a cancelled task's slot is not seen free");
                // Fails only when the pool is gone.
                let _ = self.not_freed.send(NotFreed { id, waited_ms }).await;
            }
            tokio::time::sleep(HELD_PAUSE).await;
        }
    }
}
