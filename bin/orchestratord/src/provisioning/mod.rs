//! Drives both provisioners for one pool, and keeps its engine running.
//!
//! ```text
//! model ─┐
//!        ├─► start ─► health 200 ─► ProvisionedContext ─► bind ─► Ready
//! engine ┘                                                   │
//!   ▲                                                        ▼ engine exited
//!   └──────────────── wait (restart policy) ◄──────────── unbind
//! ```

pub mod restart;

use std::sync::Arc;
use std::time::{Duration, Instant};

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, Hinted, ModelMetadata, ReplicaId};
use metrics::histogram;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::Reporter;
use provisioners_engine_provisioner::{
    EngineError, EngineInstallation, EngineProvisioner, LaunchSpec, RunningEngine,
};
use provisioners_model_provisioner::{ModelError, ModelProvisioner};
use tokio_util::sync::CancellationToken;

use self::restart::{Ending, RestartPolicy, Verdict};
use crate::app::config::PoolConfig;
use crate::services::event_log::Failure;
use crate::services::pool::{Change, Phase, PoolHandle};
use crate::services::telemetry;
use provision_kit::chain::one_line;

/// How long an engine may take to end after it was asked to.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Log lines of a dead engine that its error repeats.
const TAIL_LINES: usize = 8;

/// Owns one pool's engine process.
#[derive(Debug)]
pub struct Supervisor {
    pool: PoolHandle,
    host: AdapterHost,
    config: PoolConfig,
    models: ModelProvisioner,
    engines: EngineProvisioner,
    stop: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum ProvisionError {
    #[error("the model could not be provided")]
    Model(#[source] ModelError),
    #[error("the engine could not be provided")]
    Engine(#[source] EngineError),
    #[error("the engine could not be started")]
    Start(#[source] EngineError),
    #[error("the engine could not be bound")]
    Bind(#[source] adapter_host::HostError),
}

impl ProvisionError {
    fn failure(&self) -> Failure {
        let (hint, retriable) = match self {
            Self::Model(error) => (error.hint(), error.retriable()),
            Self::Engine(error) | Self::Start(error) => (error.hint(), error.retriable()),
            Self::Bind(_) => (None, false),
        };
        Failure {
            hint,
            retriable,
            ..Failure::new(ErrorCode::PoolUnavailable, one_line(self))
        }
    }
}

impl Supervisor {
    pub fn new(
        pool: PoolHandle,
        host: AdapterHost,
        config: &PoolConfig,
        models: ModelProvisioner,
        (cache, runtime): &(CacheDirs, RuntimeDirs),
        stop: CancellationToken,
    ) -> Self {
        // The pool's own board, so that progress shows where it belongs.
        let reporter: Arc<dyn Reporter> = pool.board().clone();
        Self {
            models,
            engines: EngineProvisioner::new(cache.clone(), runtime.clone(), reporter),
            pool,
            host,
            config: config.clone(),
            stop,
        }
    }

    /// Runs until told to stop. Whatever it was doing then is dropped, which
    /// ends every process it had started.
    pub async fn run(self) {
        let stop = self.stop.clone();
        let mut policy = RestartPolicy::default();
        loop {
            let (ending, failure) = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                brought_up = self.bring_up() => match brought_up {
                    Ok(engine) => match self.watch(engine).await {
                        Some((lived, failure)) => (Ending::Exited { lived }, failure),
                        None => return,
                    },
                    Err(error) => {
                        let failure = error.failure();
                        (Ending::NotStarted { retriable: failure.retriable }, failure)
                    }
                },
            };
            // A pool that is being shut down gets no new engine.
            if matches!(self.pool.snapshot().phase, Phase::Draining | Phase::Stopped) {
                return;
            }
            let exited = matches!(ending, Ending::Exited { .. });
            let delay = self.tell(policy.decide(ending), failure, exited).await;
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stop.cancelled() => return,
            }
        }
    }

    async fn bring_up(&self) -> Result<RunningEngine, ProvisionError> {
        let begun = Instant::now();
        self.pool.change(Change::Provisioning).await;
        let (model, installation) = self.provide().await?;
        self.pool.change(Change::Starting).await;
        let engine = self
            .engines
            .start(&installation, self.launch_spec(model))
            .await
            .map_err(ProvisionError::Start)?;
        let context = engine.context().clone();
        self.host
            .bind(context.clone())
            .map_err(ProvisionError::Bind)?;
        histogram!(telemetry::READY_AFTER, "pool" => self.pool.settings().id.to_string())
            .record(begun.elapsed());
        tracing::info!(
            pool = %context.pool_id, engine = context.engine_version, mode = %context.provisioning_mode,
            model = self.config.model, ctx = context.ctx, slots = context.slots, url = context.url,
            took_ms = begun.elapsed().as_millis() as u64, "pool ready"
        );
        self.pool.change(Change::Ready(Arc::new(context))).await;
        Ok(engine)
    }

    /// Model and engine side by side: they do not depend on each other, and one's
    /// failure does not throw away what the other has done so far.
    async fn provide(&self) -> Result<(ModelMetadata, EngineInstallation), ProvisionError> {
        let model = async {
            self.models
                .ensure(&self.config.model)
                .await
                .map_err(ProvisionError::Model)
        };
        let engine = async {
            self.engines
                .ensure(&self.config.provision)
                .await
                .map_err(ProvisionError::Engine)
        };
        let (model, engine) = tokio::join!(model, engine);
        Ok((model?, engine?))
    }

    fn launch_spec(&self, model: ModelMetadata) -> LaunchSpec {
        LaunchSpec {
            pool_id: self.pool.settings().id.clone(),
            replica_id: ReplicaId::first(),
            model,
            ctx: self.config.ctx,
            slots: self.config.slots,
            profile: self.config.effective_profile(),
            threads: self.config.threads,
            gpu_layers: self.config.gpu_layers,
            flags: self.config.flags.clone(),
            load_timeout: Duration::from_secs(self.config.load_timeout_seconds),
            stop_grace: STOP_GRACE,
        }
    }

    /// Waits until the engine ends by itself, and says how long it lived and
    /// why it ended; `None` once it was stopped because we were told to.
    async fn watch(&self, mut engine: RunningEngine) -> Option<(Duration, Failure)> {
        let ready = Instant::now();
        let context = engine.context().clone();
        let exit = tokio::select! {
            exit = engine.wait_exit() => Some(exit),
            reason = self.distrusted() => {
                self.host.unbind(&context.pool_id, &context.replica_id);
                return Some((ready.elapsed(), self.end_hung(engine, &reason).await));
            }
            () = self.stop.cancelled() => None,
        };
        self.host.unbind(&context.pool_id, &context.replica_id);
        let Some(exit) = exit else {
            engine.stop().await;
            return None;
        };
        let status = exit
            .status
            .map_or_else(|| "unknown status".to_owned(), |status| status.to_string());
        let tail = exit.log_tail.iter().rev().take(TAIL_LINES).rev();
        let tail: Vec<&str> = tail.map(String::as_str).collect();
        tracing::error!(pool = %context.pool_id, status = status, log = tail.join("\n"), "engine ended by itself");
        let message = format!("the engine ended by itself: {status}");
        let failure = Failure::new(ErrorCode::PoolUnavailable, message)
            .with_hint("its log in the cache directory tells more")
            .retriable();
        Some((ready.elapsed(), failure))
    }

    /// Why the pool no longer relies on its engine, once it does not.
    async fn distrusted(&self) -> String {
        let snapshot = self
            .pool
            .wait_for(|snapshot| snapshot.distrust.is_some())
            .await;
        match snapshot.and_then(|snapshot| snapshot.distrust) {
            Some(reason) => reason,
            // The pool is gone, and we are about to be told.
            None => std::future::pending().await,
        }
    }

    /// Ends an engine that runs and gives no tokens.
    async fn end_hung(&self, engine: RunningEngine, reason: &str) -> Failure {
        let report = engine.stop().await;
        tracing::error!(pool = %self.pool.settings().id, reason, killed = report.killed, "a hung engine was ended");
        let message = format!("the engine hung and was ended: {reason}");
        Failure::new(ErrorCode::PoolUnavailable, message)
            .with_hint(
                "the machine may be overloaded, or the prompt too long for `first_token_seconds`",
            )
            .retriable()
    }

    async fn tell(&self, verdict: Verdict, failure: Failure, exited: bool) -> Duration {
        let pool = &self.pool.settings().id;
        let (change, delay) = match verdict {
            Verdict::Restart { after } => {
                tracing::warn!(%pool, after_ms = after.as_millis() as u64, "engine is started again");
                (Change::Backoff(failure), after)
            }
            Verdict::Fail { retry_after } => {
                let (message, hint) = (&failure.message, failure.hint.as_deref().unwrap_or(""));
                tracing::error!(%pool, hint, "pool failed: {message}");
                let failure = failure.retry_after(retry_after);
                (Change::Failed { failure, exited }, retry_after)
            }
        };
        self.pool.change(change).await;
        delay
    }
}
