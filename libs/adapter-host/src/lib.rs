//! Binds provisioned engines to adapters and routes tasks to them.
//!
//! - [`host`]: [`AdapterHost`], which everybody shares
//! - [`settings`]: how long adapters wait
//! - [`error`]: how a request to the host fails
//! - `running`: which adapter runs which task, for as long as its stream lives
//!
//! Invariants:
//! - An adapter is made from a `ProvisionedContext` and the host's settings,
//!   and from nothing else: no environment variable, no file.
//! - A stream holds the adapter it began with. Rebinding and unbinding change
//!   where new tasks go and never touch a running one.
//! - No lock is held across an await.

pub mod error;
pub mod host;
pub mod settings;

mod running;

pub use error::HostError;
pub use host::{AdapterHost, BindingHealth, BindingSnapshot};
pub use settings::HostSettings;
