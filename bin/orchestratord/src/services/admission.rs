//! The queue's rules, and nothing else: no locks, no clock, no IO.
//!
//! A pool's queue is bounded. Within a priority clients take turns, and one
//! client's tasks go in the order they came ([`line`]), so that whoever sends a
//! hundred tasks at once does not keep the next client waiting for all of them.
//! `interactive` goes before `batch`; but while a batch task waits that has waited
//! for the ageing bound, batch takes every other turn, so that it is never starved
//! and never starves others. A task may have a deadline to start by; past it the
//! task leaves the queue. The pool's owner asks and passes the time; this module
//! only decides.

mod line;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_orch_types::TaskId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::line::Line;
pub use self::line::Place;

/// Who is waiting for the answer.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// A person: goes first.
    #[default]
    Interactive,
    /// A job: goes when no interactive task waits.
    Batch,
}

impl Priority {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Batch => "batch",
        }
    }
}

/// The queue holds as many tasks as it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueFull {
    pub capacity: usize,
}

/// Whom a task is for, as far as fairness goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub enum Client {
    /// All who do not say who they are, together.
    #[default]
    Unnamed,
    /// Those who say the same.
    Named(Arc<str>),
}

/// What the queue keeps of a task. `T` is the owner's part.
#[derive(Debug)]
pub struct Entry<T> {
    /// Given by the queue: the task's turn.
    pub place: Place,
    pub id: TaskId,
    pub client: Client,
    pub priority: Priority,
    /// When it was admitted: ageing counts from here.
    pub queued: Instant,
    /// When it must have started.
    pub deadline: Option<Instant>,
    pub task: T,
}

/// A bounded queue with two priorities, fairness, ageing and deadlines.
#[derive(Debug)]
pub struct AdmissionQueue<T> {
    tasks: HashMap<TaskId, Entry<T>>,
    interactive: Line,
    batch: Line,
    ageing: Ageing,
    deadlines: BTreeSet<(Instant, TaskId)>,
    capacity: usize,
    /// An aged batch task had the last turn, so the next is an interactive one's.
    aged_went_last: bool,
}

/// Which batch tasks have waited for the bound.
#[derive(Debug)]
struct Ageing {
    /// How long a batch task waits before its line takes every other turn.
    bound: Duration,
    young: BTreeSet<(Instant, Place)>,
    aged: BTreeSet<Place>,
}

impl<T> AdmissionQueue<T> {
    pub fn new(capacity: usize, ageing: Duration) -> Self {
        Self {
            tasks: HashMap::new(),
            interactive: Line::default(),
            batch: Line::default(),
            ageing: Ageing {
                bound: ageing,
                young: BTreeSet::new(),
                aged: BTreeSet::new(),
            },
            deadlines: BTreeSet::new(),
            capacity,
            aged_went_last: false,
        }
    }

    pub fn len(&self) -> usize {
        self.tasks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    pub fn len_of(&self, priority: Priority) -> usize {
        match priority {
            Priority::Interactive => self.interactive.len(),
            Priority::Batch => self.batch.len(),
        }
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Other limits from now on. Tasks that wait are kept, even if there are
    /// more than may wait now, and those that have aged stay so.
    pub fn set_limits(&mut self, capacity: usize, ageing: Duration) {
        self.capacity = capacity;
        self.ageing.bound = ageing;
    }

    /// Whether one more task may come in.
    pub fn check_room(&self) -> Result<(), QueueFull> {
        if self.len() < self.capacity {
            Ok(())
        } else {
            Err(QueueFull {
                capacity: self.capacity,
            })
        }
    }

    /// How many tasks would go before one of this client that came in now.
    pub fn ahead_of_next(&mut self, priority: Priority, client: &Client, now: Instant) -> usize {
        let line = self.line(priority);
        let place = line.next_place(client);
        let index = line.rank(place);
        match priority {
            Priority::Interactive => self.ahead_of_interactive(index, now),
            // It would be young, and those behind it are not before it.
            Priority::Batch => self.ahead_of_batch(index, now),
        }
    }

    /// Takes a task in, or gives it back.
    pub fn push(&mut self, mut entry: Entry<T>) -> Result<(), (QueueFull, Entry<T>)> {
        if let Err(full) = self.check_room() {
            return Err((full, entry));
        }
        entry.place = self.line(entry.priority).admit(&entry.client);
        self.take_in(entry);
        Ok(())
    }

    /// Puts a task back to the place that its admission gave it: its turn had
    /// come, but the engine could not take it, or was lost over it. Never refused,
    /// since the task was admitted before; so at most the engine's slots may stand
    /// here beyond the capacity.
    pub fn put_back(&mut self, entry: Entry<T>) {
        self.line(entry.priority)
            .put_back(entry.place, &entry.client);
        self.take_in(entry);
    }

    fn take_in(&mut self, entry: Entry<T>) {
        if let Some(deadline) = entry.deadline {
            self.deadlines.insert((deadline, entry.id));
        }
        if entry.priority == Priority::Batch {
            self.ageing.young.insert((entry.queued, entry.place));
        }
        self.line(entry.priority).stand(entry.place, entry.id);
        self.tasks.insert(entry.id, entry);
    }

    /// The task whose turn it is.
    pub fn pop(&mut self, now: Instant) -> Option<Entry<T>> {
        let aged = self.aged(now) > 0;
        let batch_first = aged && (!self.aged_went_last || self.interactive.is_empty());
        let priority = match (batch_first, self.interactive.first()) {
            (false, Some(_)) => Priority::Interactive,
            _ => Priority::Batch,
        };
        let id = self.line(priority).first()?;
        self.line(priority).serve();
        self.aged_went_last = batch_first;
        self.take_out(id)
    }

    /// Takes a task out wherever it stands.
    pub fn remove(&mut self, id: TaskId) -> Option<Entry<T>> {
        self.take_out(id)
    }

    fn take_out(&mut self, id: TaskId) -> Option<Entry<T>> {
        let entry = self.tasks.remove(&id)?;
        self.line(entry.priority).leave(entry.place, &entry.client);
        if entry.priority == Priority::Batch {
            self.ageing.young.remove(&(entry.queued, entry.place));
            self.ageing.aged.remove(&entry.place);
        }
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        Some(entry)
    }

    /// The next deadline of a task that waits.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// Takes out a task whose deadline has passed, if there is one.
    pub fn pop_expired(&mut self, now: Instant) -> Option<Entry<T>> {
        let (deadline, id) = *self.deadlines.first()?;
        if deadline > now {
            return None;
        }
        self.take_out(id)
    }

    /// How many tasks go before this one, as things stand.
    pub fn position(&mut self, id: TaskId, now: Instant) -> Option<usize> {
        let entry = self.tasks.get(&id)?;
        let (place, priority) = (entry.place, entry.priority);
        let index = self.line(priority).rank(place);
        Some(match priority {
            Priority::Interactive => self.ahead_of_interactive(index, now),
            Priority::Batch => self.ahead_of_batch(index, now),
        })
    }

    /// Interactive tasks and, while aged ones wait, batch tasks take turns.
    fn ahead_of_interactive(&mut self, index: usize, now: Instant) -> usize {
        let aged_turns = index + usize::from(!self.aged_went_last);
        index + self.aged(now).min(aged_turns)
    }

    fn ahead_of_batch(&mut self, index: usize, now: Instant) -> usize {
        let interactive = self.interactive.len();
        if index < self.aged(now) {
            let interactive_turns = index + usize::from(self.aged_went_last);
            index + interactive.min(interactive_turns)
        } else {
            index + interactive
        }
    }

    /// How many turns batch takes among the interactive ones: up to and with its
    /// last task that has waited for the bound.
    fn aged(&mut self, now: Instant) -> usize {
        let Ageing { bound, young, aged } = &mut self.ageing;
        while let Some((queued, place)) = young.first().copied()
            && now.saturating_duration_since(queued) >= *bound
        {
            young.pop_first();
            aged.insert(place);
        }
        aged.last().map_or(0, |last| self.batch.rank(*last) + 1)
    }

    fn line(&mut self, priority: Priority) -> &mut Line {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }
}
