//! Slots: how many completions run side by side. A slot whose client has gone
//! stays busy for as long as the script says.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub(crate) struct Slots {
    free: Arc<Semaphore>,
    tasks: Arc<Tasks>,
    linger: Duration,
}

/// A task in a slot, as far as `/slots` shows it.
#[derive(Debug, Clone)]
pub(crate) struct Shown {
    /// What it asked for.
    pub(crate) params: Value,
    pub(crate) decoded: u64,
}

/// By slot, the task in it.
#[derive(Debug)]
struct Tasks(Mutex<Vec<Option<Shown>>>);

impl Tasks {
    fn lock(&self) -> MutexGuard<'_, Vec<Option<Shown>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    pub(crate) fn new(total: usize, linger: Duration) -> Self {
        Self {
            free: Arc::new(Semaphore::new(total)),
            tasks: Arc::new(Tasks(Mutex::new(vec![None; total]))),
            linger,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.tasks.lock().len()
    }

    pub(crate) fn busy(&self) -> usize {
        self.tasks.lock().iter().flatten().count()
    }

    /// The tasks in the slots; none for a free one.
    pub(crate) fn shown(&self) -> Vec<Option<Shown>> {
        self.tasks.lock().clone()
    }

    /// Waits for a free slot, as a request inside the real engine does.
    pub(crate) async fn take(&self, params: Value) -> Slot {
        let permit = Arc::clone(&self.free)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let mut tasks = self.tasks.lock();
        let index = tasks.iter().position(Option::is_none);
        let index = index.expect("a permit stands for a free slot");
        tasks[index] = Some(Shown { params, decoded: 0 });
        Slot {
            busy: Some(Busy {
                tasks: Arc::clone(&self.tasks),
                index,
                _permit: permit,
            }),
            linger: self.linger,
        }
    }
}

/// Frees the slot when dropped, before its permit is free again.
#[derive(Debug)]
struct Busy {
    tasks: Arc<Tasks>,
    index: usize,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.tasks.lock()[self.index] = None;
    }
}

/// A busy slot. Dropped before [`Slot::finish`], its client has gone away.
#[derive(Debug)]
pub(crate) struct Slot {
    busy: Option<Busy>,
    linger: Duration,
}

impl Slot {
    pub(crate) fn finish(&mut self) {
        self.busy = None;
    }

    /// Has `/slots` show that so many tokens were decoded.
    pub(crate) fn show_decoded(&self, decoded: u64) {
        if let Some(busy) = &self.busy
            && let Some(shown) = &mut busy.tasks.lock()[busy.index]
        {
            shown.decoded = decoded;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(busy) = self.busy.take() else {
            return;
        };
        if self.linger.is_zero() {
            return;
        }
        let linger = self.linger;
        tokio::spawn(async move {
            tokio::time::sleep(linger).await;
            drop(busy);
        });
    }
}
