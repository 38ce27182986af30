//! What request handlers share. Nothing here is a workflow: each part has an
//! owner of its own.

use std::collections::BTreeMap;
use std::time::Instant;

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, PoolId, TaskId};
use metrics_exporter_prometheus::PrometheusHandle;

use super::config::Token;
use crate::services::event_log::Failure;
use crate::services::failure::shortened;
use crate::services::pool::PoolHandle;
use crate::services::tasks::TaskRegistry;

#[derive(Debug)]
pub struct AppState {
    pub pools: BTreeMap<PoolId, PoolHandle>,
    pub tasks: TaskRegistry,
    pub host: AdapterHost,
    pub metrics: PrometheusHandle,
    pub token: Option<Token>,
    pub max_body_bytes: usize,
    /// `REQUIRE_REAL_LLAMA` is set.
    pub real_only: bool,
    pub started: Instant,
    #[cfg(feature = "provisioning")]
    pub models: std::sync::Arc<provisioners_model_provisioner::ModelProvisioner>,
}

impl AppState {
    pub fn pool(&self, id: &str) -> Result<&PoolHandle, Failure> {
        let found = id.parse::<PoolId>().ok().and_then(|id| self.pools.get(&id));
        found.ok_or_else(|| Failure::pool_not_found(id, self.pools.keys()))
    }

    /// The pool for a task: the one it names, else the one that serves the
    /// model it names, else `default`, else the only one.
    pub fn pool_for(
        &self,
        pool: Option<&str>,
        model: Option<&str>,
    ) -> Result<&PoolHandle, Failure> {
        use llama_orch_types::ErrorCode;
        let model = model.map(shortened);
        if let Some(pool) = pool {
            let found = self.pool(pool)?;
            return match model {
                Some(model) if model != found.settings().model => Err(Failure::new(
                    ErrorCode::ModelNotFound,
                    format!(
                        "pool `{pool}` serves `{}`, not `{model}`",
                        found.settings().model
                    ),
                )
                .with_hint("leave out one of `pool_id` and `model`")),
                _ => Ok(found),
            };
        }
        if let Some(model) = model {
            let mut pools = self.pools.values();
            return pools
                .find(|pool| pool.settings().model == model)
                .ok_or_else(|| {
                    let served: Vec<_> = self
                        .pools
                        .values()
                        .map(|pool| pool.settings().model.clone())
                        .collect();
                    let names = served.iter().map(String::as_str);
                    let hint = match provision_kit::config::nearest(model, names) {
                        Some(nearest) => format!("did you mean `{nearest}`?"),
                        None => format!("the models are: {}", served.join(", ")),
                    };
                    Failure::new(
                        ErrorCode::ModelNotFound,
                        format!("no pool serves `{model}`"),
                    )
                    .with_hint(hint)
                });
        }
        let mut pools = self.pools.values();
        let default = self.pools.get(&PoolId::default_pool());
        match (default, pools.next(), pools.next()) {
            (Some(pool), ..) | (None, Some(pool), None) => Ok(pool),
            _ => Err(Failure::new(
                ErrorCode::PoolNotFound,
                "there are several pools and the task names none",
            )
            .with_hint("set `pool_id`; GET /v2/pools lists the pools")),
        }
    }

    pub fn task(
        &self,
        id: &str,
    ) -> Result<std::sync::Arc<crate::services::tasks::TaskRecord>, Failure> {
        use llama_orch_types::ErrorCode;
        let found = id.parse::<TaskId>().ok().and_then(|id| self.tasks.get(id));
        found.ok_or_else(|| {
            Failure::new(
                ErrorCode::TaskNotFound,
                format!("there is no task `{}`", shortened(id)),
            )
            .with_hint("finished tasks are kept for a while only; see `tasks.keep_seconds`")
        })
    }

    /// Whether a pool's answers come from a scripted engine.
    pub fn is_fallback(&self, pool: &PoolId) -> bool {
        let pool = self.pools.get(pool);
        pool.is_some_and(|pool| pool.settings().engine == EngineKind::Mock)
    }
}
