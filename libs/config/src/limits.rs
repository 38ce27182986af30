//! Limits on what clients may make the daemon hold, and for how long.

use std::net::IpAddr;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::read::{ranged, ranged_option};

/// What a client may take of the daemon. See also `tasks.max_body_bytes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Open connections (8 to 100000). Further ones are answered with 503.
    #[serde(deserialize_with = "ranged::<_, u64, 8, 100_000>")]
    #[schemars(range(min = 8, max = 100_000))]
    pub connections: u64,
    /// Event streams that one client address may hold open (1 to 100000).
    /// Further ones are answered with 429. Default: 128, but for an address of
    /// this machine, behind which may be many users or a proxy, seven eighths
    /// of `connections`.
    #[serde(deserialize_with = "ranged_option::<_, u64, 1, 100_000>")]
    #[schemars(range(min = 1, max = 100_000))]
    pub streams_per_client: Option<u64>,
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
            streams_per_client: None,
            header_seconds: 10,
            headers: 100,
            header_bytes: 32 * 1024,
            // A poor wireless link may be silent for longer than a head may take.
            body_stall_seconds: 30,
            body_seconds: 120,
            // Longer than what most clients keep a connection for.
            idle_seconds: 75,
            reader_stall_seconds: 60,
            max_prompt_bytes: 1024 * 1024,
        }
    }
}

/// Event streams for an address of another machine.
const STREAMS_FROM_OUTSIDE: u64 = 128;

impl Limits {
    /// Event streams that a client at this address may hold open.
    pub fn streams_for(&self, client: IpAddr) -> u64 {
        // What is left is for those who only ask how it goes, or cancel.
        let from_here = self.connections - self.connections / 8;
        let default = if client.is_loopback() {
            from_here
        } else {
            STREAMS_FROM_OUTSIDE
        };
        self.streams_per_client.unwrap_or(default)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_users_share_an_address_and_may_have_more_streams() {
        let (here, outside): (IpAddr, IpAddr) = ([127, 0, 0, 1].into(), [192, 0, 2, 1].into());
        let limits = Limits::default();
        assert_eq!(limits.streams_for(outside), 128);
        assert!(limits.streams_for(here) > 128);
        assert!(
            limits.streams_for(here) < limits.connections,
            "some are left for others"
        );
        let limits = Limits {
            streams_per_client: Some(2),
            ..limits
        };
        assert_eq!(
            (limits.streams_for(here), limits.streams_for(outside)),
            (2, 2)
        );
    }
}
