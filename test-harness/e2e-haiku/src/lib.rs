//! The end-to-end proof: the real daemon, over loopback HTTP, in front of a
//! real engine that it provisioned itself.
//!
//! `cargo test -p test-harness-e2e-haiku -- --nocapture` needs nothing
//! beforehand. With the engine in the machine's cache it takes seconds; without
//! it the first test builds one, which takes minutes and shows its progress.
//!
//! Everything here looks from outside: it talks HTTP, reads `/proc`, and hashes
//! files itself. It shares no code with the daemon, so a mistake there cannot
//! hide in here.
//!
//! - [`binary`]: builds the daemon, once per process
//! - [`settings`]: what it is started with
//! - [`daemon`]: starts it, waits until it is ready, stops it
//! - [`client`]: asks it
//! - [`sse`]: reads its streams, with the time at which each event arrived
//! - [`engine`]: looks at the engine process behind it
//! - [`words`]: a minute's number in words, and back
//! - [`prompt`]: what the model is asked
//! - [`verify`]: the checks over a transcript, pure
//! - [`proof`]: what a run leaves behind

pub mod client;
pub mod daemon;
pub mod engine;
pub mod prompt;
pub mod proof;
pub mod settings;
pub mod sse;
pub mod verify;
pub mod words;

pub use test_harness_support::binary;

use std::time::Duration;

/// Waits until `look` finds something; panics with `what` after `limit`.
pub async fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let deadline = tokio::time::Instant::now() + limit;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(
            tokio::time::Instant::now() < deadline,
            "{what}: not seen within {} ms",
            limit.as_millis()
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
