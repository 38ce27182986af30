//! Why a run cannot go on, and how a fault ends that was not survived.

use std::io;
use std::path::PathBuf;

/// The harness itself cannot go on. Not a finding about the daemon.
#[derive(Debug, thiserror::Error)]
pub enum HarnessError {
    #[error("{action} {}", path.display())]
    File {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the model's own source cannot listen")]
    Source(#[source] io::Error),
    #[error("the daemon {} cannot be run", path.display())]
    Spawn {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the daemon's answer to `config schema` is no JSON")]
    Schema(#[source] serde_json::Error),
    #[error("there is no fault `{0}`; --list shows them")]
    NoSuchFault(String),
    #[error("none of the chosen faults can be injected with this engine")]
    NoFaults,
    #[error("the daemon cannot be started any more: {0}")]
    NoDaemon(String),
    #[error("the engine that this machine's daemon provided is not to be seen: {0}")]
    NoEngine(String),
}

impl HarnessError {
    pub fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }
}

/// Why a fault does not count as survived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failing {
    /// The daemon has no such route or command.
    Missing(&'static str),
    /// A promise was broken.
    Broken {
        invariant: &'static str,
        detail: String,
    },
}

impl Failing {
    pub fn broken(invariant: &'static str, detail: impl Into<String>) -> Self {
        Self::Broken {
            invariant,
            detail: detail.into(),
        }
    }
}

/// What an injected fault showed, in a few words; empty if nothing is to be said.
pub type Verdict = Result<String, Failing>;
