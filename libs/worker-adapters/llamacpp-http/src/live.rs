//! Which tasks run here. An entry lives exactly as long as its task's stream.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

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
    /// The engine has begun with the task: it is in a slot.
    taken: Arc<AtomicBool>,
    /// The first token has come, so the engine is past the prompt.
    decoding: Arc<AtomicBool>,
}

impl Handle {
    pub(crate) fn set_taken(&self) {
        self.taken.store(true, Ordering::Relaxed);
    }

    fn is_taken(&self) -> bool {
        self.taken.load(Ordering::Relaxed)
    }

    pub(crate) fn set_decoding(&self) {
        self.decoding.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_decoding(&self) -> bool {
        self.decoding.load(Ordering::Relaxed)
    }
}

impl LiveTasks {
    /// `None` if a task of this id runs already.
    pub(crate) fn register(self: &Arc<Self>, id: TaskId) -> Option<LiveTask> {
        let handle = Handle::default();
        let mut tasks = self.lock();
        if tasks.contains_key(&id) {
            return None;
        }
        tasks.insert(id, handle.clone());
        Some(LiveTask {
            tasks: Arc::clone(self),
            id,
            handle,
        })
    }

    pub(crate) fn get(&self, id: TaskId) -> Option<Handle> {
        self.lock().get(&id).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// How many tasks other than this one are known to be in a slot. One that
    /// is only on its way is not counted: it would make room for a slot that is
    /// still busy.
    pub(crate) fn others_in_slots(&self, id: TaskId) -> usize {
        let tasks = self.lock();
        tasks
            .iter()
            .filter(|(other, handle)| **other != id && handle.is_taken())
            .count()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Handle>> {
        // No code that holds the lock can panic half-way through a change.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running task's entry; dropping it takes the entry out.
#[derive(Debug)]
pub(crate) struct LiveTask {
    tasks: Arc<LiveTasks>,
    id: TaskId,
    pub(crate) handle: Handle,
}

impl Drop for LiveTask {
    fn drop(&mut self) {
        self.tasks.lock().remove(&self.id);
    }
}
