//! Why a model could not be provided.

use std::path::PathBuf;

use llama_orch_types::{Digest, Hinted};
use provision_kit::chain::one_line;
use provision_kit::config::nearest;
use provision_kit::fs::FsError;
use provision_kit::lock::LockError;

use crate::fetch::FetchError;
use crate::gguf::GgufError;
use crate::profile::ProfileError;
use crate::reference::ReferenceError;
use crate::store::SaveError;
use crate::verify::SignatureRejected;

/// How many of the models that may be meant are named.
const CANDIDATES_SHOWN: usize = 8;

/// Why a model could not be provided, listed or removed.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    #[error(transparent)]
    Profile(#[from] ProfileError),
    #[error("no model profile is named `{name}`")]
    UnknownProfile { name: String, known: Vec<String> },
    #[error("the model {id} was not fetched{}", from_elsewhere(id, from))]
    Fetch {
        id: String,
        from: String,
        #[source]
        source: FetchError,
    },
    /// Each attempt is one line: the source and why it did not serve.
    #[error("none of the {} sources of the model {id} served it:\n{}", attempts.len(), lines(attempts))]
    AllSources {
        id: String,
        attempts: Vec<(String, FetchError)>,
    },
    #[error("the model {id} has no known digest, and the configuration says `verify: required`")]
    DigestRequired { id: String },
    #[error("{} has the digest {actual} where {expected} was expected for the model {id}", path.display())]
    WrongDigest {
        id: String,
        path: PathBuf,
        expected: Digest,
        actual: Digest,
    },
    #[error("{} was changed after it was verified: it has the digest {actual} instead of {expected}", path.display())]
    Changed {
        path: PathBuf,
        expected: Digest,
        actual: Digest,
        /// Why it could not be fetched again, if that was tried.
        #[source]
        repair: Option<Box<ModelError>>,
    },
    #[error("{} was changed while it was being verified", path.display())]
    ChangedMeanwhile { path: PathBuf },
    /// `file` is where it came from, or where it lies.
    #[error("{file} is no usable GGUF file")]
    Gguf {
        file: String,
        #[source]
        source: GgufError,
    },
    #[error(
        "{file} is one of {count} parts of a split model, which can only be used where all parts lie together"
    )]
    Split { file: String, count: u64 },
    #[error("the signature of {file} was not accepted")]
    Signature {
        file: String,
        #[source]
        source: SignatureRejected,
    },
    #[error("the model {id} is being removed by another process")]
    BeingRemoved { id: String },
    #[error("no model on this machine is called `{name}`")]
    NotHere { name: String, known: Vec<String> },
    #[error("`{name}` may be any of {} models", candidates.len())]
    Ambiguous {
        name: String,
        candidates: Vec<String>,
    },
    #[error("the model {id} is in use, here or by another program")]
    InUse { id: String },
    #[error(transparent)]
    File(#[from] FsError),
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Work on another thread ended early: the program is ending.
    #[error("the work on the model was given up")]
    GivenUp,
}

impl From<SaveError> for ModelError {
    fn from(error: SaveError) -> Self {
        match error {
            SaveError::File(error) => Self::File(error),
            SaveError::Lock(error) => Self::Lock(error),
        }
    }
}

impl ModelError {
    /// Whether the same call may succeed a little later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::Fetch { source, .. } => source.retriable(),
            Self::AllSources { attempts, .. } => {
                attempts.iter().any(|(_, error)| error.retriable())
            }
            Self::Lock(error) => error.retriable(),
            Self::File(error) => error.retriable(),
            Self::InUse { .. } | Self::BeingRemoved { .. } | Self::ChangedMeanwhile { .. } => true,
            Self::Changed { repair, .. } => repair.as_ref().is_some_and(|error| error.retriable()),
            _ => false,
        }
    }
}

impl Hinted for ModelError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Reference(error) => return error.hint(),
            Self::UnknownProfile { name, known } => match nearest(name, known.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`? Known: {}", known.join(", ")),
                None => format!(
                    "known: {}; a file is written as a path (./{name}), others as hf:…, https:… or pip:…",
                    known.join(", ")
                ),
            },
            Self::Fetch { source, .. } => return source.hint(),
            Self::AllSources { attempts, .. } => {
                return attempts.iter().filter_map(|(_, error)| error.hint()).next_back();
            }
            Self::DigestRequired { .. } => {
                "name it as a profile with its digest under `profiles:`, or set `verify: when_known`".to_owned()
            }
            Self::WrongDigest { .. } => {
                "the file is not the pinned one: name a source that holds the same bytes, or correct the digest".to_owned()
            }
            Self::Changed { repair: Some(error), .. } if error.retriable() => return error.hint(),
            Self::Changed { path, .. } => format!(
                "if nobody meant to change it, the disk may be failing; `rm {}` and start again to fetch it anew",
                path.display()
            ),
            Self::ChangedMeanwhile { .. } => {
                "wait until whoever writes the file is done, then try again".to_owned()
            }
            Self::Gguf { source, .. } if source.is_truncated() => {
                "the file is cut off: fetch or copy it again".to_owned()
            }
            Self::Gguf { .. } => "name a model in the GGUF format; other formats must be converted first".to_owned(),
            Self::Split { .. } => {
                "join the parts with `llama-gguf-split --merge`, or put all parts in one directory and name the first as file:/…"
                    .to_owned()
            }
            Self::Signature { .. } => "use a model whose signature the configured verifier accepts".to_owned(),
            Self::NotHere { name, known } => match nearest(name, known.iter().map(String::as_str)) {
                Some(near) => format!("did you mean `{near}`?"),
                None if known.is_empty() => "there are no models here yet; `orchestratord models pull haiku` fetches one".to_owned(),
                None => "`orchestratord models list` has every name; a digest may be shortened to its first digits".to_owned(),
            },
            Self::Ambiguous { candidates, .. } => {
                let first = &candidates[..candidates.len().min(CANDIDATES_SHOWN)];
                let more = if candidates.len() > first.len() { ", …" } else { "" };
                format!("say which one: {}{more}", first.join(", "))
            }
            Self::InUse { .. } => {
                "an engine keeps its model until its pool is stopped or removed; try again then".to_owned()
            }
            Self::BeingRemoved { .. } => "try again in a moment".to_owned(),
            Self::File(error) => return error.hint(),
            Self::Lock(error) => return error.hint(),
            Self::Profile(_) | Self::GivenUp => return None,
        })
    }
}

/// Names the source where it is not the id itself.
fn from_elsewhere(id: &str, from: &str) -> String {
    if id == from {
        String::new()
    } else {
        format!(" from {from}")
    }
}

/// One line for each source, with the whole chain of causes.
fn lines(attempts: &[(String, FetchError)]) -> String {
    let line = |(source, error): &(String, FetchError)| format!("  {source}: {}", one_line(error));
    attempts.iter().map(line).collect::<Vec<_>>().join("\n")
}
