//! The provisioner against small servers, wheels and directories of its own.

#[path = "../support/gguf.rs"]
mod gguf;

mod bench;
mod cache;
#[cfg(feature = "hf")]
mod hub;
mod pip;
mod sources;
