//! Drives both provisioners for one pool, and keeps its engine as the pool
//! orders.
//!
//! ```text
//! model ─┐
//!        ├─► start ─► health 200 ─► ProvisionedContext ─► bind ─► Ready
//! engine ┘▲                                                  │
//!         └ memory is free for it                            │
//!                                          watch: exit, distrust, liveness, orders
//! ```
//!
//! Nothing is decided here about when an engine is wanted: that is the pool's
//! business ([`crate::services::pool::lifecycle`]). A [`Supervisor`] follows
//! the newest order, and reports what came of it. If it breaks, by a fault of
//! ours, its engine goes with it, the pool is told, and another one begins.

mod keeper;
mod liveness;
pub(crate) mod machine;
mod memory;
mod needs;
mod provide;
mod room;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use adapter_host::AdapterHost;
use llama_orch_types::{ErrorCode, Hinted, ReplicaId};
use provision_kit::chain::one_line;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::Reporter;
use provisioners_engine_provisioner::{EngineError, EngineProvisioner};
use provisioners_model_provisioner::{ModelError, ModelProvisioner};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::keeper::Keeper;
use crate::services::event_log::Failure;
use crate::services::pool::{Change, PoolHandle};
use crate::services::residency::plan::Never;
use crate::services::residency::{Refused, Residency};

/// How long an engine may take to end after it was asked to.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// Owns one pool's engine process.
#[derive(Debug)]
pub struct Supervisor {
    parts: Arc<Parts>,
}

/// What supervising needs and never changes.
#[derive(Debug)]
struct Parts {
    pool: PoolHandle,
    host: AdapterHost,
    models: Arc<ModelProvisioner>,
    engines: EngineProvisioner,
    residency: Residency,
    stop: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum ProvisionError {
    #[error("the model could not be provided")]
    Model(#[source] ModelError),
    #[error("the engine could not be provided")]
    Engine(#[source] EngineError),
    #[error("there is no memory for the engine")]
    Memory(#[source] Refused),
    #[error("the engine could not be started")]
    Start(#[source] EngineError),
    #[error("the engine could not be bound")]
    Bind(#[source] adapter_host::HostError),
    #[error("the new engine did not complete a trial task")]
    Unproved(#[source] adapter_host::HostError),
}

impl ProvisionError {
    fn failure(&self) -> Failure {
        let (hint, retriable) = match self {
            Self::Model(error) => (error.hint(), error.retriable()),
            Self::Start(error) if refuses_argument(error.log_tail()) => {
                let hint = "the engine does not take one of the arguments: mend the pool's `flags`";
                (Some(hint.to_owned()), false)
            }
            Self::Engine(error) | Self::Start(error) => (error.hint(), error.retriable()),
            Self::Memory(refused) => memory_hint(refused),
            Self::Bind(_) => (None, false),
            Self::Unproved(_) => (None, true),
        };
        Failure {
            hint,
            retriable,
            ..Failure::new(ErrorCode::PoolUnavailable, one_line(self))
        }
    }

    /// The engine's last lines, if it came to any.
    fn log(&self) -> Vec<String> {
        match self {
            Self::Start(error) => error.log_tail().to_vec(),
            _ => Vec::new(),
        }
    }
}

/// What helps where there is no memory, and whether another try may.
fn memory_hint(refused: &Refused) -> (Option<String>, bool) {
    let hint = match refused {
        Refused::Never(Never::TooLarge { .. }) => {
            "raise the limit under `memory`, or leave it out; or lower the pool's `ctx` or `slots`, or choose a smaller model"
        }
        Refused::Never(Never::Pinned(_)) => "take `pin` from one of them, or unload it",
        Refused::Never(Never::NoRoom(_)) | Refused::Over => return (None, true),
    };
    let retriable = !matches!(refused, Refused::Never(Never::TooLarge { .. }));
    (Some(hint.to_owned()), retriable)
}

/// Whether the engine says that it does not take an argument, which it says of the
/// same one every time.
fn refuses_argument(log: &[String]) -> bool {
    let says = |line: &String| {
        line.starts_with("error: invalid argument: ")
            || line.starts_with("error while handling argument ")
    };
    log.iter().any(says)
}

impl Supervisor {
    pub fn new(
        pool: PoolHandle,
        host: AdapterHost,
        models: ModelProvisioner,
        (cache, runtime): &(CacheDirs, RuntimeDirs),
        residency: Residency,
        stop: CancellationToken,
    ) -> Self {
        // The pool's own board, so that progress shows where it belongs.
        let reporter: Arc<dyn Reporter> = pool.board().clone();
        let engines = EngineProvisioner::new(cache.clone(), runtime.clone(), reporter);
        let parts = Parts {
            pool,
            host,
            models: Arc::new(models),
            engines,
            residency,
            stop,
        };
        Self {
            parts: Arc::new(parts),
        }
    }

    /// Runs until told to stop. Whatever it was doing then is dropped, which
    /// ends every process it had started.
    pub async fn run(self) {
        let parts = self.parts;
        // Orders up to this one are none of the next keeper's business.
        let mut seen = 0;
        loop {
            // A set, so that the keeper ends when this future is dropped.
            let mut keeping = JoinSet::new();
            keeping.spawn(Keeper::new(Arc::clone(&parts), seen).run());
            match keeping.join_next().await {
                Some(Err(broken)) if broken.is_panic() => {}
                _ => return,
            }
            let pool = parts.pool.id();
            tracing::error!(%pool, "the pool's supervisor broke; its engine is ended and another supervisor begins");
            parts.host.unbind(pool, &ReplicaId::first());
            seen = parts.pool.orders().borrow().serial;
            let failure = Failure::internal("the pool's supervisor broke").retriable();
            parts.pool.report(seen, Change::Lost(failure)).await;
        }
    }
}
