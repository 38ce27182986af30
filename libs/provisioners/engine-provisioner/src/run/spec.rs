//! What to start.

use std::time::Duration;

use llama_orch_types::{ModelMetadata, PoolId, ReplicaId};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The context, in tokens, that a slot gets when nothing else is said. More costs memory for every
/// slot; a model that knows less gets less.
const DEFAULT_CTX: u32 = 4096;

/// How the engine shares its work among tasks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// One task at a time; the same seed gives the same bytes.
    #[default]
    Deterministic,
    /// Several tasks at once, decoded together.
    Throughput,
}

impl Profile {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Deterministic => "deterministic",
            Self::Throughput => "throughput",
        }
    }
}

impl std::fmt::Display for Profile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What the engine is for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Chats and completions.
    #[default]
    Text,
    /// Vectors for texts. How a text's tokens become one vector is the model's own, or
    /// the user's `--pooling`; a model without either is refused by the engine.
    Embeddings,
    /// Scores of documents for a query.
    Rerank,
}

/// One engine process to start.
#[derive(Debug, Clone)]
pub struct LaunchSpec {
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
    pub model: ModelMetadata,
    /// Context length of one slot, in tokens. Default: 4096, or what the model was trained for if
    /// that is less.
    pub ctx: Option<u32>,
    /// How many tasks are decoded side by side, at least 1. The deterministic profile has one.
    pub slots: u32,
    pub profile: Profile,
    pub purpose: Purpose,
    /// CPU threads for decoding. Default: the engine's choice.
    pub threads: Option<u32>,
    /// Layers to keep in GPU memory. Default: the engine's choice.
    pub gpu_layers: Option<u32>,
    /// The user's flags for the engine.
    pub flags: Vec<String>,
    /// Longest time that the engine may go without progress while it loads the model.
    pub load_timeout: Duration,
    /// What the engine gets to end by itself before it is killed.
    pub stop_grace: Duration,
}

impl LaunchSpec {
    /// A spec with the defaults of the deterministic profile.
    pub fn new(pool_id: PoolId, model: ModelMetadata) -> Self {
        Self {
            pool_id,
            replica_id: ReplicaId::first(),
            model,
            ctx: None,
            slots: 1,
            profile: Profile::Deterministic,
            purpose: Purpose::Text,
            threads: None,
            gpu_layers: None,
            flags: Vec::new(),
            load_timeout: Duration::from_mins(2),
            stop_grace: Duration::from_secs(5),
        }
    }

    /// The context of one slot, in tokens.
    pub fn ctx_per_slot(&self) -> u32 {
        self.ctx
            .unwrap_or_else(|| DEFAULT_CTX.min(self.model.ctx_max.unwrap_or(DEFAULT_CTX)))
    }
}
