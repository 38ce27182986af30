//! Several servers of the same model as one engine.
//!
//! A task goes to the replica with the smallest part of its slots in use. One that is
//! not there for it goes out, and the task to another, as long as nothing of its answer
//! has been handed out ([`crate::failover`]). Whoever owns the replicas checks them
//! ([`Replicas::check_due`]) and learns when their capacity changes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::future::join_all;
use llama_orch_types::{ReplicaId, TaskId};
use provision_kit::chain::one_line;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{
    CancelReport, EngineHealth, EngineProps, EngineTask, ReplicaStatus, TaskInput, TimeoutPhase,
    TokenStream, WorkerAdapter, WorkerError,
};

use crate::adapter::OpenaiAdapter;
use crate::failover::Way;
use crate::settings::{Endpoint, Waits};
use crate::watch::Watch;

/// How long a replica that hung may take for the token that clears it.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// Several servers as one engine. Clones share everything.
#[derive(Debug, Clone)]
pub struct Replicas {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) replicas: Vec<Replica>,
    board: Mutex<Board>,
    /// The set of those that are given tasks has changed.
    changed: Notify,
}

#[derive(Debug)]
pub(crate) struct Replica {
    id: ReplicaId,
    pub(crate) adapter: OpenaiAdapter,
}

/// What changes, in the order of the replicas. The lock is held for one look, never
/// across an await.
#[derive(Debug)]
struct Board {
    seats: Vec<Seats>,
    tasks: HashMap<TaskId, OnReplica>,
}

#[derive(Debug)]
struct Seats {
    watch: Watch,
    running: u32,
    /// Tasks given to it so far.
    served: u64,
}

#[derive(Debug, Clone)]
struct OnReplica {
    /// None while it is between two.
    replica: Option<usize>,
    cancel: CancellationToken,
}

/// Where a task goes next.
pub(crate) enum Choice {
    Take(Seat),
    /// All that could take it are busy until then.
    Wait(Instant),
    None,
}

impl Replicas {
    /// Connects to nothing yet: no replica is given tasks before it was checked.
    /// Fails as [`OpenaiAdapter::new`]. The replicas are called `r0`, `r1` and so on.
    pub fn new(endpoints: Vec<Endpoint>, waits: Waits) -> Result<Self, WorkerError> {
        let now = Instant::now();
        let mut replicas = Vec::new();
        for (index, endpoint) in endpoints.into_iter().enumerate() {
            let id = format!("r{index}").parse();
            replicas.push(Replica {
                id: id.map_err(|error| WorkerError::InvalidParams {
                    message: format!("replica {index}: {error}"),
                })?,
                adapter: OpenaiAdapter::new(endpoint, waits)?,
            });
        }
        let seats = |_: &Replica| Seats {
            watch: Watch::new(now),
            running: 0,
            served: 0,
        };
        let board = Board {
            seats: replicas.iter().map(seats).collect(),
            tasks: HashMap::new(),
        };
        Ok(Self {
            shared: Arc::new(Shared {
                replicas,
                board: Mutex::new(board),
                changed: Notify::new(),
            }),
        })
    }

    /// When the next check is due.
    pub fn next_check(&self) -> Instant {
        let board = self.shared.lock();
        let next = board.seats.iter().map(|seats| seats.watch.next()).min();
        next.unwrap_or_else(|| Instant::now() + PROBE_LIMIT)
    }

    /// Checks those that are due, side by side. May be dropped.
    pub async fn check_due(&self) {
        let now = Instant::now();
        let due: Vec<(usize, bool)> = {
            let board = self.shared.lock();
            let seats = board.seats.iter().enumerate();
            let due = seats.filter(|(_, seats)| seats.watch.next() <= now);
            due.map(|(index, seats)| (index, seats.watch.wants_probe()))
                .collect()
        };
        join_all(
            due.into_iter()
                .map(|(index, probe)| self.check(index, probe)),
        )
        .await;
    }

    async fn check(&self, index: usize, probe: bool) {
        let Some(replica) = self.shared.replicas.get(index) else {
            return;
        };
        let checked = async {
            replica.adapter.check().await?;
            if probe {
                replica.adapter.probe(PROBE_LIMIT).await?;
            }
            Ok(())
        };
        let outcome = timeout(2 * PROBE_LIMIT, checked).await;
        let outcome = outcome.unwrap_or(Err(WorkerError::Timeout {
            phase: TimeoutPhase::Response,
            after: 2 * PROBE_LIMIT,
        }));
        let outcome = outcome.map_err(|error| one_line(&error));
        let (id, url) = (&replica.id, &replica.adapter.endpoint().url);
        let changed = {
            let mut board = self.shared.lock();
            let watch = &mut board.seats[index].watch;
            watch.checked(outcome.clone(), Instant::now())
        };
        if changed {
            match outcome {
                Ok(()) => tracing::info!(replica = %id, url, "the replica is well"),
                Err(why) => tracing::warn!(replica = %id, url, why, "the replica is not well"),
            }
            self.shared.changed.notify_one();
        }
    }

    /// Waits until replicas went out or came back since this was last called. For one
    /// caller.
    pub async fn changed(&self) {
        self.shared.changed.notified().await;
    }

    /// How many tasks the replicas that are well take together.
    pub fn capacity(&self) -> u32 {
        let statuses = self.replicas();
        let well = statuses.iter().filter(|status| status.healthy);
        well.map(|status| status.slots).fold(0, u32::saturating_add)
    }

    /// How many tasks run here.
    pub fn running(&self) -> usize {
        self.shared.lock().tasks.len()
    }

    /// What is known of the replicas' failures, if none is well: each with its reason.
    pub fn complaint(&self) -> String {
        let statuses = self.replicas();
        let complaints: Vec<String> = statuses
            .iter()
            .filter_map(|status| {
                let why = status.last_error.as_ref()?;
                Some(format!("{}: {why}", status.id))
            })
            .collect();
        if complaints.is_empty() {
            "no replica has answered yet".to_owned()
        } else {
            complaints.join("; ")
        }
    }

    /// One that is well, else the first.
    fn any(&self) -> Result<&OpenaiAdapter, WorkerError> {
        let well = {
            let board = self.shared.lock();
            board.seats.iter().position(|seats| seats.watch.is_up())
        };
        let replica = self.shared.replicas.get(well.unwrap_or(0));
        let replica = replica.ok_or_else(|| WorkerError::NotOffered {
            what: "anything: it has no replica".to_owned(),
        })?;
        Ok(&replica.adapter)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Board> {
        // No code that holds the lock can panic half-way through a change.
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None` if a task of this id runs already.
    pub(crate) fn register(self: &Arc<Self>, task: TaskId) -> Option<Entry> {
        let mut board = self.lock();
        if board.tasks.contains_key(&task) {
            return None;
        }
        let cancel = CancellationToken::new();
        board.tasks.insert(
            task,
            OnReplica {
                replica: None,
                cancel: cancel.clone(),
            },
        );
        Some(Entry {
            shared: Arc::clone(self),
            task,
            cancel,
        })
    }

    /// The least loaded replica that is well, is not busy by its own word, and was not
    /// tried.
    pub(crate) fn choose(self: &Arc<Self>, task: TaskId, tried: &[usize]) -> Choice {
        let now = Instant::now();
        let mut board = self.lock();
        let slots = |index: usize| u64::from(self.replicas[index].adapter.endpoint().slots);
        let (mut best, mut wait): (Option<usize>, Option<Instant>) = (None, None);
        for (index, seats) in board.seats.iter().enumerate() {
            if !seats.watch.is_up() || tried.contains(&index) {
                continue;
            }
            if let Some(until) = seats.watch.rests_until(now) {
                wait = Some(wait.map_or(until, |wait| wait.min(until)));
                continue;
            }
            let less = |other: usize| {
                let that = &board.seats[other];
                let mine = (u64::from(seats.running) * slots(other), seats.served);
                mine < (u64::from(that.running) * slots(index), that.served)
            };
            if best.is_none_or(less) {
                best = Some(index);
            }
        }
        let Some(index) = best else {
            return wait.map_or(Choice::None, Choice::Wait);
        };
        let seats = &mut board.seats[index];
        seats.running += 1;
        seats.served += 1;
        if let Some(on) = board.tasks.get_mut(&task) {
            on.replica = Some(index);
        }
        Choice::Take(Seat {
            shared: Arc::clone(self),
            index,
        })
    }

    /// Tells a replica's watch of something, and the owner of a change.
    pub(crate) fn tell(&self, index: usize, tell: impl FnOnce(&mut Watch, Instant) -> bool) {
        let changed = tell(&mut self.lock().seats[index].watch, Instant::now());
        if changed {
            let replica = &self.replicas[index];
            tracing::warn!(
                replica = %replica.id, url = replica.adapter.endpoint().url,
                "the replica failed a task and is given no more for now"
            );
        }
        // The owner's next check may be earlier by now.
        self.changed.notify_one();
    }
}

/// A running task's entry; dropping it takes the entry out.
#[derive(Debug)]
pub(crate) struct Entry {
    shared: Arc<Shared>,
    pub(crate) task: TaskId,
    pub(crate) cancel: CancellationToken,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.lock().tasks.remove(&self.task);
    }
}

/// A task's place on a replica; dropping it makes it free.
#[derive(Debug)]
pub(crate) struct Seat {
    shared: Arc<Shared>,
    pub(crate) index: usize,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let seats = &mut self.shared.lock().seats[self.index];
        seats.running = seats.running.saturating_sub(1);
    }
}

#[async_trait]
impl WorkerAdapter for Replicas {
    /// As the checks have found it.
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        if self.capacity() > 0 {
            return Ok(EngineHealth::Ready);
        }
        Err(WorkerError::Unavailable {
            url: self.any()?.endpoint().url.clone(),
            reason: self.complaint(),
            retry_after: None,
        })
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        let props = self.any()?.props().await?;
        Ok(EngineProps {
            slots: self.capacity(),
            ..props
        })
    }

    async fn count_tokens(&self, input: &TaskInput) -> Result<u32, WorkerError> {
        self.any()?.count_tokens(input).await
    }

    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError> {
        self.submit_traced(task, "").await
    }

    async fn submit_traced(
        &self,
        task: EngineTask,
        correlation_id: &str,
    ) -> Result<TokenStream, WorkerError> {
        let entry = self
            .shared
            .register(task.id)
            .ok_or_else(|| WorkerError::InvalidParams {
                message: format!("task {} runs already", task.id),
            })?;
        Way::new(Arc::clone(&self.shared), entry, task, correlation_id)
            .into_stream()
            .await
    }

    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError> {
        let Some(on) = self.shared.lock().tasks.get(&task).cloned() else {
            return Ok(CancelReport::NotRunning);
        };
        let replica = on.replica.and_then(|index| self.shared.replicas.get(index));
        let report = match replica {
            Some(replica) => replica.adapter.cancel(task).await,
            None => Ok(CancelReport::NotRunning),
        };
        // Wherever it was on its way to.
        on.cancel.cancel();
        match report? {
            CancelReport::NotRunning => Ok(CancelReport::NotShown),
            report => Ok(report),
        }
    }

    async fn probe(&self, limit: Duration) -> Result<(), WorkerError> {
        self.any()?.probe(limit).await
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        self.any()?.engine_version().await
    }

    fn replica_of(&self, task: TaskId) -> Option<ReplicaId> {
        let index = self.shared.lock().tasks.get(&task)?.replica?;
        Some(self.shared.replicas.get(index)?.id.clone())
    }

    fn replicas(&self) -> Vec<ReplicaStatus> {
        let board = self.shared.lock();
        let both = self.shared.replicas.iter().zip(&board.seats);
        both.map(|(replica, seats)| ReplicaStatus {
            id: replica.id.clone(),
            url: replica.adapter.endpoint().url.clone(),
            healthy: seats.watch.is_up(),
            running: seats.running,
            slots: replica.adapter.endpoint().slots,
            last_error: seats.watch.error().map(str::to_owned),
        })
        .collect()
    }
}
