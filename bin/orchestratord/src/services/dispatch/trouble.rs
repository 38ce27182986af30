//! What a run's failure says of its engine.

use adapter_host::HostError;
use worker_adapters_adapter_api::{TimeoutPhase, WorkerError};

use crate::services::event_log::Failure;

/// A failure, and whether the engine is to blame for it.
pub(super) struct Trouble {
    pub(super) failure: Failure,
    engines_fault: bool,
    pub(super) silence: Option<Silence>,
}

/// What an engine that gives nothing is silent about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Silence {
    /// A task that it works on.
    Tokens,
    /// Something else, which a busy machine may keep waiting as well.
    Answer,
}

impl Silence {
    fn of(error: &WorkerError) -> Option<Self> {
        match error {
            WorkerError::Timeout { phase, .. } => match phase {
                TimeoutPhase::FirstToken | TimeoutPhase::NextToken => Some(Self::Tokens),
                TimeoutPhase::Response | TimeoutPhase::Connect => Some(Self::Answer),
            },
            _ => None,
        }
    }
}

impl Trouble {
    pub(super) fn doubt(&self) -> Option<String> {
        self.engines_fault.then(|| self.failure.message.clone())
    }
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            engines_fault: false,
            silence: None,
        }
    }
}

impl From<&WorkerError> for Trouble {
    fn from(error: &WorkerError) -> Self {
        Self {
            failure: Failure::from_worker(error),
            engines_fault: error.casts_doubt(),
            silence: Silence::of(error),
        }
    }
}

impl From<&HostError> for Trouble {
    fn from(error: &HostError) -> Self {
        match error {
            HostError::Worker(error) => error.into(),
            other => Failure::from_host(other).into(),
        }
    }
}
