//! Development only: binds an engine that environment variables name, instead
//! of provisioning one.
//!
//! `ORCHD_LLAMACPP_URL` names the engine, `ORCHD_LLAMACPP_POOL` the pool that
//! it serves (default `default`), `ORCHD_LLAMACPP_REPLICA` its replica
//! (default `r0`). The engine is not ours: it is neither started nor stopped,
//! its digest is unknown, and every receipt says `env_shim`.

use std::sync::Arc;
use std::time::Duration;

use adapter_host::AdapterHost;
use llama_orch_types::{
    EngineKind, ErrorCode, PoolId, ProvisionedContext, ProvisioningMode, ReplicaId,
};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{EngineHealth, EngineProps, WorkerAdapter, WorkerError};
use worker_adapters_llamacpp_http::{AdapterSettings, LlamaCppAdapter};

use crate::app::env;
use crate::services::event_log::Failure;
use crate::services::pool::lifecycle::RestartCause;
use crate::services::pool::{Change, PoolHandle, Wanted};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The engine that the environment names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShimTarget {
    pub url: String,
    pub pool: PoolId,
    pub replica: ReplicaId,
}

/// The target for a pool, if the environment names one.
pub fn target_for(pool: &PoolId) -> Option<ShimTarget> {
    match parse(|name| std::env::var(name).ok().filter(|value| !value.is_empty())) {
        Ok(target) => target.filter(|target| target.pool == *pool),
        Err(problem) => {
            tracing::error!("the env shim is not used: {problem}");
            None
        }
    }
}

fn parse(variable: impl Fn(&str) -> Option<String>) -> Result<Option<ShimTarget>, String> {
    let Some(url) = variable(env::SHIM_URL) else {
        return Ok(None);
    };
    if !url.starts_with("http://") && !url.starts_with("https://") {
        return Err(format!(
            "{} must start with http:// or https://",
            env::SHIM_URL
        ));
    }
    let named = |name: &str| variable(name).map(|text| (name.to_owned(), text));
    let pool = match named(env::SHIM_POOL) {
        Some((name, text)) => text.parse().map_err(|error| format!("{name}: {error}"))?,
        None => PoolId::default_pool(),
    };
    let replica = match named(env::SHIM_REPLICA) {
        Some((name, text)) => text.parse().map_err(|error| format!("{name}: {error}"))?,
        None => ReplicaId::first(),
    };
    Ok(Some(ShimTarget {
        url: url.trim_end_matches('/').to_owned(),
        pool,
        replica,
    }))
}

/// Keeps the pool bound while the engine answers.
pub async fn supervise(
    target: ShimTarget,
    pool: PoolHandle,
    host: AdapterHost,
    stop: CancellationToken,
) {
    tracing::warn!(
        url = target.url, pool = %target.pool,
        "ENV SHIM: this pool is bound to an engine that was not provisioned; development only"
    );
    let mut bound = false;
    let mut orders = pool.orders();
    while !stop.is_cancelled() {
        let wanted = orders.borrow_and_update().wanted.clone();
        if matches!(wanted, Wanted::Rest) {
            host.unbind(&target.pool, &target.replica);
            bound = false;
            pool.change(Change::Stopped).await;
            tokio::select! {
                changed = orders.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
            }
            continue;
        }
        match (look(&target).await, bound) {
            (Ok(_), true) if matches!(wanted, Wanted::Replace(_)) => {
                pool.change(Change::NotReplaced(not_ours())).await;
            }
            (Ok(Some(props)), false) => bound = bind(&target, &props, &pool, &host).await,
            (Ok(None), false) => pool.change(Change::Starting).await,
            (Err(error), _) => {
                host.unbind(&target.pool, &target.replica);
                // Not told again and again while nothing changes.
                if bound || pool.snapshot().last_error.is_none() {
                    pool.change(gone(Failure::from_worker(&error))).await;
                }
                bound = false;
            }
            (Ok(_), true) => {
                if let Some(reason) = pool.snapshot().distrust {
                    // Not ours to end: bound again when it answers.
                    host.unbind(&target.pool, &target.replica);
                    let failure = Failure::new(ErrorCode::PoolUnavailable, reason).retriable();
                    pool.change(gone(failure)).await;
                    bound = false;
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            () = stop.cancelled() => {}
        }
        if orders.has_changed().is_err() {
            // The pool is gone.
            break;
        }
    }
    host.unbind(&target.pool, &target.replica);
}

fn gone(failure: Failure) -> Change {
    let cause = RestartCause::Crash;
    Change::Exited { cause, failure }
}

fn not_ours() -> Failure {
    Failure::new(
        ErrorCode::InvalidParams,
        "the pool's engine is not ours and cannot be replaced",
    )
}

/// What the engine says of itself; `None` while it loads.
async fn look(target: &ShimTarget) -> Result<Option<EngineProps>, WorkerError> {
    let adapter = LlamaCppAdapter::new(AdapterSettings::new(target.url.clone()))?;
    match adapter.health().await? {
        EngineHealth::Loading => Ok(None),
        EngineHealth::Ready => adapter.props().await.map(Some),
    }
}

async fn bind(
    target: &ShimTarget,
    props: &EngineProps,
    pool: &PoolHandle,
    host: &AdapterHost,
) -> bool {
    let context = context_from(target, props);
    match host.bind(context.clone()) {
        Ok(()) => {
            pool.change(Change::Ready(Arc::new(context).into())).await;
            true
        }
        Err(error) => {
            let failure = Failure::new(ErrorCode::PoolUnavailable, error.to_string());
            let log = Vec::new();
            pool.change(Change::NotStarted { failure, log }).await;
            false
        }
    }
}

fn context_from(target: &ShimTarget, props: &EngineProps) -> ProvisionedContext {
    ProvisionedContext {
        pool_id: target.pool.clone(),
        replica_id: target.replica.clone(),
        url: target.url.clone(),
        engine: EngineKind::Llamacpp,
        engine_version: props.version.clone(),
        engine_digest: None,
        provisioning_mode: ProvisioningMode::EnvShim,
        model: None,
        slots: props.slots,
        ctx: props.ctx,
        flags: Vec::new(),
        pid: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(variables: &[(&str, &str)]) -> Result<Option<ShimTarget>, String> {
        parse(|name| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_url_decides_and_the_rest_has_defaults() {
        assert_eq!(parsed(&[(env::SHIM_POOL, "x")]), Ok(None));
        let target = parsed(&[(env::SHIM_URL, "http://127.0.0.1:1/")])
            .unwrap()
            .unwrap();
        assert_eq!(target.url, "http://127.0.0.1:1");
        assert!(target.pool.is_default());
        assert_eq!(target.replica, ReplicaId::first());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(parsed(&[(env::SHIM_URL, "127.0.0.1:1")]).is_err());
        assert!(parsed(&[(env::SHIM_URL, "http://x"), (env::SHIM_POOL, "../x")]).is_err());
    }
}
