//! Which adapter runs which task. An entry lives exactly as long as the task's
//! stream, so a cancel finds the right adapter even after a rebind.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use futures::{Stream, StreamExt};
use llama_orch_types::{PoolId, TaskId};
use worker_adapters_adapter_api::{TokenEvent, TokenStream, WorkerError};

use crate::host::Binding;

/// The running tasks. The lock is held for one look-up or one count.
#[derive(Debug, Default)]
pub(crate) struct RunningTasks {
    tasks: Mutex<HashMap<TaskId, Arc<Binding>>>,
}

impl RunningTasks {
    /// `None` if a task of this id runs already.
    pub(crate) fn register(
        self: &Arc<Self>,
        task: TaskId,
        binding: Arc<Binding>,
    ) -> Option<RunningTask> {
        let mut tasks = self.lock();
        if tasks.contains_key(&task) {
            return None;
        }
        tasks.insert(task, binding);
        Some(RunningTask {
            tasks: Arc::clone(self),
            task,
        })
    }

    /// The binding that runs this task of this pool.
    pub(crate) fn get(&self, pool: &PoolId, task: TaskId) -> Option<Arc<Binding>> {
        self.lock()
            .get(&task)
            .filter(|binding| binding.context.pool_id == *pool)
            .cloned()
    }

    /// How many tasks run on exactly this binding.
    pub(crate) fn on(&self, binding: &Arc<Binding>) -> usize {
        self.count(|running| Arc::ptr_eq(running, binding))
    }

    /// How many tasks run on bindings that this one has replaced.
    pub(crate) fn on_predecessors_of(&self, binding: &Arc<Binding>) -> usize {
        let (pool, replica) = (&binding.context.pool_id, &binding.context.replica_id);
        self.count(|running| {
            !Arc::ptr_eq(running, binding)
                && running.context.pool_id == *pool
                && running.context.replica_id == *replica
        })
    }

    fn count(&self, mut which: impl FnMut(&Arc<Binding>) -> bool) -> usize {
        self.lock()
            .values()
            .filter(|running| which(running))
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Arc<Binding>>> {
        // No code that holds the lock can panic half-way through a change.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running task's entry; dropping it takes the entry out.
#[derive(Debug)]
pub(crate) struct RunningTask {
    tasks: Arc<RunningTasks>,
    task: TaskId,
}

impl RunningTask {
    /// The stream, holding the entry until its last event.
    pub(crate) fn track(self, stream: TokenStream) -> TokenStream {
        Box::pin(Tracked {
            stream,
            entry: Some(self),
        })
    }
}

impl Drop for RunningTask {
    fn drop(&mut self) {
        let binding = self.tasks.lock().remove(&self.task);
        // The last owner of an adapter closes its connections: not under the lock.
        drop(binding);
    }
}

struct Tracked {
    stream: TokenStream,
    entry: Option<RunningTask>,
}

impl Stream for Tracked {
    type Item = Result<TokenEvent, WorkerError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = self.stream.poll_next_unpin(context);
        if matches!(
            item,
            Poll::Ready(None | Some(Err(_) | Ok(TokenEvent::End(_))))
        ) {
            self.entry = None;
        }
        item
    }
}
