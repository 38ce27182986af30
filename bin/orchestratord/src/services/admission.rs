//! The queue's rules, and nothing else: no locks, no clock, no IO.
//!
//! A pool's queue is bounded, first come first served within a priority, and
//! `interactive` goes before `batch`. The pool's owner asks; this module only
//! decides.

use std::collections::VecDeque;

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

/// A bounded queue with two priorities. `T` is what the owner keeps of a task.
#[derive(Debug)]
pub struct AdmissionQueue<T> {
    interactive: VecDeque<(TaskId, T)>,
    batch: VecDeque<(TaskId, T)>,
    capacity: usize,
}

impl<T> AdmissionQueue<T> {
    pub fn new(capacity: usize) -> Self {
        Self {
            interactive: VecDeque::new(),
            batch: VecDeque::new(),
            capacity,
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

    /// Takes a task in and says how many go before it, or gives it back.
    pub fn push(
        &mut self,
        id: TaskId,
        priority: Priority,
        task: T,
    ) -> Result<usize, (QueueFull, T)> {
        if self.len() >= self.capacity {
            let capacity = self.capacity;
            return Err((QueueFull { capacity }, task));
        }
        match priority {
            Priority::Interactive => self.interactive.push_back((id, task)),
            Priority::Batch => self.batch.push_back((id, task)),
        }
        Ok(self.ahead_of_last(priority))
    }

    /// Puts a task back to the front of its priority: its turn had come, but
    /// the engine could not take it. Never refused, since the task was admitted
    /// before; so at most the engine's slots may stand here beyond the capacity.
    pub fn put_back(&mut self, id: TaskId, priority: Priority, task: T) {
        match priority {
            Priority::Interactive => self.interactive.push_front((id, task)),
            Priority::Batch => self.batch.push_front((id, task)),
        }
    }

    /// The task whose turn it is.
    pub fn pop(&mut self) -> Option<(TaskId, T)> {
        self.interactive
            .pop_front()
            .or_else(|| self.batch.pop_front())
    }

    /// Takes a task out wherever it stands.
    pub fn remove(&mut self, id: TaskId) -> Option<T> {
        for queue in [&mut self.interactive, &mut self.batch] {
            if let Some(index) = queue.iter().position(|(queued, _)| *queued == id) {
                return queue.remove(index).map(|(_, task)| task);
            }
        }
        None
    }

    /// How many tasks go before this one.
    pub fn position(&self, id: TaskId) -> Option<usize> {
        let mut order = self.interactive.iter().chain(self.batch.iter());
        order.position(|(queued, _)| *queued == id)
    }

    fn ahead_of_last(&self, priority: Priority) -> usize {
        match priority {
            Priority::Interactive => self.interactive.len() - 1,
            Priority::Batch => self.len() - 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Step {
        Push(Priority),
        Pop,
        Remove(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => prop_oneof![Just(Priority::Interactive), Just(Priority::Batch)].prop_map(Step::Push),
            2 => Just(Step::Pop),
            1 => (0usize..20).prop_map(Step::Remove),
        ]
    }

    #[test]
    fn a_task_put_back_goes_first_even_into_a_full_queue() {
        let mut queue = AdmissionQueue::new(2);
        let ids: Vec<_> = (0..3).map(|_| TaskId::generate()).collect();
        queue.push(ids[0], Priority::Batch, 0).unwrap();
        let (id, task) = queue.pop().unwrap();
        queue.push(ids[1], Priority::Batch, 1).unwrap();
        queue.push(ids[2], Priority::Batch, 2).unwrap();
        queue.put_back(id, Priority::Batch, task);
        assert_eq!(queue.position(ids[0]), Some(0));
        assert!(queue.push(TaskId::generate(), Priority::Batch, 3).is_err());
        assert_eq!(
            std::iter::from_fn(|| queue.pop())
                .map(|(_, task)| task)
                .collect::<Vec<_>>(),
            [0, 1, 2]
        );
    }

    proptest! {
        // Against the plainest model there is: a sorted list.
        #[test]
        fn behaves_like_a_sorted_list(steps in prop::collection::vec(step(), 0..200), capacity in 0usize..12) {
            let mut queue = AdmissionQueue::new(capacity);
            let mut model: Vec<(bool, u32, TaskId)> = Vec::new();
            let mut serial = 0;
            for step in steps {
                match step {
                    Step::Push(priority) => {
                        serial += 1;
                        let id = TaskId::generate();
                        let pushed = queue.push(id, priority, serial);
                        if model.len() >= capacity {
                            prop_assert!(pushed.is_err());
                            continue;
                        }
                        model.push((priority == Priority::Batch, serial, id));
                        model.sort();
                        let ahead = model.iter().position(|entry| entry.2 == id);
                        prop_assert_eq!(pushed.ok(), ahead);
                    }
                    Step::Pop => {
                        let expected = (!model.is_empty()).then(|| model.remove(0));
                        prop_assert_eq!(queue.pop().map(|(_, task)| task), expected.map(|entry| entry.1));
                    }
                    Step::Remove(index) => {
                        let id = model.get(index).map_or_else(TaskId::generate, |entry| entry.2);
                        let expected = (index < model.len()).then(|| model.remove(index).1);
                        prop_assert_eq!(queue.remove(id), expected);
                    }
                }
                prop_assert_eq!(queue.len(), model.len());
                for (index, entry) in model.iter().enumerate() {
                    prop_assert_eq!(queue.position(entry.2), Some(index));
                }
            }
        }
    }
}
