//! Limits on what clients may make the daemon hold, and for how long.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::read::ranged;

/// What a client may take of the daemon. See also `tasks.max_body_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections (8 to 100000). Further ones are answered with 503.
    #[serde(deserialize_with = "ranged::<_, u64, 8, 100_000>")]
    #[schemars(range(min = 8, max = 100_000))]
    pub connections: u64,
    /// Event streams that one client address may hold open (1 to 100000).
    /// Further ones are answered with 429.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 100_000>")]
    #[schemars(range(min = 1, max = 100_000))]
    pub streams_per_client: u64,
    /// How long the head of a request may take, in seconds (1 to 3600).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3600>")]
    #[schemars(range(min = 1, max = 3600))]
    pub header_seconds: u64,
    /// How many headers a request may have (16 to 1000).
    #[serde(deserialize_with = "ranged::<_, u64, 16, 1000>")]
    #[schemars(range(min = 16, max = 1000))]
    pub headers: u64,
    /// How many bytes the head of a request may have (4 KiB to 1 MiB).
    #[serde(deserialize_with = "ranged::<_, u64, 4096, 1_048_576>")]
    #[schemars(range(min = 4096, max = 1_048_576))]
    pub header_bytes: u64,
    /// How long nothing of a request's body may come, in seconds (1 to 3600).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3600>")]
    #[schemars(range(min = 1, max = 3600))]
    pub body_stall_seconds: u64,
    /// How long a whole body may take, in seconds (1 to 86400).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub body_seconds: u64,
    /// How long a connection is kept between two requests, in seconds (1 to
    /// 3600).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3600>")]
    #[schemars(range(min = 1, max = 3600))]
    pub idle_seconds: u64,
    /// How long a client may take nothing of what is being sent to it, in
    /// seconds (1 to 3600), before it is disconnected.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 3600>")]
    #[schemars(range(min = 1, max = 3600))]
    pub reader_stall_seconds: u64,
    /// How many bytes the prompt or all messages together may have (1 KiB to
    /// 256 MiB). Checked before anything is tokenised.
    #[serde(deserialize_with = "ranged::<_, u64, 1024, 268_435_456>")]
    #[schemars(range(min = 1024, max = 268_435_456))]
    pub max_prompt_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            // Well below the 1024 file descriptors that a process usually has.
            connections: 512,
            streams_per_client: 128,
            header_seconds: 10,
            headers: 100,
            header_bytes: 32 * 1024,
            body_stall_seconds: 10,
            body_seconds: 120,
            // Longer than what most clients keep a connection for.
            idle_seconds: 75,
            reader_stall_seconds: 60,
            max_prompt_bytes: 1024 * 1024,
        }
    }
}

impl Limits {
    pub fn header(&self) -> Duration {
        Duration::from_secs(self.header_seconds)
    }

    pub fn idle(&self) -> Duration {
        Duration::from_secs(self.idle_seconds)
    }

    pub fn body_stall(&self) -> Duration {
        Duration::from_secs(self.body_stall_seconds)
    }

    pub fn body(&self) -> Duration {
        Duration::from_secs(self.body_seconds)
    }

    pub fn reader_stall(&self) -> Duration {
        Duration::from_secs(self.reader_stall_seconds)
    }
}
