//! The program's config file.

use std::path::PathBuf;

use llama_orch_types::PoolId;
use provisioners_engine_provisioner::{EngineConfig, Profile};
use schemars::JsonSchema;
use serde::Deserialize;

/// Every key has a default: `{}` provides the pinned engine.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Default: `$XDG_CACHE_HOME/llama-orch` or `~/.cache/llama-orch`.
    pub cache_dir: Option<PathBuf>,
    /// Default: `.runtime` in the working directory.
    pub runtime_dir: Option<PathBuf>,
    /// Default: `default`.
    pub pool: Option<PoolId>,
    /// A path or any model reference. Without one the engine is provided and not started.
    pub model: Option<String>,
    /// How the engine is provided; the same keys as `provision:` of a pool in orchestratord.yaml.
    pub provision: EngineConfig,
    /// Context length of one slot, in tokens.
    pub ctx: Option<u32>,
    /// Default: 1, or 4 in the throughput profile.
    pub slots: Option<u32>,
    pub profile: Profile,
    /// CPU threads for decoding.
    pub threads: Option<u32>,
    /// Layers to keep in GPU memory.
    pub gpu_layers: Option<u32>,
    /// Further flags for llama-server.
    pub flags: Vec<String>,
}

impl Config {
    pub(crate) fn slots(&self) -> u32 {
        self.slots.unwrap_or(match self.profile {
            Profile::Deterministic => 1,
            Profile::Throughput => 4,
        })
    }
}
