//! What can be configured (the crate `llama-orch-config`), and what its settings
//! are for the services that go by them.

use std::time::Duration;

pub use llama_orch_config::*;

use crate::services::pool::restart::RestartPolicy;
use crate::services::residency::{Group, Rules};

/// By what rules memory is given out, apart from how much there is.
pub fn rules(config: &MemoryConfig) -> Rules {
    let group = |group: &GroupConfig| Group {
        pools: group.pools.iter().cloned().collect(),
        at_most: group.at_most as usize,
    };
    Rules {
        groups: config.groups.values().map(group).collect(),
        min_dwell: config.min_dwell_seconds.map(Duration::from_secs),
    }
}

/// How a pool's engine is tried again after it ended.
pub fn restart_policy(config: &RestartConfig) -> RestartPolicy {
    RestartPolicy {
        first_delay: Duration::from_millis(config.first_delay_ms),
        last_delay: Duration::from_millis(config.last_delay_ms),
        crashes: config.crashes as usize,
        window: Duration::from_secs(config.window_seconds),
        cool_down: Duration::from_secs(config.cool_down_seconds),
    }
}
