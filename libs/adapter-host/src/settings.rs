//! How long adapters wait for their engines.

use std::time::Duration;

use worker_adapters_llamacpp_http::AdapterSettings;

/// The same for every engine of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSettings {
    /// For opening a connection. Default: 0.9 s.
    pub connect_timeout: Duration,
    /// For a whole answer to a request that streams nothing. Default: 10 s.
    pub response_timeout: Duration,
    /// From sending a task with a short prompt to its first token; a long prompt
    /// gets more time by its length. Default: 120 s.
    pub first_token_timeout: Duration,
    /// From one token to the next; more in a long context. Default: 30 s.
    pub next_token_timeout: Duration,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_millis(900),
            response_timeout: Duration::from_secs(10),
            first_token_timeout: Duration::from_mins(2),
            next_token_timeout: Duration::from_secs(30),
        }
    }
}

impl HostSettings {
    pub(crate) fn for_engine(&self, url: &str) -> AdapterSettings {
        AdapterSettings {
            connect_timeout: self.connect_timeout,
            response_timeout: self.response_timeout,
            first_token_timeout: self.first_token_timeout,
            next_token_timeout: self.next_token_timeout,
            ..AdapterSettings::new(url)
        }
    }
}
