//! The host: (pool, replica) → adapter.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use futures::future::join_all;
use llama_orch_types::{EngineKind, PoolId, ProvisionedContext, ReplicaId, TaskId};
use worker_adapters_adapter_api::{
    CancelReport, EngineHealth, EngineProps, EngineTask, ReplicaStatus, TaskInput, TokenStream,
    WorkerAdapter, WorkerError,
};
use worker_adapters_llamacpp_http::LlamaCppAdapter;

use crate::error::HostError;
use crate::running::RunningTasks;
use crate::settings::HostSettings;

/// Routes tasks to engines. Clones share everything.
#[derive(Debug, Clone, Default)]
pub struct AdapterHost {
    settings: HostSettings,
    bindings: Arc<RwLock<Bindings>>,
    running: Arc<RunningTasks>,
}

/// Replicas of a pool in the order of their ids.
type Bindings = HashMap<PoolId, BTreeMap<ReplicaId, Arc<Binding>>>;

/// An engine and the adapter that speaks to it. Never changes; rebinding makes
/// another one.
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) context: Arc<ProvisionedContext>,
    adapter: Arc<dyn WorkerAdapter>,
    /// As last asked.
    health: Mutex<BindingHealth>,
}

/// What is known of an engine's health.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BindingHealth {
    /// Not asked yet.
    Unknown,
    Ready,
    Loading,
    /// It did not answer, or not as its protocol says.
    Failed,
}

/// One binding at one moment.
#[derive(Debug, Clone)]
pub struct BindingSnapshot {
    pub context: Arc<ProvisionedContext>,
    /// Tasks running on this binding.
    pub running: usize,
    /// Tasks still running on bindings that this one has replaced.
    pub draining: usize,
    /// As last asked through [`AdapterHost::health`].
    pub health: BindingHealth,
}

impl Binding {
    fn set_health(&self, outcome: Result<EngineHealth, &WorkerError>) {
        let health = match outcome {
            Ok(EngineHealth::Ready) => BindingHealth::Ready,
            Ok(EngineHealth::Loading) => BindingHealth::Loading,
            Err(_) => BindingHealth::Failed,
        };
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health;
    }

    fn health(&self) -> BindingHealth {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AdapterHost {
    pub fn new(settings: HostSettings) -> Self {
        Self {
            settings,
            ..Self::default()
        }
    }

    /// How long adapters wait, for those who make one themselves.
    pub fn settings(&self) -> HostSettings {
        self.settings
    }

    /// Binds an engine, or binds it anew: new tasks go to the new binding, and
    /// running streams stay where they are.
    pub fn bind(&self, context: ProvisionedContext) -> Result<(), HostError> {
        let adapter = self.adapter_for(&context)?;
        self.bind_adapter(context, adapter);
        Ok(())
    }

    /// The same with an adapter that the caller made.
    pub fn bind_adapter(&self, context: ProvisionedContext, adapter: Arc<dyn WorkerAdapter>) {
        tracing::info!(
            pool = %context.pool_id,
            replica = %context.replica_id,
            engine = %context.engine,
            url = %context.url,
            "engine bound"
        );
        let (pool, replica) = (context.pool_id.clone(), context.replica_id.clone());
        let binding = Arc::new(Binding {
            context: Arc::new(context),
            adapter,
            health: Mutex::new(BindingHealth::Unknown),
        });
        let replaced = self
            .write()
            .entry(pool)
            .or_default()
            .insert(replica, binding);
        // The last owner of an adapter closes its connections: not under the lock.
        drop(replaced);
    }

    /// Takes an engine out: it gets no new task, running streams go on. False
    /// if it was not bound.
    pub fn unbind(&self, pool: &PoolId, replica: &ReplicaId) -> bool {
        let mut bindings = self.write();
        let Some(replicas) = bindings.get_mut(pool) else {
            return false;
        };
        let removed = replicas.remove(replica);
        if replicas.is_empty() {
            bindings.remove(pool);
        }
        drop(bindings);
        removed.is_some()
    }

    /// Starts a task on the pool's least busy engine. The task counts as
    /// running until its stream ends or is dropped.
    pub async fn submit(&self, pool: &PoolId, task: EngineTask) -> Result<TokenStream, HostError> {
        self.start(self.least_busy(pool)?, task, "").await
    }

    /// The same on this engine and no other: where the pool is bound to another
    /// by now, as if it were bound to none. An engine that has a place for it is told
    /// the correlation id.
    pub async fn submit_to(
        &self,
        context: &ProvisionedContext,
        task: EngineTask,
        correlation_id: &str,
    ) -> Result<TokenStream, HostError> {
        let pool = &context.pool_id;
        let bound = self.of_pool(pool)?;
        let binding = bound
            .into_iter()
            .find(|binding| *binding.context == *context)
            .ok_or_else(|| not_bound(pool))?;
        self.start(binding, task, correlation_id).await
    }

    async fn start(
        &self,
        binding: Arc<Binding>,
        task: EngineTask,
        correlation_id: &str,
    ) -> Result<TokenStream, HostError> {
        let id = task.id;
        let entry = self
            .running
            .register(id, Arc::clone(&binding))
            .ok_or(HostError::AlreadyRunning { task: id })?;
        let stream = binding.adapter.submit_traced(task, correlation_id).await?;
        Ok(entry.track(stream))
    }

    /// Cancels a task on the adapter that runs it, wherever its pool is bound
    /// by now. A task that does not run in this pool is no error.
    pub async fn cancel(&self, pool: &PoolId, task: TaskId) -> Result<CancelReport, HostError> {
        match self.running.get(pool, task) {
            Some(binding) => Ok(binding.adapter.cancel(task).await?),
            None => Ok(CancelReport::NotRunning),
        }
    }

    /// The adapter that runs a task, for one who must wait on after the task's
    /// stream has ended; `None` if the task does not run in this pool.
    pub fn adapter_of(&self, pool: &PoolId, task: TaskId) -> Option<Arc<dyn WorkerAdapter>> {
        let binding = self.running.get(pool, task)?;
        Some(Arc::clone(&binding.adapter))
    }

    /// Which of a pool's replicas a running task is on; `None` where the pool has one
    /// engine, or the task does not run in it.
    pub fn replica_of(&self, pool: &PoolId, task: TaskId) -> Option<ReplicaId> {
        self.running.get(pool, task)?.adapter.replica_of(task)
    }

    /// The replicas behind the pool's adapter; empty where it has one engine.
    pub fn replicas(&self, pool: &PoolId) -> Vec<ReplicaStatus> {
        let bindings = self.of_pool(pool).unwrap_or_default();
        let replicas = bindings.iter().map(|binding| binding.adapter.replicas());
        replicas.flatten().collect()
    }

    /// Lets every engine of the pool generate one token within `limit`; the first
    /// failure, if one fails.
    pub async fn probe(&self, pool: &PoolId, limit: Duration) -> Result<(), HostError> {
        let bindings = self.of_pool(pool)?;
        let probes = bindings.iter().map(|binding| binding.adapter.probe(limit));
        let failure = join_all(probes).await.into_iter().find_map(Result::err);
        failure.map_or(Ok(()), |error| Err(HostError::Worker(error)))
    }

    /// Lets an engine that is not bound generate one token within `limit`.
    pub async fn prove(
        &self,
        context: &ProvisionedContext,
        limit: Duration,
    ) -> Result<(), HostError> {
        Ok(self.adapter_for(context)?.probe(limit).await?)
    }

    /// How many tokens this input is for the pool's model.
    pub async fn count_tokens(&self, pool: &PoolId, input: &TaskInput) -> Result<u32, HostError> {
        Ok(self.least_busy(pool)?.adapter.count_tokens(input).await?)
    }

    /// What the pool's engine says of itself.
    pub async fn props(&self, pool: &PoolId) -> Result<EngineProps, HostError> {
        Ok(self.least_busy(pool)?.adapter.props().await?)
    }

    /// Asks every engine of the pool. Ready if one is, else loading if one is,
    /// else the first one's failure.
    pub async fn health(&self, pool: &PoolId) -> Result<EngineHealth, HostError> {
        let bindings = self.of_pool(pool)?;
        let answers = join_all(bindings.iter().map(async |binding| {
            let answer = binding.adapter.health().await;
            binding.set_health(answer.as_ref().copied());
            answer
        }))
        .await;
        let any = |wanted| {
            answers
                .iter()
                .any(|answer| matches!(answer, Ok(health) if *health == wanted))
        };
        for health in [EngineHealth::Ready, EngineHealth::Loading] {
            if any(health) {
                return Ok(health);
            }
        }
        let failure = answers.into_iter().find_map(Result::err);
        Err(failure.map_or_else(|| not_bound(pool), HostError::Worker))
    }

    /// What the pool is bound to: its first replica's context.
    pub fn context(&self, pool: &PoolId) -> Option<Arc<ProvisionedContext>> {
        let bindings = self.read();
        let (_, first) = bindings.get(pool)?.first_key_value()?;
        Some(Arc::clone(&first.context))
    }

    /// All bindings, sorted by pool and replica.
    pub fn snapshot(&self) -> Vec<BindingSnapshot> {
        let bindings: Vec<Arc<Binding>> = self
            .read()
            .values()
            .flat_map(BTreeMap::values)
            .cloned()
            .collect();
        let mut snapshots: Vec<BindingSnapshot> = bindings
            .iter()
            .map(|binding| BindingSnapshot {
                context: Arc::clone(&binding.context),
                running: self.running.on(binding),
                draining: self.running.on_predecessors_of(binding),
                health: binding.health(),
            })
            .collect();
        let place = |snapshot: &BindingSnapshot| {
            (
                snapshot.context.pool_id.clone(),
                snapshot.context.replica_id.clone(),
            )
        };
        snapshots.sort_by_cached_key(place);
        snapshots
    }

    fn adapter_for(
        &self,
        context: &ProvisionedContext,
    ) -> Result<Arc<dyn WorkerAdapter>, HostError> {
        match context.engine {
            EngineKind::Llamacpp => {
                let settings = self.settings.for_engine(context);
                Ok(Arc::new(LlamaCppAdapter::new(settings)?))
            }
            #[cfg(feature = "mock-adapter")]
            EngineKind::Mock => Ok(Arc::new(worker_adapters_mock::MockAdapter::new(
                worker_adapters_mock::MockScript::default(),
            ))),
            // Bound by whoever holds its tokens, with an adapter of its own.
            #[cfg(feature = "mock-adapter")]
            EngineKind::Openai => Err(HostError::UnsupportedEngine {
                pool: context.pool_id.clone(),
                engine: context.engine,
            }),
            #[cfg(not(feature = "mock-adapter"))]
            EngineKind::Mock | EngineKind::Openai => Err(HostError::UnsupportedEngine {
                pool: context.pool_id.clone(),
                engine: context.engine,
            }),
        }
    }

    fn of_pool(&self, pool: &PoolId) -> Result<Vec<Arc<Binding>>, HostError> {
        let bindings = self.read();
        let replicas = bindings.get(pool).ok_or_else(|| not_bound(pool))?;
        Ok(replicas.values().cloned().collect())
    }

    /// The binding with the most free slots; among equals the first.
    fn least_busy(&self, pool: &PoolId) -> Result<Arc<Binding>, HostError> {
        let free = |binding: &Arc<Binding>| {
            (binding.context.slots as usize).saturating_sub(self.running.on(binding))
        };
        self.of_pool(pool)?
            .into_iter()
            .min_by_key(|binding| Reverse(free(binding)))
            .ok_or_else(|| not_bound(pool))
    }

    fn read(&self) -> RwLockReadGuard<'_, Bindings> {
        // No code that holds the lock can panic half-way through a change.
        self.bindings.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Bindings> {
        self.bindings
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_bound(pool: &PoolId) -> HostError {
    HostError::NotBound { pool: pool.clone() }
}
