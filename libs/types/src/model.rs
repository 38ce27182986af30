//! What is known about a model file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// Facts about a model on this machine's disk. All but `id` and `path` are
/// read from the file itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelMetadata {
    /// What the user asked for: a profile's name or a model reference.
    pub id: String,
    /// The verified file.
    pub path: PathBuf,
    pub digest: Digest,
    pub size_bytes: u64,
    /// `general.architecture`, for example `llama`.
    pub architecture: Option<String>,
    /// The name of the file's quantisation, for example `Q4_1`.
    pub quantization: Option<String>,
    /// Number of weights, summed over the file's tensors.
    pub parameter_count: Option<u64>,
    /// The longest context, in tokens, that the model was trained for.
    pub ctx_max: Option<u32>,
    /// The chat template, where the file carries one.
    pub chat_template: Option<String>,
}
