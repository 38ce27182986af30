//! Where the engine is, and how long to wait for it.

use std::fmt;
use std::time::Duration;

/// A text that never appears in logs or debug output.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// How to talk to one engine process.
#[derive(Debug, Clone)]
pub struct AdapterSettings {
    /// Base URL, for example `http://127.0.0.1:40123`.
    pub base_url: String,
    /// The engine's API key, where it wants one.
    pub bearer: Option<Secret>,
    /// For opening a connection. Shorter than the second within which an engine
    /// takes or refuses a task, so that one that takes no connection is told from
    /// one that works.
    pub connect_timeout: Duration,
    /// For a whole answer to a request that streams nothing.
    pub response_timeout: Duration,
    /// From sending a completion with a short prompt to its first token; longer
    /// prompts get more time by their length.
    pub first_token_timeout: Duration,
    /// From one token to the next; more in a long context.
    pub next_token_timeout: Duration,
    /// How often the engine's slots are looked at while an answer that does not
    /// stream is waited for. Well above a second: the engine looks for clients
    /// that have gone only after one without any request.
    pub look_interval: Duration,
    /// How often `Metrics` events come at most.
    pub metrics_interval: Duration,
    /// Whether the packets of a stream need not be acknowledged one by one, which saves
    /// a tenth of a token's processor time. Only for an engine that sends each token at
    /// once (`TCP_NODELAY`): one that waits for acknowledgements would send late.
    pub delayed_acks: bool,
}

impl AdapterSettings {
    /// The default timeouts: connection 0.9 s, answer 10 s, first token 120 s,
    /// next token 30 s; a look at the slots every 5 s, a `Metrics` event every 250 ms.
    /// Acknowledgements are not delayed.
    pub fn new(base_url: impl Into<String>) -> Self {
        Self {
            base_url: base_url.into(),
            bearer: None,
            connect_timeout: Duration::from_millis(900),
            response_timeout: Duration::from_secs(10),
            first_token_timeout: Duration::from_mins(2),
            next_token_timeout: Duration::from_secs(30),
            look_interval: Duration::from_secs(5),
            metrics_interval: Duration::from_millis(250),
            delayed_acks: false,
        }
    }
}
