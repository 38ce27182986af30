//! Speaks llama-server's native HTTP API, so that one engine process becomes a
//! [`WorkerAdapter`](worker_adapters_adapter_api::WorkerAdapter).
//!
//! - [`adapter`]: the adapter itself
//! - `deadlines`: how long to wait for the engine's next sign of life
//! - `freeing`: waiting until a cancelled task's slot is free
//! - `tagging`: which of several slots a task is in
//! - [`body`]: whole answers, within a limit on their size
//! - [`settings`]: where the engine is, and how long to wait for it
//! - `client`: single requests, and how their failures are told apart
//! - `http`: streams over connections of their own
//! - `incoming`: the events of an answer, whichever way it is read
//! - `answer_stream`: one task's stream, from the request to its last event
//! - `completion`: what the events of a completion give
//! - `calls`: the same for requests in the engine's own API, passed on
//! - `patience`: how long one task's engine is waited for
//! - `live`: which tasks run, so that they can be cancelled
//! - [`sse`]: events out of bytes, whatever the bytes are
//! - `wire`: the engine's JSON
//!
//! A task is sent again only while nothing of it has come back, and only after
//! a failure that says the engine never took it.

pub mod adapter;
pub mod body;
pub mod settings;
pub mod sse;

#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;

mod answer_stream;
mod calls;
mod client;
mod completion;
mod deadlines;
mod freeing;
mod http;
mod incoming;
mod live;
mod patience;
mod tagging;
mod wire;

pub use adapter::LlamaCppAdapter;
pub use settings::{AdapterSettings, Secret};
