//! From a pool's configuration to an engine that is ready.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_orch_types::{ModelMetadata, ProvisionedContext, ReplicaId};
use metrics::histogram;
use provisioners_engine_provisioner::{EngineInstallation, LaunchSpec, PoolLock};
use provisioners_model_provisioner::Recording;

use super::keeper::{Beside, Kept};
use super::machine::Machine;
use super::memory::Estimate;
use super::room::{self, Running};
use super::{Parts, ProvisionError, STOP_GRACE};
use crate::app::config::{PoolConfig, shown_model};
use crate::runtimes::apart;
use crate::services::pool::Change;
use crate::services::telemetry;

/// How long a new engine may take for one token, to show that it can.
const PROOF_LIMIT: Duration = Duration::from_mins(1);

impl Parts {
    /// Provides an engine, waits until there is memory for it, starts it, and lets
    /// it prove itself if it must.
    pub(super) async fn bring_up(
        &self,
        order: u64,
        config: &Arc<PoolConfig>,
        lock: Option<PoolLock>,
        prove: bool,
    ) -> Result<Kept, ProvisionError> {
        let begun = Instant::now();
        self.pool.report(order, Change::Provisioning).await;
        let (model, recording, installation) = Box::pin(self.provide(Some(order), config)).await?;
        let spec = self.launch_spec(config, model);
        let estimate = Estimate::of(&installation, &spec).await;
        // Before the engine, and so given back after it.
        let place = Box::pin(self.place(order, config, estimate)).await?;
        self.pool.report(order, Change::Starting).await;
        let started = match lock {
            Some(lock) => self.engines.start_after(&installation, spec, lock).await,
            None => self.engines.start(&installation, spec).await,
        };
        let engine = started.map_err(ProvisionError::Start)?;
        // Written while the engine loaded.
        recording.written().await;
        if prove {
            self.host
                .prove(engine.context(), PROOF_LIMIT)
                .await
                .map_err(ProvisionError::Unproved)?;
        }
        let context = engine.context();
        histogram!(telemetry::READY_AFTER, "pool" => self.pool.id().to_string())
            .record(begun.elapsed());
        tracing::info!(
            pool = %context.pool_id, engine = context.engine_version, mode = %context.provisioning_mode,
            model = shown_model(&config.model), ctx = context.ctx, slots = context.slots, url = context.url,
            took_ms = begun.elapsed().as_millis() as u64, "pool ready"
        );
        Ok(Kept::new(engine, place, Arc::clone(config)))
    }

    /// Provides another engine and, where there is room, starts it beside the
    /// one that runs and lets it prove itself.
    pub(super) async fn beside(
        &self,
        config: &Arc<PoolConfig>,
        running: &Running,
        lock: PoolLock,
    ) -> Result<Beside, ProvisionError> {
        let (model, recording, installation) = Box::pin(self.provide(None, config)).await?;
        recording.written().await;
        let spec = self.launch_spec(config, model);
        let estimate = Estimate::of(&installation, &spec).await;
        let machine = Machine::look(estimate.on_gpu).await;
        let need = room::need(estimate.needs, spec.model.digest, running);
        // Asked even where the machine has no room: what never fits is told before
        // the old engine goes for it.
        let place = self.place_beside(estimate).await?;
        let place = place.and_then(|place| room::enough(need, &machine).map(|()| place));
        let place = match place {
            Ok(place) => place,
            Err(why) => {
                tracing::info!(pool = %self.pool.id(), why, "the old engine has to go first");
                return Ok(Beside::NoRoom(why));
            }
        };
        let engine = self
            .engines
            .start_beside(&installation, spec, lock)
            .await
            .map_err(ProvisionError::Start)?;
        self.host
            .prove(engine.context(), PROOF_LIMIT)
            .await
            .map_err(ProvisionError::Unproved)?;
        let kept = Kept::new(engine, place, Arc::clone(config));
        Ok(Beside::Ready(Box::new(kept)))
    }

    pub(super) fn bind(&self, context: &ProvisionedContext) -> Result<(), ProvisionError> {
        self.host
            .bind(context.clone())
            .map_err(ProvisionError::Bind)
    }

    /// Model and engine side by side: they do not depend on each other, and one's
    /// failure does not throw away what the other has done so far. But it is
    /// told at once, under `order`, if there is one. The recording of the model's use goes on
    /// beside what follows.
    async fn provide(
        &self,
        order: Option<u64>,
        config: &PoolConfig,
    ) -> Result<(ModelMetadata, Recording, EngineInstallation), ProvisionError> {
        let (models, model) = (Arc::clone(&self.models), config.model.clone());
        let model = apart(async move {
            let model = models.ensure_ahead(&model).await;
            model.map_err(ProvisionError::Model)
        });
        let (engines, engine) = (self.engines.clone(), config.provision.clone());
        let engine = apart(async move {
            let engine = engines.ensure(&engine).await;
            engine.map_err(ProvisionError::Engine)
        });
        let (model, engine) = tokio::join!(
            self.telling_failure(order, model),
            self.telling_failure(order, engine)
        );
        let (model, recording) = model?;
        Ok((model, recording, engine?))
    }

    async fn telling_failure<T>(
        &self,
        order: Option<u64>,
        work: impl Future<Output = Result<T, ProvisionError>>,
    ) -> Result<T, ProvisionError> {
        let result = work.await;
        if let (Err(error), Some(order)) = (&result, order) {
            let trouble = Change::Trouble(error.failure());
            self.pool.report(order, trouble).await;
        }
        result
    }

    fn launch_spec(&self, config: &PoolConfig, model: ModelMetadata) -> LaunchSpec {
        LaunchSpec {
            pool_id: self.pool.id().clone(),
            replica_id: ReplicaId::first(),
            model,
            ctx: config.ctx,
            slots: config.slots,
            profile: config.effective_profile(),
            purpose: config.purpose(),
            threads: config.threads,
            gpu_layers: config.gpu_layers,
            flags: config.flags.clone(),
            load_timeout: Duration::from_secs(config.load_timeout_seconds),
            stop_grace: STOP_GRACE,
        }
    }
}
