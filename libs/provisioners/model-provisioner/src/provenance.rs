//! Records of what was provided, for people and for proofs.

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use llama_orch_types::Digest;
use provision_kit::fs::{FsError, append_jsonl};
use serde::{Deserialize, Serialize};

/// How a model came to be here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It was in the store.
    Cached,
    /// It was fetched now.
    Fetched,
    /// It was in the store and spoilt, and was mended or fetched again.
    Mended,
    /// It lies elsewhere on this machine and is used there.
    InPlace,
}

/// One line of `provenance/models.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelProvenance {
    pub at: Timestamp,
    /// What the user asked for.
    pub reference: String,
    /// The reference that served the bytes, now or when they were fetched.
    pub source: String,
    pub digest: Digest,
    pub size_bytes: u64,
    pub how: How,
    pub path: PathBuf,
}

/// Adds a record. Blocks.
pub(crate) fn append(directory: &Path, record: &ModelProvenance) -> Result<(), FsError> {
    append_jsonl(&directory.join("models.jsonl"), record)
}
