//! Which tasks run on a server, so that they can be cancelled.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use llama_orch_types::TaskId;
use tokio_util::sync::CancellationToken;

/// The running tasks. The lock is held for one look-up, never across an await.
#[derive(Debug, Default)]
pub(crate) struct LiveTasks {
    tasks: Mutex<HashMap<TaskId, Handle>>,
}

/// What a running task shares with those who may cancel it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handle {
    pub(crate) cancel: CancellationToken,
    /// Somebody has asked for the cancel, which may not have come through yet.
    unwanted: Arc<AtomicBool>,
    /// The task's id on the server, where that is another orchestratord.
    upstream: Arc<OnceLock<TaskId>>,
}

impl Handle {
    pub(crate) fn set_upstream(&self, task: TaskId) {
        // It has one answer, and so one id.
        let _ = self.upstream.set(task);
    }

    /// From now on a failure is what the cancel has led to.
    pub(crate) fn set_unwanted(&self) {
        self.unwanted.store(true, Ordering::Release);
    }

    pub(crate) fn is_unwanted(&self) -> bool {
        self.unwanted.load(Ordering::Acquire)
    }

    pub(crate) fn upstream(&self) -> Option<TaskId> {
        self.upstream.get().copied()
    }
}

impl LiveTasks {
    /// `None` if a task of this id runs already.
    pub(crate) fn register(self: &Arc<Self>, task: TaskId) -> Option<LiveTask> {
        let mut tasks = self.lock();
        if tasks.contains_key(&task) {
            return None;
        }
        let handle = Handle::default();
        tasks.insert(task, handle.clone());
        Some(LiveTask {
            handle,
            tasks: Arc::clone(self),
            task,
        })
    }

    pub(crate) fn get(&self, task: TaskId) -> Option<Handle> {
        self.lock().get(&task).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Handle>> {
        // No code that holds the lock can panic half-way through a change.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running task's entry; dropping it takes the entry out.
#[derive(Debug)]
pub(crate) struct LiveTask {
    pub(crate) handle: Handle,
    tasks: Arc<LiveTasks>,
    task: TaskId,
}

impl Drop for LiveTask {
    fn drop(&mut self) {
        self.tasks.lock().remove(&self.task);
    }
}
