//! The values that cross llama-orch's crate boundaries.
//!
//! Nothing here does any work: these are names, ids and facts that several
//! crates must agree on. A type belongs here only if two crates that do not
//! depend on each other both need it.
//!
//! - [`ids`]: pool, replica and task ids, checked when made
//! - [`digest`]: sha256 digests
//! - [`model`]: what is known about a model file
//! - [`context`]: the provisioned context, from which an adapter is bound
//! - [`error`]: stable error codes and hints

pub mod context;
pub mod digest;
pub mod error;
pub mod ids;
pub mod model;

pub use context::{EngineKind, ProvisionedContext, ProvisioningMode};
pub use digest::{Digest, DigestParseError};
pub use error::{ErrorCode, Hinted};
pub use ids::{IdError, PoolId, ReplicaId, TaskId};
pub use model::{ModelMetadata, ModelShape};
