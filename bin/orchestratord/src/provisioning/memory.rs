//! How an engine comes by its memory before it is started, and what it is then
//! seen to use.

use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use llama_orch_types::ModelShape;
use provision_kit::progress::{Reporter, Step, StepKind, Unit};
use provisioners_engine_provisioner::{EngineInstallation, LaunchSpec, Meter};
use provisioners_model_provisioner::gguf;

use super::needs::{self, Facts};
use super::{Parts, ProvisionError, machine};
use crate::app::config::{LoadPolicy, PoolConfig};
use crate::services::pool::{PoolSnapshot, Unload, UnloadCause};
use crate::services::residency::plan::{Never, Wait};
use crate::services::residency::{Claim, Lease, Needs, Refused};

/// When an engine that is ready has touched what it needs without tasks.
const SETTLED: Duration = Duration::from_secs(2);

/// How long an engine that is to end may be looked at first.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// The least time between two looks at an engine.
const PAUSE: Duration = Duration::from_secs(5);

/// The first order of a pool: the one it begins with.
const FIRST_ORDER: u64 = 1;

/// An engine's place in memory.
#[derive(Debug)]
pub(super) struct Place {
    lease: Lease,
    on_gpu: bool,
    /// The pool's tasks that went to engines before this one.
    served_before: u64,
}

/// What an engine will take, and what that was judged by.
#[derive(Debug, Clone)]
pub(super) struct Estimate {
    pub(super) needs: Needs,
    pub(super) on_gpu: bool,
    /// See [`Claim::key`].
    key: String,
}

impl Estimate {
    pub(super) async fn of(installation: &EngineInstallation, spec: &LaunchSpec) -> Self {
        let (shape, path) = (spec.model.shape, spec.model.path.clone());
        let flags = spec.flags.clone();
        let look = move || Facts {
            shape: shape.or_else(|| shape_in(&path)),
            further_files: needs::files_in(&flags)
                .filter_map(|file| std::fs::metadata(file).ok())
                .map(|file| file.len())
                .sum(),
        };
        let facts = tokio::task::spawn_blocking(look).await.unwrap_or(Facts {
            shape: None,
            further_files: 0,
        });
        let on_gpu = needs::uses_gpu(installation, spec);
        Self {
            needs: needs::estimate(spec, &facts, on_gpu),
            on_gpu,
            key: format!(
                "{} ctx={} slots={} profile={} gpu_layers={:?} on_gpu={on_gpu} flags={:?}",
                spec.model.digest,
                spec.ctx_per_slot(),
                spec.slots,
                spec.profile,
                spec.gpu_layers,
                spec.flags
            ),
        }
    }
}

/// What a file says that was catalogued before shapes were. A model that does not tell
/// its shape is judged by its size.
fn shape_in(path: &Path) -> Option<ModelShape> {
    let facts = gguf::read_file(path).inspect_err(|error| {
        tracing::debug!(%error, path = %path.display(), "the model's shape is not known");
    });
    facts.ok()?.shape
}

impl Parts {
    /// Waits for the memory of an engine that is to be started under `order`.
    pub(super) async fn place(
        &self,
        order: u64,
        config: &PoolConfig,
        estimate: Estimate,
    ) -> Result<Place, ProvisionError> {
        let begins = order == FIRST_ORDER && config.load == LoadPolicy::Eager && !config.pin;
        let at_once = if begins {
            match self.residency.try_acquire(self.claim(&estimate)).await {
                Err(Refused::Never(Never::NoRoom(why))) => {
                    self.rest_for_now(&why).await;
                    None
                }
                decided => Some(decided),
            }
        } else {
            None
        };
        let lease = match at_once {
            Some(decided) => decided,
            None => self.wait_for_memory(&estimate).await,
        };
        Ok(Place {
            lease: lease.map_err(ProvisionError::Memory)?,
            on_gpu: estimate.on_gpu,
            served_before: self.pool.snapshot().dispatched,
        })
    }

    /// Memory for a second engine, which nobody has to go for; or why there is
    /// none beside the first.
    ///
    /// # Errors
    /// There would be none without the first either, which so is kept.
    pub(super) async fn place_beside(
        &self,
        estimate: Estimate,
    ) -> Result<Result<Place, String>, ProvisionError> {
        let lease = match self.residency.try_acquire(self.claim(&estimate)).await {
            Ok(lease) => lease,
            Err(Refused::Never(Never::NoRoom(why))) => return Ok(Err(why)),
            Err(refused) => return Err(ProvisionError::Memory(refused)),
        };
        Ok(Ok(Place {
            lease,
            on_gpu: estimate.on_gpu,
            served_before: self.pool.snapshot().dispatched,
        }))
    }

    fn claim(&self, estimate: &Estimate) -> Claim {
        Claim {
            resident: Arc::new(self.pool.clone()),
            estimated: estimate.needs,
            key: estimate.key.clone(),
        }
    }

    /// A pool that is to be loaded from the beginning and for which there is no
    /// room is loaded on demand: no other has to go before anybody asked. One
    /// with tasks already is in demand, and gets in line.
    async fn rest_for_now(&self, why: &str) {
        tracing::warn!(pool = %self.pool.id(), why,
            "there is no room for the pool beside the others: it is loaded when a task asks for it");
        let cause = UnloadCause::Memory("the pools that came first".to_owned());
        if self.pool.unload(Unload::IfIdle, cause).await.is_ok() {
            // What was ordered instead interrupts.
            std::future::pending::<()>().await;
        }
    }

    async fn wait_for_memory(&self, estimate: &Estimate) -> Result<Lease, Refused> {
        let reporter: Arc<dyn Reporter> = self.pool.board().clone();
        // Held for a moment, by one task at a time.
        let shown: Mutex<Option<Step>> = Mutex::new(None);
        let tell = |wait: &Wait| {
            let words = wait.to_string();
            tracing::debug!(pool = %self.pool.id(), "{words}");
            let step = Step::start(&reporter, StepKind::PoolWarmup, words, Unit::None, None);
            let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(before) = shown.replace(step) {
                before.finish();
            }
        };
        let lease = tokio::select! {
            biased;
            lease = self.residency.acquire(self.claim(estimate), &tell) => lease,
            never = self.leave_when_nobody_waits() => match never {},
        };
        let shown = shown.into_inner().unwrap_or_else(PoisonError::into_inner);
        match (shown, &lease) {
            (Some(step), Ok(_)) => step.finish(),
            (Some(step), Err(refused)) => step.fail(refused.to_string()),
            (None, _) => {}
        }
        lease
    }

    /// Gives the place in the line up once the tasks that it was for are gone. Never
    /// ends by itself: what is ordered then interrupts.
    async fn leave_when_nobody_waits(&self) -> Infallible {
        let waits = |snapshot: &PoolSnapshot| snapshot.queued() > 0;
        // A start without tasks is somebody's wish all the same.
        if waits(&self.pool.snapshot()) {
            while self
                .pool
                .wait_for(|snapshot| !waits(snapshot))
                .await
                .is_some()
            {
                let cause = UnloadCause::Memory("others, and no task waits for it".to_owned());
                if self.pool.unload(Unload::IfIdle, cause).await.is_ok() {
                    break;
                }
                // A task came, or a reload is under way, which wants an engine.
                self.pool.wait_for(waits).await;
            }
        }
        std::future::pending().await
    }

    /// Watches what the engine uses: once it has settled or finished tasks, and
    /// whenever it has finished more. Never ends by itself.
    pub(super) async fn measure(&self, meter: Meter, place: &Place) -> Infallible {
        let finished = |snapshot: &PoolSnapshot| {
            snapshot.dispatched > place.served_before && snapshot.running == 0
        };
        // The time is a bound.
        let _ = tokio::time::timeout(SETTLED, self.pool.wait_for(finished)).await;
        loop {
            let served = self.pool.snapshot().dispatched;
            if let Some(used) = used(meter, place.on_gpu).await {
                place.lease.measured(used);
            }
            tokio::time::sleep(PAUSE).await;
            let more =
                |snapshot: &PoolSnapshot| snapshot.dispatched > served && snapshot.running == 0;
            if self.pool.wait_for(more).await.is_none() {
                // The pool is gone, and its engine soon with it.
                return std::future::pending().await;
            }
        }
    }
}

impl Parts {
    /// Looks at an engine that served, once more before it ends: it may have been
    /// wanted too shortly to be looked at before.
    pub(super) async fn measure_last(&self, meter: Meter, place: &Place) {
        let served = self.pool.snapshot().dispatched > place.served_before;
        // The daemon's end waits for nothing that nobody will ask for.
        if !served || self.stop.is_cancelled() {
            return;
        }
        if let Ok(Some(used)) = tokio::time::timeout(LAST_LOOK, used(meter, place.on_gpu)).await {
            place.lease.measured(used);
        }
    }
}

async fn used(meter: Meter, on_gpu: bool) -> Option<Needs> {
    let look = move || (meter.resident_bytes(), meter.pids());
    let (resident, pids) = tokio::task::spawn_blocking(look).await.ok()?;
    let vram = if on_gpu {
        machine::gpu_memory_of(&pids).await.unwrap_or(0)
    } else {
        0
    };
    Some(Needs {
        ram: resident?,
        vram,
    })
}
