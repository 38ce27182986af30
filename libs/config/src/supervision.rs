//! How a pool's engine is watched, and when it is started again.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::read::ranged;

/// When an engine that ended is started again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RestartConfig {
    /// The longest wait after the first crash, in milliseconds (1 to 600000).
    /// Every further one within the window doubles it; chance takes off up to
    /// a half.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 600_000>")]
    #[schemars(range(min = 1, max = 600_000))]
    pub first_delay_ms: u64,
    /// No wait is longer, in milliseconds (1 to 3600000).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3_600_000>")]
    #[schemars(range(min = 1, max = 3_600_000))]
    pub last_delay_ms: u64,
    /// So many crashes or hangs within the window (1 to 100), and the pool has
    /// failed, until it is resumed or reloaded, or has cooled down.
    #[serde(deserialize_with = "ranged::<_, u32, 1, 100>")]
    #[schemars(range(min = 1, max = 100))]
    pub crashes: u32,
    /// In seconds (1 to 86400).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub window_seconds: u64,
    /// In seconds (1 to 86400). After it one more crash is too many.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub cool_down_seconds: u64,
}

impl Default for RestartConfig {
    fn default() -> Self {
        Self {
            first_delay_ms: 500,
            last_delay_ms: 30_000,
            crashes: 5,
            window_seconds: 600,
            cool_down_seconds: 300,
        }
    }
}

/// How an idle engine is watched.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct LivenessConfig {
    /// How often an idle engine is asked how it is, in seconds (1 to 3600).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3600>")]
    #[schemars(range(min = 1, max = 3600))]
    pub check_seconds: u64,
    /// How long it may take to answer, and in doubt to generate one token, in
    /// seconds (1 to 600). One that is too slow twice is ended.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 600>")]
    #[schemars(range(min = 1, max = 600))]
    pub probe_seconds: u64,
}

impl Default for LivenessConfig {
    fn default() -> Self {
        Self {
            check_seconds: 10,
            probe_seconds: 15,
        }
    }
}
