//! Slots: how many completions run side by side. A slot whose client has gone
//! stays busy for as long as the script says.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[derive(Debug)]
pub(crate) struct Slots {
    free: Arc<Semaphore>,
    total: usize,
    linger: Duration,
}

impl Slots {
    pub(crate) fn new(total: usize, linger: Duration) -> Self {
        Self {
            free: Arc::new(Semaphore::new(total)),
            total,
            linger,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn busy(&self) -> usize {
        self.total - self.free.available_permits()
    }

    /// Waits for a free slot, as a request inside the real engine does.
    pub(crate) async fn take(&self) -> Slot {
        let permit = Arc::clone(&self.free)
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        Slot {
            permit: Some(permit),
            linger: self.linger,
        }
    }
}

/// A busy slot. Dropped before [`Slot::finish`], its client has gone away.
#[derive(Debug)]
pub(crate) struct Slot {
    permit: Option<OwnedSemaphorePermit>,
    linger: Duration,
}

impl Slot {
    pub(crate) fn finish(&mut self) {
        self.permit = None;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(permit) = self.permit.take() else {
            return;
        };
        if self.linger.is_zero() {
            return;
        }
        let linger = self.linger;
        tokio::spawn(async move {
            tokio::time::sleep(linger).await;
            drop(permit);
        });
    }
}
