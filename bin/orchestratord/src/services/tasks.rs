//! The tasks there are. A finished one is kept for a while, so that a reader
//! can come late, and then forgotten, so that memory stays bounded.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use llama_orch_types::{PoolId, ReplicaId, TaskId};
use worker_adapters_adapter_api::FinishReason;

use super::admission::{Client, Priority};
use super::event_log::{EventLog, TaskEvent};

/// A task, from admission until it is forgotten.
#[derive(Debug)]
pub struct TaskRecord {
    pub id: TaskId,
    pub pool: PoolId,
    /// Whether a scripted engine answers. Kept here, since the pool may be
    /// gone when somebody reads.
    pub fallback: bool,
    pub priority: Priority,
    /// Who asked, as far as fairness goes.
    pub client: Client,
    pub correlation_id: String,
    /// Whether the last reader's leaving cancels the task.
    pub cancel_on_disconnect: bool,
    /// Whether it is gone on with on another engine, if its own is lost.
    pub resumes: bool,
    pub created_at: SystemTime,
    pub created: Instant,
    /// When the engine must have taken it, if the client says so.
    pub deadline: Option<Instant>,
    pub log: Arc<EventLog>,
    /// What the client was told; set once, at admission.
    pub admitted: OnceLock<Admitted>,
    /// When the engine took it.
    pub started: OnceLock<Instant>,
    /// The prompt's length in tokens, once the engine has told.
    pub tokens_in: OnceLock<u64>,
    /// Which replica began to answer, where a pool has several.
    pub replica: OnceLock<ReplicaId>,
    /// Whether anything of the answer was handed out.
    answering: AtomicBool,
    /// How often it was gone on with on another engine.
    pub resumed: AtomicU32,
    /// When its log was closed, as far as the registry has noticed.
    finished: OnceLock<Instant>,
    readers: AtomicUsize,
}

/// What a record is made from.
#[derive(Debug)]
pub struct NewTask {
    pub pool: PoolId,
    pub fallback: bool,
    pub priority: Priority,
    pub client: Client,
    pub correlation_id: String,
    pub cancel_on_disconnect: bool,
    pub resumes: bool,
    /// How long it may wait for the engine.
    pub start_within: Option<Duration>,
}

/// What admission promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Admitted {
    /// How many tasks go first; 0 is next.
    pub queue_position: usize,
    pub predicted_start: Duration,
    /// How long to wait before sending the next task; zero while the queue is
    /// less than half full.
    pub backoff: Duration,
}

impl TaskRecord {
    pub fn new(request: NewTask) -> Arc<Self> {
        let NewTask {
            pool,
            fallback,
            priority,
            client,
            correlation_id,
            cancel_on_disconnect,
            resumes,
            start_within,
        } = request;
        let created = Instant::now();
        Arc::new(Self {
            id: TaskId::generate(),
            pool,
            fallback,
            priority,
            client,
            correlation_id,
            cancel_on_disconnect,
            resumes,
            created_at: SystemTime::now(),
            created,
            deadline: start_within.and_then(|within| created.checked_add(within)),
            log: EventLog::new(),
            admitted: OnceLock::new(),
            started: OnceLock::new(),
            tokens_in: OnceLock::new(),
            replica: OnceLock::new(),
            answering: AtomicBool::new(false),
            resumed: AtomicU32::new(0),
            finished: OnceLock::new(),
            readers: AtomicUsize::new(0),
        })
    }

    /// Whether it was ended by a cancel.
    pub fn is_cancelled(&self) -> bool {
        let last = self.log.last();
        matches!(last, Some(TaskEvent::End(end)) if end.finish_reason == FinishReason::Cancelled)
    }

    pub fn set_answering(&self) {
        self.answering.store(true, Ordering::Relaxed);
    }

    /// Whether anything of the answer was handed out.
    pub fn is_answering(&self) -> bool {
        self.answering.load(Ordering::Relaxed)
    }

    pub fn reader_came(&self) {
        self.readers.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether that was the last reader of a task that wants to be cancelled
    /// in that case and is not over.
    pub fn reader_left(&self) -> bool {
        let last = self.readers.fetch_sub(1, Ordering::AcqRel) == 1;
        last && self.cancel_on_disconnect && !self.log.is_closed()
    }
}

/// How long finished tasks are kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    pub keep_for: Duration,
    pub at_most: usize,
    /// For all their events together.
    pub bytes: usize,
}

/// All tasks, by id.
#[derive(Debug)]
pub struct TaskRegistry {
    // Held for a look-up or an insertion only, never across an await.
    tasks: Mutex<HashMap<TaskId, Arc<TaskRecord>>>,
    retention: Retention,
    /// Insertions since the last sweep.
    unswept: AtomicUsize,
}

/// So many tasks that come are a reason to sweep before it is time.
const SWEEP_AFTER: usize = 256;

impl TaskRegistry {
    pub fn new(retention: Retention) -> Self {
        Self {
            tasks: Mutex::default(),
            retention,
            unswept: AtomicUsize::new(0),
        }
    }

    pub fn insert(&self, record: Arc<TaskRecord>) {
        self.lock().insert(record.id, record);
        if self.unswept.fetch_add(1, Ordering::Relaxed) >= SWEEP_AFTER {
            self.sweep(Instant::now());
        }
    }

    pub fn get(&self, id: TaskId) -> Option<Arc<TaskRecord>> {
        self.lock().get(&id).cloned()
    }

    /// Forgets a task that was never admitted.
    pub fn remove(&self, id: TaskId) {
        self.lock().remove(&id);
    }

    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets finished tasks that are too old, too many or too large together,
    /// oldest first. Running and queued tasks are never forgotten. Called once in
    /// a while.
    pub fn sweep(&self, now: Instant) {
        self.unswept.store(0, Ordering::Relaxed);
        let mut tasks = self.lock();
        let mut finished: Vec<(Instant, TaskId)> = tasks
            .values()
            .filter(|record| record.log.is_closed())
            .map(|record| (*record.finished.get_or_init(|| now), record.id))
            .collect();
        finished.sort_unstable_by_key(|(at, id)| (std::cmp::Reverse(*at), std::cmp::Reverse(*id)));
        let Retention {
            keep_for,
            at_most,
            bytes,
        } = self.retention;
        let mut kept_bytes = 0_usize;
        for (index, (at, id)) in finished.into_iter().enumerate() {
            let size = tasks.get(&id).map_or(0, |record| record.log.bytes());
            kept_bytes = kept_bytes.saturating_add(size);
            if index >= at_most
                || kept_bytes > bytes
                || now.saturating_duration_since(at) > keep_for
            {
                tasks.remove(&id);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TaskId, Arc<TaskRecord>>> {
        // Map operations do not panic half-way, so the map is whole.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::event_log::Failure;
    use llama_orch_types::ErrorCode;

    fn record(cancel_on_disconnect: bool) -> Arc<TaskRecord> {
        TaskRecord::new(NewTask {
            pool: PoolId::default_pool(),
            fallback: false,
            priority: Priority::default(),
            client: Client::Unnamed,
            correlation_id: "c".to_owned(),
            cancel_on_disconnect,
            resumes: false,
            start_within: None,
        })
    }

    fn close(record: &TaskRecord) {
        record
            .log
            .append(TaskEvent::Error(
                Failure::new(ErrorCode::Internal, "over").into(),
            ))
            .unwrap();
    }

    #[test]
    fn only_finished_tasks_are_forgotten_and_the_newest_are_kept() {
        let registry = TaskRegistry::new(Retention {
            keep_for: Duration::from_mins(1),
            at_most: 2,
            bytes: usize::MAX,
        });
        let records: Vec<_> = (0..5).map(|_| record(false)).collect();
        for record in &records {
            registry.insert(Arc::clone(record));
        }
        records[..4].iter().for_each(|record| close(record));
        let now = Instant::now();
        registry.sweep(now);
        let kept = |record: &Arc<TaskRecord>| registry.get(record.id).is_some();
        assert_eq!(
            records.iter().map(kept).collect::<Vec<_>>(),
            [false, false, true, true, true]
        );
        registry.sweep(now + Duration::from_secs(61));
        assert_eq!(
            records.iter().map(kept).collect::<Vec<_>>(),
            [false, false, false, false, true]
        );
    }

    #[test]
    fn finished_tasks_are_kept_within_their_budget_of_bytes() {
        use crate::services::event_log::Token;
        let budget = 100_000;
        let registry = TaskRegistry::new(Retention {
            keep_for: Duration::from_mins(1),
            at_most: 1000,
            bytes: budget,
        });
        let filled = || {
            let record = record(false);
            for i in 0..10 {
                let t = "x".repeat(1000);
                record
                    .log
                    .append(TaskEvent::Token(Token { t: t.into(), i }))
                    .unwrap();
            }
            registry.insert(Arc::clone(&record));
            record
        };
        let running = filled();
        let mut last = None;
        for _ in 0..20 {
            let record = filled();
            close(&record);
            last = Some(record);
            registry.sweep(Instant::now());
        }
        let kept = registry.len() - 1;
        let size = running.log.bytes();
        assert!((10_000..20_000).contains(&size), "{size}");
        assert!((5..10).contains(&kept), "{kept}");
        assert!(registry.get(running.id).is_some(), "it is not over");
        assert!(registry.get(last.unwrap().id).is_some(), "the newest");
    }

    #[test]
    fn only_the_last_reader_of_a_living_task_cancels_it() {
        let task = record(true);
        task.reader_came();
        task.reader_came();
        assert!(!task.reader_left());
        assert!(task.reader_left());
        task.reader_came();
        close(&task);
        assert!(!task.reader_left());
        let stays = record(false);
        stays.reader_came();
        assert!(!stays.reader_left());
    }
}
