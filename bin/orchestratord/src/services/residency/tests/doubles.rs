//! A pool that holds memory as far as the test says.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use llama_orch_types::PoolId;
use tokio::sync::watch;

use crate::services::residency::plan::Activity;
use crate::services::residency::{Claim, Needs, Resident, Seen, Unloading};

#[derive(Debug)]
pub(super) struct Double {
    id: PoolId,
    seen: watch::Sender<Seen>,
    /// What it was asked, in order.
    asked: watch::Sender<Vec<Unloading>>,
}

impl Double {
    pub(super) fn new(id: &str) -> Arc<Self> {
        let seen = Seen {
            activity: Activity::Loading,
            pinned: false,
            loaded_since: None,
            load_took: Duration::ZERO,
        };
        Arc::new(Self {
            id: id.parse().unwrap(),
            seen: watch::channel(seen).0,
            asked: watch::channel(Vec::new()).0,
        })
    }

    /// Loaded now.
    pub(super) fn set(&self, activity: Activity) {
        self.seen.send_modify(|seen| {
            seen.activity = activity;
            seen.loaded_since = Some(Instant::now());
        });
    }

    pub(super) fn idle(&self) {
        self.set(Activity::Idle {
            since: Instant::now(),
        });
    }

    pub(super) fn pin(&self) {
        self.seen.send_modify(|seen| seen.pinned = true);
    }

    /// Waits until it was asked so often.
    pub(super) async fn asked(&self, times: usize) -> Vec<Unloading> {
        let mut asked = self.asked.subscribe();
        let all = asked.wait_for(|asked| asked.len() >= times).await;
        all.unwrap().clone()
    }

    pub(super) fn claim(self: &Arc<Self>, bytes: u64) -> Claim {
        Claim {
            resident: Arc::clone(self) as Arc<dyn Resident>,
            estimated: Needs::of_ram(bytes),
            key: self.id.to_string(),
        }
    }
}

#[async_trait]
impl Resident for Double {
    fn pool(&self) -> PoolId {
        self.id.clone()
    }

    fn seen(&self) -> Seen {
        *self.seen.borrow()
    }

    async fn differs(&self, from: Seen) -> bool {
        let mut seen = self.seen.subscribe();
        seen.wait_for(|seen| !seen.is_like(from)).await.is_ok()
    }

    async fn unload(&self, how: Unloading, _: &PoolId) -> Result<(), String> {
        self.asked.send_modify(|asked| asked.push(how));
        let mut agreed = false;
        self.seen.send_if_modified(|seen| {
            let tasks = match seen.activity {
                Activity::Busy { tasks } if how == Unloading::Yield => tasks,
                Activity::Idle { .. } => 0,
                _ => return false,
            };
            agreed = true;
            seen.activity = Activity::Leaving { tasks };
            true
        });
        agreed.then_some(()).ok_or_else(|| "busy".to_owned())
    }
}
