//! Speaks OpenAI's HTTP API, so that engines which run elsewhere (vLLM, SGLang, TGI,
//! `llama-server`, another orchestratord) become a
//! [`WorkerAdapter`](worker_adapters_adapter_api::WorkerAdapter).
//!
//! - [`adapter`]: one server
//! - [`replicas`]: several servers of the same model as one
//! - [`settings`]: where a server is, and how long to wait for it
//! - `answer`: one task's answer, from the request to its last event
//! - `client`: requests, and how their failures are told apart
//! - `failover`: a task's way from replica to replica, until the first event
//! - `live`: which tasks run, so that they can be cancelled
//! - `reading`: what the events of an answer mean; pure
//! - `splice`: what a call's body is changed in, and nothing else; pure
//! - `watch`: when a replica is given tasks; pure
//! - `wire`: the JSON of native tasks and of failures
//!
//! Nothing is sent anywhere again once any of the answer has been handed out.

pub mod adapter;
pub mod replicas;
pub mod settings;

mod answer;
mod client;
mod failover;
mod live;
mod reading;
mod splice;
mod watch;
mod wire;

pub use adapter::OpenaiAdapter;
pub use replicas::Replicas;
pub use settings::{Endpoint, Waits};
