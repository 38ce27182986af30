//! The queue's rules, and nothing else: no locks, no clock, no IO.
//!
//! A pool's queue is bounded and first come, first served within a priority.
//! `interactive` goes before `batch`; but a batch task that has waited for the
//! ageing bound takes every other turn, so that it is never starved and never
//! starves others. A task may have a deadline to start by; past it the task
//! leaves the queue. The pool's owner asks and passes the time; this module
//! only decides.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use llama_orch_types::TaskId;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

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

/// What the queue keeps of a task. `T` is the owner's part.
#[derive(Debug)]
pub struct Entry<T> {
    /// Given by the queue: the order of admission.
    pub serial: u64,
    pub id: TaskId,
    pub priority: Priority,
    /// When it was admitted: ageing counts from here.
    pub queued: Instant,
    /// When it must have started.
    pub deadline: Option<Instant>,
    pub task: T,
}

/// A bounded queue with two priorities, ageing and deadlines.
#[derive(Debug)]
pub struct AdmissionQueue<T> {
    interactive: VecDeque<Entry<T>>,
    batch: VecDeque<Entry<T>>,
    deadlines: BTreeSet<(Instant, TaskId)>,
    capacity: usize,
    /// How long a batch task waits before it takes every other turn.
    ageing: Duration,
    /// An aged batch task had the last turn, so the next is an interactive one's.
    aged_went_last: bool,
    next_serial: u64,
}

impl<T> AdmissionQueue<T> {
    pub fn new(capacity: usize, ageing: Duration) -> Self {
        Self {
            interactive: VecDeque::new(),
            batch: VecDeque::new(),
            deadlines: BTreeSet::new(),
            capacity,
            ageing,
            aged_went_last: false,
            next_serial: 1,
        }
    }

    pub fn len(&self) -> usize {
        self.interactive.len() + self.batch.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
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

    /// Changes the limits. Tasks beyond a smaller capacity stay.
    pub fn set_limits(&mut self, capacity: usize, ageing: Duration) {
        self.capacity = capacity;
        self.ageing = ageing;
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

    /// How many tasks would go before one that came in now.
    pub fn ahead_of_next(&self, priority: Priority, now: Instant) -> usize {
        match priority {
            Priority::Interactive => self.ahead_of_interactive(self.interactive.len(), now),
            Priority::Batch => self.ahead_of_batch(self.batch.len(), now),
        }
    }

    /// Takes a task in, or gives it back.
    pub fn push(&mut self, mut entry: Entry<T>) -> Result<(), (QueueFull, Entry<T>)> {
        if let Err(full) = self.check_room() {
            return Err((full, entry));
        }
        entry.serial = self.next_serial;
        self.next_serial += 1;
        self.note_deadline(&entry);
        self.line(entry.priority).push_back(entry);
        Ok(())
    }

    /// Puts a task back to the place that its admission gave it: its turn had
    /// come, but the engine could not take it. Never refused, since the task was
    /// admitted before; so at most the engine's slots may stand here beyond the
    /// capacity.
    pub fn put_back(&mut self, entry: Entry<T>) {
        self.note_deadline(&entry);
        let line = self.line(entry.priority);
        let place = line.partition_point(|waiting| waiting.serial < entry.serial);
        line.insert(place, entry);
    }

    /// The task whose turn it is.
    pub fn pop(&mut self, now: Instant) -> Option<Entry<T>> {
        let aged = self.aged(now) > 0;
        let batch_first = aged && (!self.aged_went_last || self.interactive.is_empty());
        let entry = if batch_first {
            self.batch.pop_front()
        } else {
            self.interactive
                .pop_front()
                .or_else(|| self.batch.pop_front())
        }?;
        self.aged_went_last = batch_first;
        self.forget_deadline(&entry);
        Some(entry)
    }

    /// Takes a task out wherever it stands.
    pub fn remove(&mut self, id: TaskId) -> Option<Entry<T>> {
        let take = |line: &mut VecDeque<Entry<T>>| {
            let index = line.iter().position(|entry| entry.id == id)?;
            line.remove(index)
        };
        let entry = take(&mut self.interactive).or_else(|| take(&mut self.batch))?;
        self.forget_deadline(&entry);
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
        self.remove(id)
    }

    /// How many tasks go before this one, as things stand.
    pub fn position(&self, id: TaskId, now: Instant) -> Option<usize> {
        let place = |line: &VecDeque<Entry<T>>| line.iter().position(|entry| entry.id == id);
        if let Some(index) = place(&self.interactive) {
            return Some(self.ahead_of_interactive(index, now));
        }
        place(&self.batch).map(|index| self.ahead_of_batch(index, now))
    }

    /// Interactive tasks and aged batch tasks take turns.
    fn ahead_of_interactive(&self, index: usize, now: Instant) -> usize {
        let aged_turns = index + usize::from(!self.aged_went_last);
        index + self.aged(now).min(aged_turns)
    }

    fn ahead_of_batch(&self, index: usize, now: Instant) -> usize {
        let interactive = self.interactive.len();
        if index < self.aged(now) {
            let interactive_turns = index + usize::from(self.aged_went_last);
            index + interactive.min(interactive_turns)
        } else {
            index + interactive
        }
    }

    /// How many batch tasks, from the front on, have waited for the bound.
    /// They stand in the order of their admission, so this is a binary search.
    fn aged(&self, now: Instant) -> usize {
        self.batch
            .partition_point(|entry| now.saturating_duration_since(entry.queued) >= self.ageing)
    }

    fn line(&mut self, priority: Priority) -> &mut VecDeque<Entry<T>> {
        match priority {
            Priority::Interactive => &mut self.interactive,
            Priority::Batch => &mut self.batch,
        }
    }

    fn note_deadline(&mut self, entry: &Entry<T>) {
        if let Some(deadline) = entry.deadline {
            self.deadlines.insert((deadline, entry.id));
        }
    }

    fn forget_deadline(&mut self, entry: &Entry<T>) {
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, entry.id));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const AGEING: Duration = Duration::from_secs(30);

    fn entry(priority: Priority, queued: Instant, deadline: Option<Instant>) -> Entry<()> {
        Entry {
            serial: 0,
            id: TaskId::generate(),
            priority,
            queued,
            deadline,
            task: (),
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// With a deadline so many seconds ahead, if any.
        Push(Priority, Option<u64>),
        Pop,
        PopAndPutBack,
        Remove(usize),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let priority = prop_oneof![Just(Priority::Interactive), Just(Priority::Batch)];
        prop_oneof![
            4 => (priority, prop::option::of(1u64..60)).prop_map(|(priority, within)| Step::Push(priority, within)),
            2 => Just(Step::Pop),
            1 => Just(Step::PopAndPutBack),
            1 => (0usize..20).prop_map(Step::Remove),
            2 => (1u64..25).prop_map(Step::Wait),
        ]
    }

    /// What is known of a queue from outside, for comparison.
    #[derive(Debug, Default)]
    struct Model {
        waiting: Vec<(TaskId, Priority, Option<Instant>)>,
    }

    proptest! {
        #[test]
        fn positions_are_the_order_in_which_tasks_go(steps in prop::collection::vec(step(), 0..120), capacity in 1usize..12) {
            let mut now = Instant::now();
            let mut queue = AdmissionQueue::new(capacity, AGEING);
            let mut model = Model::default();
            for step in steps {
                match step {
                    Step::Push(priority, within) => {
                        let deadline = within.map(|seconds| now + Duration::from_secs(seconds));
                        let ahead = queue.ahead_of_next(priority, now);
                        let new = entry(priority, now, deadline);
                        let id = new.id;
                        let full = queue.len() >= capacity;
                        prop_assert_eq!(queue.push(new).is_err(), full);
                        if !full {
                            prop_assert_eq!(queue.position(id, now), Some(ahead));
                            model.waiting.push((id, priority, deadline));
                        }
                    }
                    Step::Pop => {
                        let first = model.waiting.iter().find(|task| queue.position(task.0, now) == Some(0)).map(|task| task.0);
                        let popped = queue.pop(now).map(|entry| entry.id);
                        prop_assert_eq!(popped, first);
                        model.waiting.retain(|task| Some(task.0) != popped);
                    }
                    Step::PopAndPutBack => {
                        if let Some(entry) = queue.pop(now) {
                            queue.put_back(entry);
                        }
                    }
                    Step::Remove(index) => {
                        if let Some((id, ..)) = model.waiting.get(index).copied() {
                            prop_assert!(queue.remove(id).is_some());
                            model.waiting.remove(index);
                        }
                    }
                    Step::Wait(seconds) => {
                        now += Duration::from_secs(seconds);
                        while let Some(entry) = queue.pop_expired(now) {
                            prop_assert!(entry.deadline.is_some_and(|deadline| deadline <= now));
                            model.waiting.retain(|task| task.0 != entry.id);
                        }
                    }
                }
                prop_assert_eq!(queue.len(), model.waiting.len());
                prop_assert!(model.waiting.iter().all(|task| task.2.is_none_or(|deadline| deadline > now)));
                prop_assert_eq!(queue.next_deadline(), model.waiting.iter().filter_map(|task| task.2).min());
                let mut positions: Vec<_> = model.waiting.iter().map(|task| queue.position(task.0, now).unwrap()).collect();
                positions.sort_unstable();
                prop_assert!(positions.iter().copied().eq(0..model.waiting.len()), "{:?}", positions);
            }
            // Emptied at one moment, tasks go exactly in the order of their positions.
            while !queue.is_empty() {
                let first = model.waiting.iter().find(|task| queue.position(task.0, now) == Some(0)).unwrap().0;
                prop_assert_eq!(queue.pop(now).unwrap().id, first);
                model.waiting.retain(|task| task.0 != first);
            }
        }

        // However many interactive tasks keep coming, a batch task goes within
        // two turns of its bound for each batch task before it.
        #[test]
        fn a_batch_task_is_never_starved(others in 0usize..6) {
            let start = Instant::now();
            let mut queue = AdmissionQueue::new(1000, AGEING);
            for _ in 0..others {
                queue.push(entry(Priority::Batch, start, None)).unwrap();
            }
            let last = entry(Priority::Batch, start, None);
            let id = last.id;
            queue.push(last).unwrap();
            let late = start + AGEING;
            let mut turns = 0;
            loop {
                queue.push(entry(Priority::Interactive, late, None)).unwrap();
                queue.push(entry(Priority::Interactive, late, None)).unwrap();
                turns += 1;
                if queue.pop(late).unwrap().id == id {
                    break;
                }
            }
            prop_assert!(turns <= 2 * (others + 1), "{} turns", turns);
        }
    }

    #[test]
    fn interactive_goes_first_while_batch_is_young() {
        let now = Instant::now();
        let mut queue = AdmissionQueue::new(4, AGEING);
        queue.push(entry(Priority::Batch, now, None)).unwrap();
        queue.push(entry(Priority::Interactive, now, None)).unwrap();
        assert_eq!(queue.pop(now).unwrap().priority, Priority::Interactive);
        assert_eq!(queue.pop(now).unwrap().priority, Priority::Batch);
    }

    #[test]
    fn a_task_put_back_goes_first_even_into_a_full_queue() {
        let now = Instant::now();
        let mut queue = AdmissionQueue::new(2, AGEING);
        queue.push(entry(Priority::Batch, now, None)).unwrap();
        let first = queue.pop(now).unwrap();
        let id = first.id;
        queue.push(entry(Priority::Batch, now, None)).unwrap();
        queue.push(entry(Priority::Batch, now, None)).unwrap();
        queue.put_back(first);
        assert_eq!(queue.position(id, now), Some(0));
        assert!(queue.check_room().is_err());
        assert_eq!(queue.pop(now).unwrap().id, id);
    }

    #[test]
    fn tasks_put_back_in_any_order_stand_in_the_order_of_their_admission() {
        let now = Instant::now();
        let mut queue = AdmissionQueue::new(4, AGEING);
        let ids: Vec<TaskId> = (0..4)
            .map(|_| {
                let new = entry(Priority::Interactive, now, None);
                let id = new.id;
                queue.push(new).unwrap();
                id
            })
            .collect();
        let mut taken: Vec<_> = (0..3).map(|_| queue.pop(now).unwrap()).collect();
        taken.rotate_left(1);
        for entry in taken {
            queue.put_back(entry);
        }
        let order: Vec<TaskId> = std::iter::from_fn(|| queue.pop(now))
            .map(|entry| entry.id)
            .collect();
        assert_eq!(order, ids);
    }
}
