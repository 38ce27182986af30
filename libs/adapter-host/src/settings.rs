//! How long adapters wait for their engines.

use std::time::Duration;

use llama_orch_types::ProvisionedContext;
use worker_adapters_llamacpp_http::AdapterSettings;

/// The first build that was seen to send each token at once (`TCP_NODELAY`).
const SENDS_AT_ONCE_FROM: u32 = 11434;

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
    pub(crate) fn for_engine(&self, context: &ProvisionedContext) -> AdapterSettings {
        AdapterSettings {
            connect_timeout: self.connect_timeout,
            response_timeout: self.response_timeout,
            first_token_timeout: self.first_token_timeout,
            next_token_timeout: self.next_token_timeout,
            delayed_acks: sends_at_once(&context.engine_version),
            ..AdapterSettings::new(&context.url)
        }
    }
}

/// Whether an engine of this version, such as `b11434`, sends each token at once.
fn sends_at_once(version: &str) -> bool {
    let build = version
        .strip_prefix('b')
        .and_then(|build| build.parse().ok());
    build.is_some_and(|build: u32| build >= SENDS_AT_ONCE_FROM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_of_an_engine_that_sends_at_once_acknowledgements_are_delayed() {
        assert!(sends_at_once("b11434") && sends_at_once("b12000"));
        for other in ["b11433", "b3000", "11434", "v0.6.0", "unknown", ""] {
            assert!(!sends_at_once(other), "{other}");
        }
    }
}
