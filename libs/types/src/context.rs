//! The provisioned context: what a running engine is, in one value.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::{Digest, ModelMetadata, PoolId, ReplicaId};

/// Which family of engine answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineKind {
    /// llama.cpp's `llama-server`.
    Llamacpp,
    /// Any engine elsewhere that speaks OpenAI's API; it is not ours to start.
    Openai,
    /// The scripted engine of the tests. Exists only in builds with the
    /// feature `mock-adapter`; everything it says is marked as fallback.
    Mock,
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Llamacpp => "llamacpp",
            Self::Openai => "openai",
            Self::Mock => "mock",
        })
    }
}

/// How the engine binary came to be here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProvisioningMode {
    /// A `llama-server` that the machine already had.
    System,
    /// One that an earlier run built or fetched.
    Cache,
    /// llama.cpp's published archive.
    Release,
    /// Built here from pinned source.
    Source,
    /// Not provisioned: an engine elsewhere, named by the configuration.
    Remote,
    /// Not provisioned: named by environment variables (dev only).
    EnvShim,
    /// Not provisioned: the scripted engine of the tests.
    Mock,
}

impl fmt::Display for ProvisioningMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::System => "system",
            Self::Cache => "cache",
            Self::Release => "release",
            Self::Source => "source",
            Self::Remote => "remote",
            Self::EnvShim => "env_shim",
            Self::Mock => "mock",
        })
    }
}

/// Everything an adapter is bound from. The host reads no environment
/// variable and no file beside it; the handoff file holds the same facts for
/// people and other processes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ProvisionedContext {
    pub pool_id: PoolId,
    pub replica_id: ReplicaId,
    /// Base URL without a trailing slash, for example `http://127.0.0.1:40123`.
    pub url: String,
    pub engine: EngineKind,
    /// The engine's own word for its version, for example `b11434`.
    pub engine_version: String,
    /// sha256 of the engine binary; absent only where none was provisioned.
    pub engine_digest: Option<Digest>,
    pub provisioning_mode: ProvisioningMode,
    /// Absent only where none was provisioned.
    pub model: Option<ModelMetadata>,
    /// How many tasks the engine decodes side by side.
    pub slots: u32,
    /// Context length of one slot, in tokens.
    pub ctx: u32,
    /// The engine's command line after the program's name.
    pub flags: Vec<String>,
    /// Absent only where the engine is not our child.
    pub pid: Option<u32>,
}
