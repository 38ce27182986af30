//! A model as clients see it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A model file that was verified once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelView {
    pub digest: String,
    pub path: String,
    pub size_bytes: u64,
    /// The profiles that pin these bytes.
    #[serde(default)]
    pub profiles: Vec<String>,
    /// Everything it was asked for as: profiles and model references.
    pub references: Vec<String>,
    /// The reference that served it.
    pub source: String,
    /// Whether it lies in the store; else it is somebody's own file, used where
    /// it lies.
    pub stored: bool,
    /// Whether any program of this machine uses it now. Known of stored models
    /// only.
    pub in_use: bool,
    /// The pools that serve it, or are configured to.
    pub used_by: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parameter_count: Option<u64>,
    /// The longest context, in tokens, that it was trained for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ctx_max: Option<u32>,
    /// When all of it was read last (RFC 3339).
    pub verified_at: String,
    pub last_used: String,
    /// Since when it is known not to be what it was. It is mended before it is
    /// used again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoilt_since: Option<String>,
}

#[cfg(feature = "provisioning")]
impl ModelView {
    pub fn new(entry: provisioners_model_provisioner::ModelEntry, used_by: Vec<String>) -> Self {
        let record = entry.record;
        Self {
            digest: record.digest.to_string(),
            path: record.path.display().to_string(),
            size_bytes: record.stamp.size_bytes,
            profiles: entry.profiles,
            references: record.references.into_iter().collect(),
            source: record.source,
            stored: entry.stored,
            in_use: entry.in_use,
            used_by,
            architecture: record.facts.architecture,
            quantization: record.facts.quantization,
            parameter_count: record.facts.parameter_count,
            ctx_max: record.facts.ctx_max,
            verified_at: record.verified_at.to_string(),
            last_used: record.last_used.to_string(),
            spoilt_since: record.spoilt_since.map(|at| at.to_string()),
        }
    }
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelsView {
    /// Most recently used first.
    pub models: Vec<ModelView>,
}

/// What went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RemovedView {
    pub digest: String,
    /// What it was called.
    pub names: Vec<String>,
    pub bytes_freed: u64,
    /// Pools that are configured with it: they fetch it when they are loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fetched_again_by: Vec<String>,
    /// A file outside the store, which stays: it is only forgotten.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_file: Option<String>,
}

/// What was seen of a model's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Condition {
    /// It is what it was when it came.
    Sound,
    /// It is not. It is mended before it is used again, or now with `repair`.
    Spoilt,
    /// It was not, and was fetched again, in part or whole.
    Mended,
}

/// A model whose whole file was read again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VerifiedView {
    pub condition: Condition,
    pub digest: String,
    pub path: String,
    /// What was found instead, of a file that is or was spoilt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actual_digest: Option<String>,
    pub bytes_read: u64,
}

#[cfg(feature = "provisioning")]
mod from_library {
    use provisioners_model_provisioner as library;

    use super::{Condition, RemovedView, VerifiedView};

    impl From<library::Removed> for RemovedView {
        fn from(removed: library::Removed) -> Self {
            Self {
                digest: removed.digest.to_string(),
                names: removed.names,
                bytes_freed: removed.bytes_freed,
                fetched_again_by: Vec::new(),
                kept_file: removed.kept_file.map(|path| path.display().to_string()),
            }
        }
    }

    impl From<library::Verified> for VerifiedView {
        fn from(verified: library::Verified) -> Self {
            let (condition, actual) = match verified.condition {
                library::Condition::Sound => (Condition::Sound, None),
                library::Condition::Spoilt { actual } => (Condition::Spoilt, Some(actual)),
                library::Condition::Mended { actual } => (Condition::Mended, Some(actual)),
            };
            Self {
                condition,
                digest: verified.record.digest.to_string(),
                path: verified.record.path.display().to_string(),
                actual_digest: actual.map(|digest| digest.to_string()),
                bytes_read: verified.bytes,
            }
        }
    }
}
