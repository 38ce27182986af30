//! Which tasks run here. An entry lives exactly as long as its task's stream;
//! one that was cancelled and whose slot was not seen free lingers, so that it
//! can be waited for again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::Waker;
use std::time::Duration;

use futures::task::AtomicWaker;
use llama_orch_types::TaskId;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Tags count up to here and begin again: a 32-bit float holds them exactly.
const TAGS: u32 = 1 << 22;

/// Counted for the whole process, since two adapters may speak to one engine.
static NEXT_TAG: AtomicU32 = AtomicU32::new(0);

/// The running tasks. The lock is held for one look-up, never across an await.
#[derive(Debug, Default)]
pub(crate) struct LiveTasks {
    tasks: Mutex<Tasks>,
}

#[derive(Debug, Default)]
struct Tasks {
    running: HashMap<TaskId, Handle>,
    /// Cancelled, and still in their slots for all that was seen.
    lingering: HashMap<TaskId, Handle>,
}

/// What a running task shares with those who may cancel it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handle {
    pub(crate) cancel: CancellationToken,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By which the engine's list of slots shows the task, where it does.
    tag: u32,
    /// The engine has begun with the task: it is in a slot.
    taken: AtomicBool,
    /// The first token has come, so the engine is past the prompt.
    decoding: AtomicBool,
    /// The engine tells of its progress in the prompt.
    telling: AtomicBool,
    /// The longest time between two of its events, in milliseconds.
    longest_gap: AtomicU64,
    /// Whether two or more have come.
    several_events: AtomicBool,
    /// How long a batch of the prompt will take, before one was seen.
    expected_batch: AtomicU64,
    /// Tokens of its prompt that the engine has not told of yet.
    prompt_left: AtomicU64,
    /// When it was first cancelled.
    cancelled: OnceLock<Instant>,
    /// Of the task that reads the stream.
    reader: AtomicWaker,
    /// The engine was not told the tag.
    untagged: AtomicBool,
}

impl Handle {
    pub(crate) fn tag(&self) -> u32 {
        self.shared.tag
    }

    /// The task goes to the engine without its tag.
    pub(crate) fn set_untagged(&self) {
        self.shared.untagged.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_untagged(&self) -> bool {
        self.shared.untagged.load(Ordering::Relaxed)
    }

    pub(crate) fn set_taken(&self) {
        self.shared.taken.store(true, Ordering::Relaxed);
    }

    fn is_taken(&self) -> bool {
        self.shared.taken.load(Ordering::Relaxed)
    }

    pub(crate) fn set_decoding(&self) {
        self.shared.decoding.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_decoding(&self) -> bool {
        self.shared.decoding.load(Ordering::Relaxed)
    }

    pub(crate) fn set_telling(&self) {
        self.shared.telling.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_telling(&self) -> bool {
        self.shared.telling.load(Ordering::Relaxed)
    }

    pub(crate) fn set_prompt_left(&self, tokens: u64) {
        self.shared.prompt_left.store(tokens, Ordering::Relaxed);
    }

    /// The longest time between two events so far; only the stream's reader tells it.
    pub(crate) fn set_longest_gap(&self, gap: Duration) {
        self.shared
            .longest_gap
            .store(millis(gap), Ordering::Relaxed);
    }

    pub(crate) fn set_several_events(&self) {
        self.shared.several_events.store(true, Ordering::Relaxed);
    }

    pub(crate) fn expect_batch(&self, expected: Duration) {
        let expected = millis(expected);
        self.shared
            .expected_batch
            .store(expected, Ordering::Relaxed);
    }

    /// How long a batch of the prompt takes. The first event comes before the
    /// first batch, so two are needed to know.
    pub(crate) fn batch(&self) -> Duration {
        let seen = self.longest_gap();
        if self.shared.several_events.load(Ordering::Relaxed) {
            return seen;
        }
        let expected = self.shared.expected_batch.load(Ordering::Relaxed);
        seen.max(Duration::from_millis(expected))
    }

    pub(crate) fn longest_gap(&self) -> Duration {
        Duration::from_millis(self.shared.longest_gap.load(Ordering::Relaxed))
    }

    /// When it was first cancelled, which is now if it was not before.
    pub(crate) fn cancelled_at(&self) -> Instant {
        let at = *self.shared.cancelled.get_or_init(Instant::now);
        self.cancel.cancel();
        self.shared.reader.wake();
        at
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.shared.cancelled.get().is_some()
    }

    /// Has a cancel wake the stream's reader, which then looks whether it came before.
    pub(crate) fn wake_on_cancel(&self, reader: &Waker) {
        self.shared.reader.register(reader);
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl LiveTasks {
    /// `None` if a task of this id runs already.
    pub(crate) fn register(self: &Arc<Self>, id: TaskId) -> Option<LiveTask> {
        let tag = NEXT_TAG.fetch_add(1, Ordering::Relaxed) % TAGS + 2;
        let handle = Handle {
            shared: Arc::new(Shared {
                tag,
                ..Shared::default()
            }),
            ..Handle::default()
        };
        let mut tasks = self.lock();
        if tasks.running.contains_key(&id) {
            return None;
        }
        tasks.running.insert(id, handle.clone());
        Some(LiveTask {
            tasks: Arc::clone(self),
            id,
            handle,
        })
    }

    /// A task that runs or lingers.
    pub(crate) fn get(&self, id: TaskId) -> Option<Handle> {
        let tasks = self.lock();
        let found = tasks.running.get(&id).or_else(|| tasks.lingering.get(&id));
        found.cloned()
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().running.len()
    }

    pub(crate) fn linger(&self, id: TaskId, handle: &Handle) {
        self.lock().lingering.insert(id, handle.clone());
    }

    pub(crate) fn forget(&self, id: TaskId) {
        self.lock().lingering.remove(&id);
    }

    /// How many tasks other than this one are known to be in a slot. One that
    /// is only on its way is not counted: it would make room for a slot that is
    /// still busy.
    pub(crate) fn others_in_slots(&self, id: TaskId) -> usize {
        self.others(id, Handle::is_taken)
    }

    /// What is left of the prompts of other tasks, in tokens; `None` if the engine
    /// works on no such prompt.
    pub(crate) fn other_prompts(&self, id: TaskId) -> Option<u64> {
        let tasks = self.lock();
        let in_prompt = tasks
            .running
            .iter()
            .filter(|(other, handle)| **other != id && !handle.is_decoding());
        let left = in_prompt.map(|(_, handle)| handle.shared.prompt_left.load(Ordering::Relaxed));
        left.reduce(u64::saturating_add)
    }

    fn others(&self, id: TaskId, which: impl Fn(&Handle) -> bool) -> usize {
        let tasks = self.lock();
        let others = tasks.running.iter().filter(|(other, _)| **other != id);
        others.filter(|(_, handle)| which(handle)).count()
    }

    fn lock(&self) -> MutexGuard<'_, Tasks> {
        // No code that holds the lock can panic half-way through a change.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running task's entry; dropping it takes the entry out.
#[derive(Debug)]
pub(crate) struct LiveTask {
    tasks: Arc<LiveTasks>,
    pub(crate) id: TaskId,
    pub(crate) handle: Handle,
}

impl LiveTask {
    pub(crate) fn other_prompts(&self) -> Option<u64> {
        self.tasks.other_prompts(self.id)
    }
}

impl Drop for LiveTask {
    fn drop(&mut self) {
        self.tasks.lock().running.remove(&self.id);
    }
}
