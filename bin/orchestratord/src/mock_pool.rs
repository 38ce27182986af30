//! Development only: a pool that a scripted engine serves. Every event of its
//! tasks is marked as fallback.

use std::sync::Arc;

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, ErrorCode, ProvisionedContext, ProvisioningMode, ReplicaId};
use tokio_util::sync::CancellationToken;

use crate::services::event_log::Failure;
use crate::services::pool::{Change, PoolHandle};

pub async fn supervise(pool: PoolHandle, host: AdapterHost, slots: u32, stop: CancellationToken) {
    tracing::warn!(pool = %pool.settings().id, "SCRIPTED ENGINE: no model answers here; development only");
    let context = ProvisionedContext {
        pool_id: pool.settings().id.clone(),
        replica_id: ReplicaId::first(),
        url: "mock:".to_owned(),
        engine: EngineKind::Mock,
        engine_version: "mock".to_owned(),
        engine_digest: None,
        provisioning_mode: ProvisioningMode::Mock,
        model: None,
        slots,
        ctx: 4096,
        flags: Vec::new(),
        pid: None,
    };
    let change = match host.bind(context.clone()) {
        Ok(()) => Change::Ready(Arc::new(context)),
        Err(error) => Change::Failed {
            failure: Failure::new(ErrorCode::PoolUnavailable, error.to_string()),
            exited: false,
        },
    };
    pool.change(change).await;
    stop.cancelled().await;
}
