//! How long one task's engine is waited for, as things are now.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{TimeoutPhase, WorkerError};

use crate::deadlines::{Deadlines, PromptSpeed, first_batch};
use crate::live::{Handle, LiveTask};
use crate::settings::AdapterSettings;
use crate::wire::PromptProgress;

/// How long a limit is taken for granted: other tasks come to the engine and go.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What the engine was last heard to do.
#[derive(Debug, Clone, Copy)]
enum Told {
    Prompt(PromptProgress),
    /// With so many tokens in the context.
    Decoding(u64),
}

/// What was heard of the engine about one task, and what it therefore gets.
#[derive(Debug)]
pub(crate) struct Patience {
    deadlines: Deadlines,
    speed: Arc<PromptSpeed>,
    started: Instant,
    /// When the latest sign of life came, and what it told; none before the first.
    progress: Option<(Instant, Told)>,
    /// When other tasks' prompts were last seen to hold this one up.
    shared_until: Option<Instant>,
    /// A guess, until the engine has counted.
    prompt_tokens: u64,
}

impl Patience {
    /// Begins to wait, for a task with about so many tokens in its prompt.
    pub(crate) fn new(
        settings: &AdapterSettings,
        speed: Arc<PromptSpeed>,
        prompt_tokens: u64,
        handle: &Handle,
    ) -> Self {
        handle.expect_batch(first_batch(prompt_tokens, speed.tokens_per_second()));
        handle.set_prompt_left(prompt_tokens);
        Self {
            deadlines: Deadlines {
                first_token: settings.first_token_timeout,
                next_token: settings.next_token_timeout,
            },
            speed,
            started: Instant::now(),
            progress: None,
            shared_until: None,
            prompt_tokens,
        }
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// Time since the latest sign of life, or since the start.
    pub(crate) fn waited(&self, now: Instant) -> Duration {
        now - self.progress.map_or(self.started, |(at, _)| at)
    }

    pub(crate) fn hear_of_prompt(&mut self, now: Instant, progress: PromptProgress) {
        self.progress = Some((now, Told::Prompt(progress)));
    }

    pub(crate) fn hear_token(&mut self, now: Instant, context: u64) {
        self.progress = Some((now, Told::Decoding(context)));
    }

    /// How long the next sign of life is waited for.
    pub(crate) fn limit(&mut self, live: &LiveTask) -> Limit {
        let others = live.other_prompts();
        if others.is_some() {
            self.shared_until = Some(Instant::now());
        }
        let speed = self.speed.tokens_per_second();
        let (since, phase, after) = match self.progress {
            None => {
                let after = self.deadlines.in_prompt(self.prompt_tokens, false, speed);
                (self.started, TimeoutPhase::FirstToken, after)
            }
            Some((since, Told::Prompt(progress))) => {
                let after = self.deadlines.in_prompt(progress.left(), true, speed);
                (since, TimeoutPhase::FirstToken, after)
            }
            Some((since, Told::Decoding(context))) => {
                let deadline = others.map_or_else(
                    || {
                        let held_up = (since, self.shared_until);
                        self.deadlines.decoding_until(context, held_up, speed)
                    },
                    |tokens| since + self.deadlines.decoding(context, tokens, speed),
                );
                (since, TimeoutPhase::NextToken, deadline - since)
            }
        };
        Limit {
            deadline: since + after,
            phase,
            after,
        }
    }
}

/// How long one step may take, as things are now.
#[derive(Debug)]
pub(crate) struct Limit {
    deadline: Instant,
    phase: TimeoutPhase,
    after: Duration,
}

impl Limit {
    /// `None` when it is time to see whether the limit still holds.
    pub(crate) async fn apply<T>(
        self,
        cancel: &CancellationToken,
        step: impl Future<Output = T>,
    ) -> Result<Option<T>, WorkerError> {
        let look = self.deadline.min(Instant::now() + LOOK_AGAIN);
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(WorkerError::Cancelled),
            outcome = timeout_at(look, step) => match outcome {
                Ok(outcome) => Ok(Some(outcome)),
                Err(_) if look < self.deadline => Ok(None),
                Err(_) => Err(WorkerError::Timeout {
                    phase: self.phase,
                    after: self.after,
                }),
            },
        }
    }
}
