//! A supervisor that breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use adapter_host::{AdapterHost, HostSettings};
use llama_orch_types::PoolId;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::{ProgressEvent, Reporter, Silent};
use provisioners_engine_provisioner::EngineConfig;
use provisioners_model_provisioner::{ModelProvisioner, ModelProvisionerConfig};
use tokio_util::sync::CancellationToken;

use super::Supervisor;
use crate::app::config::PoolConfig;
use crate::services::pool::{Phase, PoolHandle, PoolSettings, PoolSnapshot};
use crate::services::preparation::PreparationBoard;
use crate::services::residency::{Budget, Residency, Rules};

const DEADLINE: Duration = Duration::from_secs(20);

/// Breaks whoever reports to it, once.
#[derive(Debug, Default)]
struct BreaksOnce(AtomicBool);

impl Reporter for BreaksOnce {
    fn report(&self, _: ProgressEvent) {
        assert!(
            self.0.swap(true, Ordering::Relaxed),
            "this reporter breaks once"
        );
    }
}

async fn until(pool: &PoolHandle, wanted: impl FnMut(&PoolSnapshot) -> bool) -> PoolSnapshot {
    let seen = tokio::time::timeout(DEADLINE, pool.wait_for(wanted)).await;
    seen.expect("it comes in time").expect("the pool lives")
}

#[tokio::test]
async fn a_supervisor_that_breaks_fails_its_pool_and_another_one_follows() {
    let dir = tempfile::tempdir().unwrap();
    let dirs = (
        CacheDirs::new(dir.path().join("cache")),
        RuntimeDirs::new(dir.path().join("runtime")),
    );
    let config = PoolConfig {
        model: "/no/such/model.gguf".to_owned(),
        provision: EngineConfig {
            path: Some("/no/such/llama-server".into()),
            ..EngineConfig::default()
        },
        ..PoolConfig::default()
    };
    let host = AdapterHost::new(HostSettings::default());
    let settings = PoolSettings::new(PoolId::default_pool(), Arc::new(config), DEADLINE);
    let board = PreparationBoard::new(Arc::new(BreaksOnce::default()));
    let pool = PoolHandle::start(settings, host.clone(), board);
    let models = ModelProvisioner::new(
        ModelProvisionerConfig::default(),
        &dirs.0,
        &dirs.1,
        Arc::new(Silent),
    );
    let stop = CancellationToken::new();
    let residency = Residency::start(Rules::default(), std::future::ready(Budget::default()));
    let models = models.unwrap();
    let supervisor = Supervisor::new(pool.clone(), host, models, &dirs, residency, stop.clone());
    let supervisor = tokio::spawn(supervisor.run());

    let broken = until(&pool, |snapshot| snapshot.phase == Phase::Failed).await;
    let said = broken.last_error.unwrap().message;
    assert!(said.contains("supervisor broke"), "{said}");
    assert!(broken.next_try.is_some(), "it is tried again");
    // At once, if somebody asks; and then it fails for what is really wrong.
    pool.resume().await.unwrap();
    let failed = until(&pool, |snapshot| {
        let error = snapshot.last_error.as_ref();
        snapshot.phase == Phase::Failed
            && error.is_some_and(|error| error.message.contains("/no/such/"))
    });
    assert_eq!(failed.await.restarts.load_failure, 1);
    stop.cancel();
    supervisor.await.unwrap();
}
