//! How a request to the host fails.

use llama_orch_types::{EngineKind, ErrorCode, Hinted, PoolId, TaskId};
use worker_adapters_adapter_api::WorkerError;

/// Why the host did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("no engine is bound to pool `{pool}`")]
    NotBound { pool: PoolId },
    #[error("pool `{pool}`: this build has no adapter for the engine `{engine}`")]
    UnsupportedEngine { pool: PoolId, engine: EngineKind },
    #[error("task {task} runs already")]
    AlreadyRunning { task: TaskId },
    /// The engine's own failure, told as it is.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl HostError {
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::NotBound { .. } => ErrorCode::PoolUnready,
            Self::UnsupportedEngine { .. } => ErrorCode::PoolUnavailable,
            Self::AlreadyRunning { .. } => ErrorCode::Internal,
            Self::Worker(error) => error.code(),
        }
    }

    /// Whether the same request may succeed later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::NotBound { .. } => true,
            Self::UnsupportedEngine { .. } | Self::AlreadyRunning { .. } => false,
            Self::Worker(error) => error.retriable(),
        }
    }
}

impl Hinted for HostError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NotBound { .. } => Some("wait until the pool is ready".to_owned()),
            Self::UnsupportedEngine {
                engine: EngineKind::Mock,
                ..
            } => Some("the mock engine needs a build with the feature `mock-adapter`".to_owned()),
            Self::UnsupportedEngine { .. } | Self::AlreadyRunning { .. } => None,
            Self::Worker(error) => error.hint(),
        }
    }
}
