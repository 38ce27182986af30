//! How long adapters wait for their engines.

use std::time::Duration;

use worker_adapters_llamacpp_http::AdapterSettings;

/// The same for every engine of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSettings {
    /// For opening a connection. Default: 2 s.
    pub connect_timeout: Duration,
    /// For a whole answer to a request that streams nothing. Default: 10 s.
    pub response_timeout: Duration,
    /// From sending a task to its first token. Default: 120 s.
    pub first_token_timeout: Duration,
    /// From one token to the next. Default: 30 s.
    pub next_token_timeout: Duration,
}

impl Default for HostSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(2),
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
