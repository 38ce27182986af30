//! A pool as one who may hold memory.

use std::time::Duration;

use async_trait::async_trait;
use llama_orch_types::PoolId;

use super::plan::Activity;
use super::{Resident, Seen, Unloading};
use crate::services::pool::{Phase, PoolHandle, PoolSnapshot, Unload, UnloadCause};

#[async_trait]
impl Resident for PoolHandle {
    fn pool(&self) -> PoolId {
        self.id().clone()
    }

    fn seen(&self) -> Seen {
        seen(&self.snapshot())
    }

    async fn differs(&self, from: Seen) -> bool {
        let differs = |snapshot: &PoolSnapshot| !seen(snapshot).is_like(from);
        self.wait_for(differs).await.is_some()
    }

    async fn unload(&self, how: Unloading, whom: &PoolId) -> Result<(), String> {
        let how = match how {
            Unloading::IfIdle => Unload::IfIdle,
            Unloading::Yield => Unload::Yield,
        };
        let why = UnloadCause::Memory(format!("pool {whom}"));
        // The inherent method of the same name.
        let answer = PoolHandle::unload(self, how, why).await;
        answer.map_err(|failure| failure.message)
    }
}

fn seen(snapshot: &PoolSnapshot) -> Seen {
    let tasks = snapshot.running + snapshot.queued();
    let activity = match snapshot.phase {
        Phase::Provisioning | Phase::Starting => Activity::Loading,
        Phase::Ready => match snapshot.idle_since {
            Some(since) if tasks == 0 => Activity::Idle { since },
            _ => Activity::Busy { tasks },
        },
        // Without an engine, or soon without one.
        Phase::Draining
        | Phase::Stopping
        | Phase::Stopped
        | Phase::Unloaded
        | Phase::Backoff
        | Phase::Failed => Activity::Leaving {
            tasks: snapshot.running,
        },
    };
    Seen {
        activity,
        pinned: snapshot.settings.config.pin,
        loaded_since: snapshot.loaded_since,
        load_took: snapshot.load_took.unwrap_or(Duration::ZERO),
    }
}
