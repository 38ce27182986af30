//! Models over HTTP and on the command line: pulled, shown, verified, removed.
//! The daemon is a real process, and so is the (fake) engine.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "../support/mod.rs"]
mod support;

mod api;
mod program;
mod server;

use std::path::{Path, PathBuf};

use serde_json::Value;
use support::Daemon;
use test_harness_fake_engine::gguf::tiny_gguf;

/// A model of 24 MiB and some: three chunks, so that half of it is more than
/// one. `salt` makes others.
fn model(salt: u8) -> Vec<u8> {
    let mut bytes = tiny_gguf();
    bytes.resize(bytes.len() + (24 << 20), salt);
    bytes
}

/// The file of a stored model.
fn stored(daemon: &Daemon, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap();
    daemon.cache_dir().join("models/sha256").join(hex)
}

/// Turns a bit of a file, where it lies.
fn spoil(path: &Path, at: usize) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[at] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

fn encoded(name: &str) -> String {
    name.replace(':', "%3A").replace('/', "%2F")
}

async fn body(response: reqwest::Response, status: u16) -> Value {
    let was = response.status();
    let body: Value = response.json().await.unwrap();
    assert_eq!(was, status, "{body}");
    body
}
