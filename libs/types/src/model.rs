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
    /// What its memory depends on, where the file says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shape: Option<ModelShape>,
}

/// The form of a transformer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    pub layers: u64,
    /// Numbers in one token's state between layers.
    pub embedding: u64,
    /// Heads that keep keys and values, in each layer.
    pub kv_heads: u64,
    /// Numbers in one head's key.
    pub key_length: u64,
    /// Numbers in one head's value.
    pub value_length: u64,
    /// Tokens that the model knows; 0 if that cannot be told.
    pub vocabulary: u64,
}
