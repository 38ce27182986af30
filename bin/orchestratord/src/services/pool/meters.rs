//! A pool's metrics, looked up once: to find one by its labels takes longer than to
//! count.

use llama_orch_types::PoolId;
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};

use super::PoolSnapshot;
use super::lifecycle::Phase;
use crate::services::admission::Priority;
use crate::services::telemetry;

/// What shows how a pool is.
pub(super) struct Gauges {
    interactive: Gauge,
    batch: Gauge,
    running: Gauge,
    slots: Gauge,
    ready: Gauge,
}

impl Gauges {
    pub(super) fn of(pool: &PoolId) -> Self {
        let queued = |priority: Priority| gauge!(telemetry::QUEUED, "pool" => pool.to_string(), "priority" => priority.as_str());
        Self {
            interactive: queued(Priority::Interactive),
            batch: queued(Priority::Batch),
            running: gauge!(telemetry::RUNNING, "pool" => pool.to_string()),
            slots: gauge!(telemetry::SLOTS, "pool" => pool.to_string()),
            ready: gauge!(telemetry::READY, "pool" => pool.to_string()),
        }
    }

    pub(super) fn show(&self, snapshot: &PoolSnapshot) {
        self.interactive.set(snapshot.queued_interactive as f64);
        self.batch.set(snapshot.queued_batch as f64);
        self.running.set(snapshot.running as f64);
        self.slots.set(f64::from(snapshot.slots));
        let ready = snapshot.phase == Phase::Ready;
        self.ready.set(f64::from(u8::from(ready)));
    }
}

/// What every task counts in.
#[derive(Debug)]
pub struct TaskMeters {
    pub completed: Counter,
    pub resumed: Counter,
    pub tokens_in: Counter,
    pub tokens_out: Counter,
    pub queue_wait: Histogram,
    pub first_token: Histogram,
    pub service_time: Histogram,
}

impl TaskMeters {
    /// The label of [`TaskMeters::completed`].
    pub const COMPLETED: &str = "completed";

    pub fn of(pool: &PoolId) -> Self {
        let counted = |name| counter!(name, "pool" => pool.to_string());
        let timed = |name| histogram!(name, "pool" => pool.to_string());
        Self {
            completed: counter!(telemetry::TASKS, "pool" => pool.to_string(), "outcome" => Self::COMPLETED),
            resumed: counted(telemetry::RESUMED),
            tokens_in: counted(telemetry::TOKENS_IN),
            tokens_out: counted(telemetry::TOKENS_OUT),
            queue_wait: timed(telemetry::QUEUE_WAIT),
            first_token: timed(telemetry::FIRST_TOKEN),
            service_time: timed(telemetry::SERVICE_TIME),
        }
    }
}
