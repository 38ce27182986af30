//! What the daemon does, apart from how it is asked.
//!
//! - [`admission`], [`estimates`], [`resume`]: pure decisions
//! - [`event_log`]: a task's events and the cursors over them
//! - [`tasks`]: the tasks there are, and how long finished ones are kept
//! - [`pool`]: the one owner of a pool's queue and running tasks
//! - [`dispatch`]: one task's way through the engine
//! - [`preparation`]: what is being made ready, for whoever asks
//! - [`residency`]: which pools are in memory, under one budget
//! - [`pulls`]: the one owner of models on their way here
//! - [`watched`]: long work that many may watch
//! - [`streaming`]: a log rendered as SSE
//! - [`failure`]: every error's stable code, message and hint
//! - [`telemetry`]: the names of the metrics

pub mod admission;
pub mod dispatch;
pub mod estimates;
pub mod event_log;
pub mod failure;
pub mod pool;
pub mod preparation;
pub mod pulls;
pub mod residency;
pub mod resume;
pub mod streaming;
pub mod tasks;
pub mod telemetry;
pub mod watched;
