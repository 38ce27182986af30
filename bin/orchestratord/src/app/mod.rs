//! How the daemon is put together.
//!
//! - [`bootstrap`]: what happens at start, in order
//! - [`config`]: what can be configured
//! - [`launch`]: how a pool gets its owner and its supervisor
//! - [`reload`]: the configuration is changed while the daemon runs
//! - [`names`]: which pool a model's name means
//! - [`state`]: what request handlers share
//! - [`router`]: the routes and what surrounds them
//! - [`server`]: connections, and what a client may cost
//! - [`shutdown`]: signals, and the way down
//! - [`env`]: the names of environment variables

pub mod bootstrap;
pub mod config;
pub mod current;
pub mod env;
pub mod launch;
mod names;
pub mod reload;
pub mod router;
pub mod server;
pub mod shutdown;
pub mod state;
