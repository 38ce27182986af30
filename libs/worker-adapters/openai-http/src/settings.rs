//! Where a server is, and how long to wait for it.

use std::path::PathBuf;
use std::time::Duration;

use provision_kit::secret::Secret;

/// One server.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// What comes before `/v1/…`, without a trailing slash and without credentials:
    /// it is shown.
    pub url: String,
    /// The server's name for the model.
    pub model: String,
    pub bearer: Option<Secret>,
    /// Where the bearer token came from, for errors.
    pub token_file: Option<PathBuf>,
    /// How many tasks it is given at once, at least 1.
    pub slots: u32,
}

/// How long to wait, the same for all servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// For opening a connection.
    pub connect: Duration,
    /// For an answer to a short question, such as whether it is well.
    pub response: Duration,
    /// From sending a short task to its first event; a long one gets more by its
    /// length, and a server that sends signs of life is waited for from one to the
    /// next, an hour at the most.
    pub first_token: Duration,
    /// From one event to the next.
    pub next_token: Duration,
}

impl Default for Waits {
    /// Connection 2 s, answer 5 s, first token 120 s, next token 30 s.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(2),
            response: Duration::from_secs(5),
            first_token: Duration::from_mins(2),
            next_token: Duration::from_secs(30),
        }
    }
}

impl Waits {
    /// Bytes of a request that the settings' own figure covers.
    const COVERED: u64 = 4096;
    /// Bytes per second: a long prompt on a slow and busy server.
    const SLOW: f64 = 100.0;

    /// For the first event of the answer to a request of so many bytes.
    pub(crate) fn first_event(&self, request_bytes: u64) -> Duration {
        let more = request_bytes.saturating_sub(Self::COVERED) as f64 / Self::SLOW;
        self.first_token + Duration::from_secs_f64(more)
    }

    /// For a whole answer that does not stream.
    pub(crate) fn whole(&self, request_bytes: u64) -> Duration {
        self.first_event(request_bytes) + 10 * self.next_token
    }
}
