//! Provides models: resolves references, fetches, verifies, catalogues, evicts.
//!
//! The one thing to call is [`ModelProvisioner::ensure`]: it answers with the
//! facts about a verified file on this machine, whatever had to happen before.
//!
//! - [`reference`]: what users write
//! - [`profile`]: names for certain bytes, and where they can be had
//! - [`provisioner`]: the order of things
//! - [`fetch`]: the ways bytes come here, one file each
//! - [`gguf`]: what a model file says about itself
//! - [`store`]: files by digest, and records about them
//! - [`lookup`]: which model a name means
//! - [`verify`]: the seam for signatures
//! - [`evict`]: which models go when the store is too full
//! - [`provenance`]: what was provided, when and from where

mod admit;
pub mod config;
pub mod error;
pub mod evict;
mod eviction;
pub mod fetch;
pub mod gguf;
mod lease;
pub mod lookup;
pub mod profile;
pub mod provenance;
pub mod provisioner;
pub mod reference;
pub mod store;
pub mod verify;
mod wanted;

pub use config::{HubSettings, ModelProvisionerConfig, VerifyPolicy};
pub use error::ModelError;
pub use evict::EvictionPlan;
pub use profile::{Profile, ProfileConfig, Profiles};
pub use provisioner::manage::{Condition, Identity, ModelEntry, Removed, Verified};
pub use provisioner::{ModelProvisioner, Recording};
pub use reference::ModelRef;
pub use store::ModelRecord;
