//! The provisioner against small servers, wheels and directories of its own.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

#[path = "../support/gguf.rs"]
mod gguf;

#[cfg_attr(not(feature = "hf"), allow(dead_code))] // The Hub's tests use the most.
mod bench;
mod cache;
mod faults;
#[cfg(feature = "hf")]
mod hub;
mod manage;
mod mend;
mod pip;
mod sources;
