//! What the one who gives out memory sees of a pool, and asks of it.

use std::fmt::Debug;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use llama_orch_types::PoolId;

use super::plan::Activity;

/// A pool as far as its memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub activity: Activity,
    pub pinned: bool,
    /// When its engine was ready; none while it loads.
    pub loaded_since: Option<Instant>,
    /// How long that took; zero if it is not known.
    pub load_took: Duration,
}

impl Seen {
    /// Whether nothing differs but how many tasks a busy pool has.
    pub fn is_like(self, other: Self) -> bool {
        let busy = |seen: Self| matches!(seen.activity, Activity::Busy { .. });
        let activity = if busy(self) && busy(other) {
            self.activity
        } else {
            other.activity
        };
        self == Self { activity, ..other }
    }
}

/// How a pool is to give its memory back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unloading {
    /// If no task runs or waits.
    IfIdle,
    /// When what runs is over; what waits is kept.
    Yield,
}

/// A pool that may hold memory.
#[async_trait]
pub trait Resident: Debug + Send + Sync {
    fn pool(&self) -> PoolId;

    /// As it is now.
    fn seen(&self) -> Seen;

    /// Waits until it is seen otherwise (see [`Seen::is_like`]); `false` if it never will be again.
    async fn differs(&self, from: Seen) -> bool;

    /// Asks it to give its memory back for another pool. Answers at once; that it refuses, and
    /// says why, is nothing special. Once it has agreed it is seen as leaving.
    async fn unload(&self, how: Unloading, whom: &PoolId) -> Result<(), String>;
}
