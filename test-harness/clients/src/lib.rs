//! Real clients in front of a real engine: the SDKs that people have already,
//! as they come from their package registries, and many requests over more
//! models than fit.
//!
//! Python's packages are pinned in `python/requirements.txt` and come once into
//! the machine's cache directory; one script for each SDK asks what people ask.
//! The scripts run against a bare engine too (`--engine`), so that what the
//! engine does by itself is known. Nothing is skipped: what cannot be had is a
//! failure.
//!
//! - [`bare`]: an engine that was started by hand
//! - [`calls`]: chat calls, and the tasks that they were
//! - [`environment`]: the Python packages
//! - [`scripts`]: runs a script against a server
//! - [`server`]: a daemon with several pools, and the engines it has running
//! - [`twin`]: a second model, made from the first
//! - [`shelf`]: a file server that a model can be pulled from

pub mod bare;
pub mod calls;
pub mod environment;
pub mod scripts;
pub mod server;
pub mod shelf;
pub mod twin;
