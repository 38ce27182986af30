//! What a mock engine shall do.

use std::time::Duration;

use worker_adapters_adapter_api::{EngineHealth, TimeoutPhase, WorkerError};

/// The default answers at once with a few words.
#[derive(Debug, Clone, PartialEq)]
pub struct MockScript {
    pub version: String,
    pub health: EngineHealth,
    /// Context length of one slot, in tokens.
    pub ctx: u32,
    pub slots: u32,
    /// The pieces of the answer; a task takes at most its `max_tokens`.
    pub pieces: Vec<String>,
    /// Begin again with the first piece after the last, up to `max_tokens`.
    pub cycle: bool,
    pub first_token_after: Duration,
    pub next_token_after: Duration,
    pub fault: Option<MockFault>,
    /// How long a cancel takes to free the slot.
    pub free_after: Duration,
}

impl Default for MockScript {
    fn default() -> Self {
        Self {
            version: "mock".to_owned(),
            health: EngineHealth::Ready,
            ctx: 4096,
            slots: 1,
            pieces: ["This", " is", " no", " model", "."]
                .map(str::to_owned)
                .to_vec(),
            cycle: false,
            first_token_after: Duration::ZERO,
            next_token_after: Duration::ZERO,
            fault: None,
            free_after: Duration::ZERO,
        }
    }
}

impl MockScript {
    /// One that answers with these pieces.
    pub fn with_pieces(pieces: &[&str]) -> Self {
        Self {
            pieces: pieces.iter().map(|&piece| piece.to_owned()).collect(),
            ..Self::default()
        }
    }

    /// One that decodes up to `max_tokens`, a piece every so often.
    pub fn endless(next_token_after: Duration) -> Self {
        Self {
            cycle: true,
            next_token_after,
            ..Self::default()
        }
    }
}

/// How a task goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MockFault {
    /// Refused when submitted.
    Refuse,
    /// Not reachable when submitted.
    Unreachable,
    /// The stream breaks off.
    Cut { after_tokens: u64 },
    /// The stream gives up waiting for its next token.
    TimeOut { after_tokens: u64 },
    /// The stream gives nothing any more, and does not end.
    Hang { after_tokens: u64 },
}

impl MockFault {
    pub(crate) fn at_submit(self) -> Option<WorkerError> {
        match self {
            Self::Refuse => Some(WorkerError::InvalidParams {
                message: "refused, as the script says".to_owned(),
            }),
            Self::Unreachable => Some(WorkerError::Unreachable {
                url: "mock:".to_owned(),
                source: "not there, as the script says".into(),
            }),
            Self::Cut { .. } | Self::TimeOut { .. } | Self::Hang { .. } => None,
        }
    }

    /// Whether it strikes once so many tokens have come.
    pub(crate) fn strikes_after(self, tokens: u64) -> bool {
        match self {
            Self::Refuse | Self::Unreachable => false,
            Self::Cut { after_tokens }
            | Self::TimeOut { after_tokens }
            | Self::Hang { after_tokens } => after_tokens == tokens,
        }
    }

    /// The stream's error when it strikes; a hang has none.
    pub(crate) fn in_stream(self) -> Option<WorkerError> {
        match self {
            Self::Cut { .. } => Some(WorkerError::Reset {
                reason: "cut, as the script says".to_owned(),
            }),
            Self::TimeOut { after_tokens } => Some(WorkerError::Timeout {
                phase: match after_tokens {
                    0 => TimeoutPhase::FirstToken,
                    _ => TimeoutPhase::NextToken,
                },
                after: Duration::from_secs(1),
            }),
            Self::Refuse | Self::Unreachable | Self::Hang { .. } => None,
        }
    }
}
