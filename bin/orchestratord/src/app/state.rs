//! What request handlers share. Nothing here is a workflow: each part has an
//! owner of its own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, PoolId, TaskId};
use metrics_exporter_prometheus::PrometheusHandle;

use super::config::{Limits, Token};
use super::current::Current;
use super::names::goes_by;
use super::reload::ReloadHandle;
use crate::api::repeats::Repeats;
use crate::services::event_log::Failure;
use crate::services::failure::shortened;
use crate::services::pool::PoolHandle;
use crate::services::tasks::{TaskRecord, TaskRegistry};

#[derive(Debug)]
pub struct AppState {
    /// The pools there are; set by the reloader alone, once it is started.
    pub pools: Current<BTreeMap<PoolId, PoolHandle>>,
    /// The way to whoever changes the configuration.
    pub reloads: ReloadHandle,
    pub tasks: TaskRegistry,
    pub host: AdapterHost,
    pub metrics: PrometheusHandle,
    /// As the pools: set by the reloader alone.
    pub token: Current<Option<Token>>,
    pub max_body_bytes: usize,
    pub limits: Limits,
    /// `REQUIRE_REAL_LLAMA` is set.
    pub real_only: bool,
    pub started: Instant,
    pub started_at: SystemTime,
    /// What the log was told of errors.
    pub repeats: Repeats,
    #[cfg(feature = "provisioning")]
    pub models: Arc<provisioners_model_provisioner::ModelProvisioner>,
    /// `models` of the configuration.
    #[cfg(feature = "provisioning")]
    pub model_settings: provisioners_model_provisioner::ModelProvisionerConfig,
}

impl AppState {
    pub fn pool(&self, id: &str) -> Result<PoolHandle, Failure> {
        let pools = self.pools.get();
        let found = id.parse::<PoolId>().ok().and_then(|id| pools.get(&id));
        found
            .cloned()
            .ok_or_else(|| Failure::pool_not_found(id, pools.keys()))
    }

    /// The pool of a task; none once it was removed, and then all of its tasks
    /// are over.
    pub fn pool_of(&self, record: &TaskRecord) -> Option<PoolHandle> {
        self.pools.get().get(&record.pool).cloned()
    }

    /// The pool for a task: the one it names, else the one that is called as the
    /// model it names ([`Self::pool_named`]), else `default`, else the only one.
    pub fn pool_for(&self, pool: Option<&str>, model: Option<&str>) -> Result<PoolHandle, Failure> {
        if let Some(pool) = pool {
            let found = self.pool(pool)?;
            return match model {
                Some(model) if !goes_by(&found, model) => Err(Failure::new(
                    ErrorCode::ModelNotFound,
                    format!(
                        "pool `{pool}` serves `{}`, not `{}`",
                        found.settings().model,
                        shortened(model)
                    ),
                )
                .with_hint("leave out one of `pool_id` and `model`")),
                _ => Ok(found),
            };
        }
        self.pool_named(model)
    }

    pub fn task(&self, id: &str) -> Result<Arc<TaskRecord>, Failure> {
        let found = id.parse::<TaskId>().ok().and_then(|id| self.tasks.get(id));
        found.ok_or_else(|| {
            Failure::new(
                ErrorCode::TaskNotFound,
                format!("there is no task `{}`", shortened(id)),
            )
            .with_hint("finished tasks are kept for a while only; see `tasks.keep_seconds`")
        })
    }
}
