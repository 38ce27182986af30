//! One priority's line: clients take turns. Pure.
//!
//! Weighted fair queueing with equal weights: every task costs one turn of its
//! client. A client's task is given the round in which it goes: the current
//! round, or the one after the client's task before it, whichever is later; within
//! a round the order of admission decides. The current round goes on by one when
//! every client that waits has had a turn, so newcomers, however many come, cannot
//! hold up for ever those who wait already.
//!
//! With one client, or with a new one for each task, this is first come, first
//! served.

use std::collections::{HashMap, VecDeque};

use llama_orch_types::TaskId;

use super::Client;

/// One round, in the fractions by which it goes on.
const ROUND: u64 = 1 << 20;

/// Clients that are remembered beyond those that wait. What is forgotten is only
/// that a client has just had a turn.
const REMEMBERED: usize = 64;

/// A task's turn: its round, and its number in the order of admission.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    round: u64,
    serial: u64,
}

/// Those who wait, in the order in which they go.
#[derive(Debug, Default)]
pub(super) struct Line {
    waiting: VecDeque<(Place, TaskId)>,
    clients: HashMap<Client, Turns>,
    /// The current round.
    now: u64,
    next_serial: u64,
    /// How many clients have a task waiting.
    active: usize,
}

#[derive(Debug, Clone, Copy, Default)]
struct Turns {
    /// The round after the client's last task.
    next: u64,
    waiting: usize,
}

impl Line {
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(super) fn first(&self) -> Option<TaskId> {
        self.waiting.front().map(|(_, id)| *id)
    }

    /// The place that this client's next task would be given.
    pub(super) fn next_place(&self, client: &Client) -> Place {
        let turns = self.clients.get(client).copied().unwrap_or_default();
        Place {
            round: turns.next.max(self.now),
            serial: self.next_serial,
        }
    }

    /// How many go before one who has this place.
    pub(super) fn rank(&self, place: Place) -> usize {
        self.waiting.partition_point(|(other, _)| *other < place)
    }

    /// Gives this client's next task its place.
    pub(super) fn admit(&mut self, client: &Client) -> Place {
        if self.clients.len() > self.active + REMEMBERED {
            self.forget();
        }
        let place = self.next_place(client);
        self.next_serial += 1;
        let turns = self.clients.entry(client.clone()).or_default();
        turns.next = place.round + ROUND;
        self.count(client);
        place
    }

    /// Takes a task in again that had this place.
    pub(super) fn put_back(&mut self, place: Place, client: &Client) {
        let turns = self.clients.entry(client.clone()).or_default();
        turns.next = turns.next.max(place.round + ROUND);
        self.count(client);
    }

    fn count(&mut self, client: &Client) {
        if let Some(turns) = self.clients.get_mut(client) {
            self.active += usize::from(turns.waiting == 0);
            turns.waiting += 1;
        }
    }

    pub(super) fn stand(&mut self, place: Place, id: TaskId) {
        let index = self.rank(place);
        self.waiting.insert(index, (place, id));
    }

    /// The first one's turn has come: the round goes on by its share.
    pub(super) fn serve(&mut self) {
        let Some((place, _)) = self.waiting.front() else {
            return;
        };
        let share = ROUND / self.active.max(1) as u64;
        // Nobody waits in a round before the first one's.
        self.now = (self.now + share.max(1)).max(place.round);
    }

    /// A task of this client that had this place is gone, served or not.
    pub(super) fn leave(&mut self, place: Place, client: &Client) {
        let index = self.rank(place);
        if self.waiting.get(index).is_some_and(|(at, _)| *at == place) {
            self.waiting.remove(index);
        }
        let Some(turns) = self.clients.get_mut(client) else {
            return;
        };
        turns.waiting = turns.waiting.saturating_sub(1);
        if turns.waiting == 0 {
            self.active = self.active.saturating_sub(1);
            // Whoever withdraws its tasks does not stand behind them.
            turns.next = turns.next.min(self.now + ROUND);
        }
        if self.waiting.is_empty() {
            // Nobody has to be fair to anybody.
            self.clients.clear();
            self.active = 0;
        }
    }

    /// Forgets clients that are behind nobody, and, so that many at once cannot
    /// fill the memory, any that do not wait.
    fn forget(&mut self) {
        let now = self.now;
        self.clients
            .retain(|_, turns| turns.waiting > 0 || turns.next > now);
        if self.clients.len() > 2 * (self.active + REMEMBERED) {
            self.clients.retain(|_, turns| turns.waiting > 0);
        }
    }
}
