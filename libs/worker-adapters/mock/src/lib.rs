//! A scripted engine inside the process, for tests. Its waits go through
//! tokio's clock, so a test with paused time waits for nothing.
//!
//! Never part of a default build: what it says is no model's answer.

mod adapter;
mod calls;
mod script;

pub use adapter::MockAdapter;
pub use script::{MockFault, MockScript};
