//! The front door for clients of `OpenAI`'s API, and of Anthropic's where the
//! engine speaks that.
//!
//! A request is passed to the engine as it came; only what routing needs is read
//! ([`request`]). It goes through the same queue, event log and cancel as a task
//! of our own API, and is answered from the task's log: whole, or event by event
//! ([`stream`]).
//!
//! - [`routes`]: the routes, and their place in the API's description
//! - [`request`]: what is read of a request
//! - [`measure`]: how long and how deep a body is
//! - [`answers`]: from a request to its answer
//! - [`stream`]: a task's log as the API's own events
//! - [`errors`]: errors as these clients know them
//! - [`models`]: the models there are

mod answers;
pub mod errors;
mod measure;
pub mod models;
mod request;
mod routes;
mod stream;

pub use self::routes::{call_routes, describe, is_short};
