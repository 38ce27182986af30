//! How a pool comes to life, at start and later: its owner, and the supervisor
//! that its engine needs.

use std::sync::Arc;
use std::time::Duration;

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, PoolId};
#[cfg(feature = "provisioning")]
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::Reporter;
#[cfg(feature = "provisioning")]
use provisioners_model_provisioner::{ModelProvisioner, ModelProvisionerConfig};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::bootstrap::StartError;
use super::config::PoolConfig;
use crate::services::pool::{Leaving, PoolHandle, PoolSettings};
use crate::services::preparation::PreparationBoard;
#[cfg(feature = "provisioning")]
use crate::services::residency::Residency;

/// What every pool is started with.
#[derive(Debug)]
pub(super) struct Launcher {
    #[cfg(feature = "provisioning")]
    pub(super) models: ModelProvisionerConfig,
    #[cfg(feature = "provisioning")]
    pub(super) dirs: (CacheDirs, RuntimeDirs),
    pub(super) host: AdapterHost,
    #[cfg(feature = "provisioning")]
    pub(super) residency: Residency,
    pub(super) reporter: Arc<dyn Reporter>,
    /// Every supervisor, so that the daemon's end can wait for them.
    pub(super) supervisors: TaskTracker,
    /// Stops all of them.
    pub(super) stop: CancellationToken,
}

/// A pool that lives, with what it takes to end it.
#[derive(Debug)]
pub(super) struct LivePool {
    pub(super) handle: PoolHandle,
    stop: CancellationToken,
    supervisor: JoinHandle<()>,
}

impl LivePool {
    /// Lets the pool's running tasks finish within `drain`, ends its queued
    /// ones, and stops its engine. Says whether the engine is gone within
    /// `stop_limit`.
    pub(super) async fn end(self, why: Leaving, drain: Duration, stop_limit: Duration) -> bool {
        self.handle.end(why, drain).await;
        self.stop.cancel();
        tokio::time::timeout(stop_limit, self.supervisor)
            .await
            .is_ok()
    }
}

impl Launcher {
    /// Starts a pool's owner and its supervisor; returns at once. `drain` is how
    /// long its running tasks may go on when their engine is to end.
    pub(super) fn launch(
        &self,
        id: &PoolId,
        pool: &PoolConfig,
        drain: Duration,
    ) -> Result<LivePool, StartError> {
        let board = PreparationBoard::new(Arc::clone(&self.reporter));
        let settings = PoolSettings::new(id.clone(), Arc::new(pool.clone()), drain);
        let handle = PoolHandle::start(settings, self.host.clone(), board);
        let stop = self.stop.child_token();
        let supervisor = self.supervise(id, pool, &handle, stop.clone())?;
        Ok(LivePool {
            handle,
            stop,
            supervisor,
        })
    }

    /// Starts the supervisor that a pool needs.
    #[cfg_attr(not(feature = "provisioning"), allow(clippy::unnecessary_wraps))]
    fn supervise(
        &self,
        id: &PoolId,
        pool: &PoolConfig,
        handle: &PoolHandle,
        stop: CancellationToken,
    ) -> Result<JoinHandle<()>, StartError> {
        let (handle, host) = (handle.clone(), self.host.clone());
        #[cfg(feature = "env-shim")]
        if let Some(target) = crate::env_shim::target_for(id) {
            let shim = crate::env_shim::supervise(target, handle, host, stop);
            return Ok(self.supervisors.spawn(shim));
        }
        if pool.engine == EngineKind::Openai {
            let remote = crate::remote_pool::supervise(handle, host, stop);
            return Ok(self.supervisors.spawn(remote));
        }
        #[cfg(feature = "mock-adapter")]
        if pool.engine == EngineKind::Mock {
            let mock = crate::mock_pool::supervise(handle, host, pool.slots, stop);
            return Ok(self.supervisors.spawn(mock));
        }
        // Refused by the configuration's check in builds without it.
        debug_assert!(
            pool.engine == EngineKind::Llamacpp,
            "pool {id} has an engine that this build does not know"
        );
        #[cfg(feature = "provisioning")]
        {
            // The pool's own board takes the progress, so that it shows where it belongs.
            let models = model_provisioner(&self.models, &self.dirs, handle.board().clone())?;
            let residency = self.residency.clone();
            let supervisor = crate::provisioning::Supervisor::new(
                handle, host, models, &self.dirs, residency, stop,
            );
            Ok(self.supervisors.spawn(supervisor.run()))
        }
        #[cfg(not(feature = "provisioning"))]
        {
            drop(host);
            Ok(self.supervisors.spawn(no_engine(handle, stop)))
        }
    }
}

/// A provisioner of models that reports to `reporter`.
#[cfg(feature = "provisioning")]
pub(super) fn model_provisioner(
    config: &ModelProvisionerConfig,
    (cache, runtime): &(CacheDirs, RuntimeDirs),
    reporter: Arc<dyn Reporter>,
) -> Result<ModelProvisioner, StartError> {
    ModelProvisioner::new(config.clone(), cache, runtime, reporter).map_err(StartError::Models)
}

/// A build without provisioning has no engine to offer, and says so.
#[cfg(not(feature = "provisioning"))]
async fn no_engine(pool: PoolHandle, stop: CancellationToken) {
    use crate::services::event_log::Failure;
    use crate::services::pool::{Change, Wanted};
    let failure = Failure::new(
        llama_orch_types::ErrorCode::PoolUnavailable,
        "this build of orchestratord provisions no engine",
    )
    .with_hint("use a build with the feature `provisioning`, which is on by default");
    let mut orders = pool.orders();
    loop {
        let wanted = orders.borrow_and_update().wanted.clone();
        let change = match wanted {
            Wanted::Start { .. } => Change::NotStarted {
                failure: failure.clone(),
                log: Vec::new(),
            },
            _ => Change::Stopped,
        };
        pool.change(change).await;
        tokio::select! {
            changed = orders.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
