//! Which pools are in memory, and how much of it they may take together.

use std::collections::BTreeMap;

use llama_orch_types::PoolId;
use provision_kit::rate::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::read::{ranged, ranged_option};

/// When a pool's engine is loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadPolicy {
    /// At start, as far as the memory budget has room.
    #[default]
    Eager,
    /// When the first task comes.
    OnDemand,
}

/// What the engine is started for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Serves {
    /// Chat and completions.
    #[default]
    Text,
    /// Embeddings. A model that does not say how the vectors of a text's tokens
    /// become one needs `--pooling` among the pool's `flags`.
    Embeddings,
    /// Scores of documents for a query.
    Rerank,
}

/// How much memory the engines may take together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Main memory, such as `12GiB`. Default: what the machine, or the control
    /// group, has, less a reserve.
    #[schemars(with = "Option<String>")]
    pub ram: Option<ByteSize>,
    /// Memory of the GPUs together. Default: what they have, less a reserve.
    #[schemars(with = "Option<String>")]
    pub vram: Option<ByteSize>,
    /// How long a loaded pool stays, in seconds (0 to 3600), before another may
    /// take its memory while tasks wait for both. Default: twice as long as its
    /// load took.
    #[serde(deserialize_with = "ranged_option::<_, u64, 0, 3600>")]
    #[schemars(range(min = 0, max = 3600))]
    pub min_dwell_seconds: Option<u64>,
    /// Pools of which only so many may be loaded at once, whatever the memory.
    pub groups: BTreeMap<String, GroupConfig>,
}

/// Pools that share a place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    pub pools: Vec<PoolId>,
    /// How many of them may be loaded at once (1 to 1000).
    #[serde(default = "one", deserialize_with = "ranged::<_, u32, 1, 1000>")]
    #[schemars(range(min = 1, max = 1000))]
    pub at_most: u32,
}

fn one() -> u32 {
    1
}
