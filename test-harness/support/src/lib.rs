//! What the test harnesses share. It depends on next to nothing, so that the benchmark
//! is built in a minute from a clean checkout.
//!
//! - [`binary`]: builds the daemon, once per process
//! - [`gguf`]: the smallest model file that is one

pub mod binary;
pub mod gguf;
