//! The log: one lock over what happened and over who waits for more.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use super::cursor::Cursor;
use super::events::{EventRef, TaskEvent};
use super::store::Store;
use super::waiters::{Seat, Waiters};

/// The log was closed before the event came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A task's events, append-only. Cheap to share.
#[derive(Debug, Default)]
pub struct EventLog {
    // Held for a push, a look or a bounded batch, never across an await. Nobody is
    // woken and no waker dropped under it.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) store: Store,
    /// They wait for any event.
    pub(super) readers: Waiters,
    /// They wait for the end.
    ends: Waiters,
}

impl EventLog {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Appends one event; a terminal one closes the log. The text of a token or a
    /// chunk is copied.
    pub fn append(&self, event: TaskEvent) -> Result<(), Closed> {
        let mut place = 0;
        let (first, more) = {
            let mut state = self.lock();
            if !state.store.push(event) {
                return Err(Closed);
            }
            let first = state.readers.next(&mut place);
            let ended = state.store.is_closed() && state.ends.is_anyone_waiting();
            (first, ended || state.readers.is_anyone_waiting())
        };
        if let Some(waker) = first {
            waker.wake();
        }
        if more {
            self.wake_others(place);
        }
        Ok(())
    }

    /// Wakes the readers from a place on, and those who wait for the end if that is
    /// what came. One by one, so that the list needs no second memory.
    fn wake_others(&self, mut place: usize) {
        loop {
            let next = self.lock().readers.next(&mut place);
            let Some(waker) = next else { break };
            waker.wake();
        }
        let mut place = 0;
        loop {
            let next = {
                let mut state = self.lock();
                let closed = state.store.is_closed();
                closed.then(|| state.ends.next(&mut place)).flatten()
            };
            let Some(waker) = next else { break };
            waker.wake();
        }
    }

    pub fn is_closed(&self) -> bool {
        self.lock().store.is_closed()
    }

    /// The last event so far.
    pub fn last(&self) -> Option<TaskEvent> {
        self.lock().store.last().map(EventRef::to_event)
    }

    /// Memory that its events take up, in bytes, about.
    pub fn bytes(&self) -> usize {
        self.lock().store.bytes()
    }

    /// The number of the answer's pieces so far.
    pub fn pieces(&self) -> u64 {
        self.lock().store.pieces()
    }

    /// The answer so far, and the number of its pieces.
    pub fn text(&self) -> (String, u64) {
        let state = self.lock();
        (state.store.text(), state.store.pieces())
    }

    /// Reads from the event after `after`, which is an id that a reader was
    /// given before; 0 reads from the start.
    pub fn cursor(self: &Arc<Self>, after: u64) -> Cursor {
        let next = usize::try_from(after).unwrap_or(usize::MAX);
        Cursor::new(Arc::clone(self), next)
    }

    /// Waits until the log is closed.
    pub fn closed(&self) -> Closing<'_> {
        Closing {
            log: self,
            seat: Seat::default(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Only a look can panic half-way, since what it shows events to is not ours.
        // A look changes nothing, so a poisoned lock still guards a whole log.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits until a log is closed; see [`EventLog::closed`].
#[derive(Debug)]
#[must_use = "it does nothing unless it is awaited"]
pub struct Closing<'a> {
    log: &'a EventLog,
    seat: Seat,
}

impl Future for Closing<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let replaced = {
            let mut state = this.log.lock();
            if state.store.is_closed() {
                return Poll::Ready(());
            }
            state.ends.wait(&mut this.seat, context.waker())
        };
        drop(replaced);
        Poll::Pending
    }
}

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        if self.seat.is_taken() {
            let left = self.log.lock().ends.leave(&mut self.seat);
            drop(left);
        }
    }
}
