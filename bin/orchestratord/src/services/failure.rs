//! Every error's stable code, message and hint, for clients.
//!
//! This is the one place where the errors of other crates become a
//! [`Failure`], which is what HTTP answers, `event: error` and the terminal
//! show. The HTTP status is chosen from the code alone, in `api::error`.

use std::time::Duration;

use adapter_host::HostError;
use llama_orch_types::{ErrorCode, Hinted, PoolId};
use provision_kit::chain::one_line;
use worker_adapters_adapter_api::WorkerError;

use super::admission::QueueFull;
use super::event_log::Failure;
use super::pool::Leaving;

/// As much of a client's text as an answer repeats.
pub fn shortened(text: &str) -> &str {
    const LIMIT: usize = 100;
    text.char_indices()
        .nth(LIMIT)
        .map_or(text, |(end, _)| &text[..end])
}

/// Where a llama-server refuses what it was not started for: it names its own flags,
/// and here they are the pool's settings.
fn purpose_hint(message: &str) -> Option<String> {
    let hint = if message.contains("Pooling type 'none'") {
        "the model does not say how to pool: add it to the pool's `flags`, such as `flags: [\"--pooling mean\"]`"
    } else if message.contains("does not support embeddings") {
        "set the pool's `serves: embeddings`"
    } else if message.contains("does not support reranking") {
        "set the pool's `serves: rerank`"
    } else {
        return None;
    };
    Some(hint.to_owned())
}

impl Failure {
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retriable = true;
        self.retry_after_ms = Some(u64::try_from(after.as_millis()).unwrap_or(u64::MAX));
        self
    }

    #[must_use]
    pub fn retriable(mut self) -> Self {
        self.retriable = true;
        self
    }

    #[must_use]
    pub fn in_pool(mut self, pool: &PoolId) -> Self {
        self.pool_id = Some(pool.to_string());
        self
    }

    pub fn from_worker(error: &WorkerError) -> Self {
        let message = one_line(error);
        Self {
            hint: error.hint().or_else(|| purpose_hint(&message)),
            retriable: error.retriable(),
            ..Self::new(error.code(), message)
        }
    }

    /// For a call that a pool's engine was not started for.
    pub fn not_served(pool: &PoolId, what: &str, serves: &str) -> Self {
        let message = format!("pool {pool} serves text, not {what}");
        let hint = format!("set the pool's `serves: {serves}`, or name a pool that has it");
        Self::new(ErrorCode::InvalidParams, message)
            .with_hint(hint)
            .in_pool(pool)
    }

    pub fn from_host(error: &HostError) -> Self {
        if let HostError::Worker(error) = error {
            return Self::from_worker(error);
        }
        Self {
            hint: error.hint(),
            retriable: error.retriable(),
            ..Self::new(error.code(), one_line(error))
        }
    }

    pub fn queue_full(full: QueueFull, retry_after: Duration) -> Self {
        let mut failure = Self::new(
            ErrorCode::QueueFull,
            format!("the queue holds {} tasks, as many as it may", full.capacity),
        )
        .retry_after(retry_after)
        .with_hint(
            "come back after `retry_after_ms`; a pool's `queue_capacity` and `slots` can be raised",
        );
        failure.policy_label = Some("queue_capacity".to_owned());
        failure
    }

    /// For a task that is not queued, since it would start too late.
    pub fn deadline_unmet(within: Duration, predicted: Duration) -> Self {
        let mut failure = Self::new(
            ErrorCode::DeadlineUnmet,
            format!(
                "the task must start within {} ms and would start in about {} ms",
                within.as_millis(),
                predicted.as_millis()
            ),
        )
        .retriable();
        failure.policy_label = Some("deadline".to_owned());
        failure
    }

    /// For a task whose turn did not come in time.
    pub fn deadline_passed(waited: Duration) -> Self {
        let message = format!(
            "the task's deadline passed after {} ms in the queue",
            waited.as_millis()
        );
        Self::new(ErrorCode::DeadlineUnmet, message).retriable()
    }

    pub fn context_exceeded(prompt_tokens: u32, max_tokens: Option<u32>, ctx: u32) -> Self {
        let message = match max_tokens {
            Some(max) => format!(
                "the prompt has {prompt_tokens} tokens; with max_tokens {max} that is more than the context of {ctx}"
            ),
            None => format!(
                "the prompt has {prompt_tokens} tokens and leaves no room in the context of {ctx}"
            ),
        };
        Self::new(ErrorCode::ContextLengthExceeded, message)
            .with_hint("shorten the prompt or lower max_tokens, or give the pool a larger `ctx`")
    }

    pub fn pool_not_found<'a>(pool: &str, known: impl IntoIterator<Item = &'a PoolId>) -> Self {
        let known: Vec<&str> = known.into_iter().map(PoolId::as_str).collect();
        let pool = shortened(pool);
        let hint = match provision_kit::config::nearest(pool, known.iter().copied()) {
            Some(nearest) => format!("did you mean `{nearest}`?"),
            None => format!("the pools are: {}", known.join(", ")),
        };
        Self::new(
            ErrorCode::PoolNotFound,
            format!("there is no pool `{pool}`"),
        )
        .with_hint(hint)
    }

    /// For what is asked of a pool that ends for ever.
    pub fn leaving(pool: &PoolId, why: Leaving) -> Self {
        let failure = |message| Self::new(ErrorCode::PoolUnavailable, message).in_pool(pool);
        match why {
            Leaving::DaemonEnds => failure(format!("pool {pool} is shutting down")).retriable(),
            Leaving::Removed => failure(format!("pool {pool} was removed from the configuration"))
                .with_hint("GET /v2/pools lists the pools that there are"),
            Leaving::MakesWay => {
                failure(format!("pool {pool} is started anew with other settings")).retriable()
            }
        }
    }

    pub fn drained(pool: &PoolId) -> Self {
        Self::new(
            ErrorCode::PoolUnready,
            "the pool is drained or being drained",
        )
        .with_hint(format!(
            "POST /v2/pools/{pool}/resume lets it take tasks again"
        ))
        .retriable()
        .in_pool(pool)
    }

    /// For a task that its engine, which another replaces, did not finish in time.
    pub fn engine_replaced(pool: &PoolId) -> Self {
        Self::new(
            ErrorCode::WorkerReset,
            "the engine is being replaced, and the task's time on it is up",
        )
        .retriable()
        .in_pool(pool)
    }

    /// For a reader who waits for an answer that somebody cancelled.
    pub fn cancelled() -> Self {
        Self::new(ErrorCode::Cancelled, "the task was cancelled")
    }

    /// For what is asked about models.
    #[cfg(feature = "provisioning")]
    pub fn from_models(error: &provisioners_model_provisioner::ModelError) -> Self {
        use provisioners_model_provisioner::ModelError;
        let code = match error {
            ModelError::UnknownProfile { .. } | ModelError::NotHere { .. } => {
                ErrorCode::ModelNotFound
            }
            ModelError::Reference(_)
            | ModelError::Profile(_)
            | ModelError::DigestRequired { .. }
            | ModelError::Ambiguous { .. } => ErrorCode::InvalidParams,
            ModelError::InUse { .. } => ErrorCode::AdmissionReject,
            _ => ErrorCode::ModelUnavailable,
        };
        Self {
            hint: error.hint(),
            retriable: error.retriable(),
            ..Self::new(code, one_line(error))
        }
    }

    #[cfg(not(feature = "provisioning"))]
    pub fn no_models_in_this_build() -> Self {
        Self::new(
            ErrorCode::ModelUnavailable,
            "this build of orchestratord keeps no models",
        )
        .with_hint("use a build with the feature `provisioning`, which is on by default")
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message).with_hint(
            "this is a fault of orchestratord; its log tells more under the correlation id",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_engine_was_not_started_for_is_hinted_at_with_the_pools_settings() {
        for (message, hint) in [
            (
                "Pooling type 'none' is not OAI compatible. Please use a different pooling type",
                "--pooling mean",
            ),
            (
                "This server does not support embeddings. Start it with `--embeddings`",
                "serves: embeddings",
            ),
            (
                "This server does not support reranking. Start it with `--reranking`",
                "serves: rerank",
            ),
        ] {
            let message = message.to_owned();
            let failure = Failure::from_worker(&WorkerError::InvalidParams { message });
            assert!(failure.hint.unwrap().contains(hint));
        }
        let message = "the body is no JSON object".to_owned();
        let failure = Failure::from_worker(&WorkerError::InvalidParams { message });
        assert_eq!(failure.hint, None);
    }
}
