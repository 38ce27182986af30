//! Development only: a pool that a scripted engine serves. Every event of its
//! tasks is marked as fallback.

use std::sync::Arc;

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, ErrorCode, ProvisionedContext, ProvisioningMode, ReplicaId};
use tokio_util::sync::CancellationToken;

use crate::services::event_log::Failure;
use crate::services::pool::{Change, PoolHandle, Wanted};

pub async fn supervise(pool: PoolHandle, host: AdapterHost, slots: u32, stop: CancellationToken) {
    tracing::warn!(pool = %pool.id(), "SCRIPTED ENGINE: no model answers here; development only");
    let mut orders = pool.orders();
    // By it the pool knows the engine again.
    let mut kept: Option<Arc<ProvisionedContext>> = None;
    loop {
        let order = orders.borrow_and_update().clone();
        let change = match order.wanted {
            Wanted::Rest => {
                host.unbind(pool.id(), &ReplicaId::first());
                kept = None;
                Change::Stopped
            }
            // Every other order is met by an engine that is always the same.
            Wanted::Keep if let Some(context) = &kept => Change::Ready(Arc::clone(context).into()),
            Wanted::Start { .. } | Wanted::Keep => bind(&pool, &host, slots),
            Wanted::Replace(_) => match bind(&pool, &host, slots) {
                Change::Ready(bound) => Change::Replaced(bound),
                change => change,
            },
        };
        if let Change::Ready(bound) | Change::Replaced(bound) = &change {
            kept = Some(Arc::clone(&bound.context));
        }
        let replaced = matches!(change, Change::Replaced(_));
        pool.report(order.serial, change).await;
        if replaced {
            pool.report(order.serial, Change::Retired).await;
        }
        tokio::select! {
            changed = orders.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

fn bind(pool: &PoolHandle, host: &AdapterHost, slots: u32) -> Change {
    let context = ProvisionedContext {
        pool_id: pool.id().clone(),
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
    match host.bind(context.clone()) {
        Ok(()) => Change::Ready(Arc::new(context).into()),
        Err(error) => Change::NotStarted {
            failure: Failure::new(ErrorCode::PoolUnavailable, error.to_string()),
            log: Vec::new(),
        },
    }
}
