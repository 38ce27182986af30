//! How the daemon is put together.
//!
//! - [`bootstrap`]: what happens at start, in order
//! - [`config`]: what can be configured
//! - [`state`]: what request handlers share
//! - [`router`]: the routes and what surrounds them
//! - [`server`]: connections, and what a client may cost
//! - [`shutdown`]: signals, and the way down
//! - [`env`]: the names of environment variables

pub mod bootstrap;
pub mod config;
pub mod env;
pub mod router;
pub mod server;
pub mod shutdown;
pub mod state;
