//! What a call cost, put together from what its answer tells in places.

use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use worker_adapters_adapter_api::{CallApi, EndSummary, FinishReason};

use crate::wire::Timings;

/// Tokens, in the words of any of the APIs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Usage {
    prompt_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    prompt_tokens_details: Option<Details>,
    input_tokens_details: Option<Details>,
    /// Anthropic's; not among its `input_tokens`.
    cache_read_input_tokens: Option<u64>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
struct Details {
    cached_tokens: Option<u64>,
}

impl Usage {
    fn tokens_in(&self) -> Option<u64> {
        let beside = self.cache_read_input_tokens.unwrap_or(0);
        let own = self.prompt_tokens.or(self.input_tokens)?;
        Some(own.saturating_add(beside))
    }

    fn cached(&self) -> Option<u64> {
        let details = self.prompt_tokens_details.or(self.input_tokens_details);
        self.cache_read_input_tokens
            .or(details.and_then(|details| details.cached_tokens))
    }

    fn tokens_out(&self) -> Option<u64> {
        self.completion_tokens.or(self.output_tokens)
    }
}

/// What one event or answer says of its costs.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Costs {
    pub(crate) usage: Option<Usage>,
    pub(crate) timings: Option<Timings>,
    /// Whether it comes with what it is about, and not in an event of its own.
    pub(crate) of_choice: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    tokens_in: u64,
    cached: u64,
    tokens_out: u64,
    prompt_ms: f64,
    decode_ms: f64,
    told: bool,
}

/// The costs of one call.
#[derive(Debug)]
pub(crate) struct Account {
    api: CallApi,
    with_choices: Sum,
    by_themselves: Sum,
    /// Events that were tokens, until the engine tells its own count.
    counted: u64,
    finish: FinishReason,
}

impl Account {
    pub(crate) fn new(api: CallApi) -> Self {
        Self {
            api,
            with_choices: Sum::default(),
            by_themselves: Sum::default(),
            counted: 0,
            finish: FinishReason::Stop,
        }
    }

    pub(crate) fn count_token(&mut self) {
        self.counted += 1;
    }

    /// Tokens generated so far, as far as is known.
    pub(crate) fn counted(&self) -> u64 {
        self.counted
    }

    pub(crate) fn finish(&mut self, reason: FinishReason) {
        self.finish = reason;
    }

    /// Takes in what a choice cost, or what the whole did.
    pub(crate) fn add(&mut self, costs: &Costs) {
        let usage = costs.usage.unwrap_or_default();
        let timings = costs.timings;
        let prompt = timings
            .map(|timings| timings.cache_n.saturating_add(timings.prompt_n))
            .or(usage.tokens_in());
        let out = timings
            .map(|timings| timings.predicted_n)
            .or(usage.tokens_out());
        if prompt.is_none() && out.is_none() {
            return;
        }
        let cached = timings.map(|timings| timings.cache_n).or(usage.cached());
        let sum = if costs.of_choice {
            &mut self.with_choices
        } else {
            &mut self.by_themselves
        };
        let prompt = prompt.unwrap_or(0);
        if self.api == CallApi::Completions {
            // There may be several prompts.
            sum.tokens_in = sum.tokens_in.saturating_add(prompt);
            sum.cached = sum.cached.saturating_add(cached.unwrap_or(0));
        } else {
            sum.tokens_in = sum.tokens_in.max(prompt);
            sum.cached = sum.cached.max(cached.unwrap_or(0));
        }
        sum.tokens_out = sum.tokens_out.saturating_add(out.unwrap_or(0));
        let timings = timings.unwrap_or_default();
        sum.prompt_ms = sum.prompt_ms.max(timings.prompt_ms);
        sum.decode_ms = sum.decode_ms.max(timings.predicted_ms);
        sum.told = true;
    }

    /// The end. Times that the engine did not tell are taken from our own clock:
    /// until its first event, and from then on.
    pub(crate) fn summary(&self, prompt: Duration, decode: Duration) -> EndSummary {
        let sum = if self.by_themselves.told {
            self.by_themselves
        } else {
            self.with_choices
        };
        let or_own = |told: f64, own: Duration| {
            if told > 0.0 {
                told
            } else {
                own.as_secs_f64() * 1000.0
            }
        };
        EndSummary {
            tokens_in: sum.tokens_in,
            tokens_cached: sum.cached,
            tokens_out: if sum.told {
                sum.tokens_out
            } else {
                self.counted
            },
            prompt_time_ms: or_own(sum.prompt_ms, prompt),
            decode_time_ms: or_own(sum.decode_ms, decode),
            finish_reason: self.finish,
            // The APIs do not tell the parameters in force.
            effective: Value::Null,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_beyond_all_measure_are_no_more_than_that() {
        let huge = r#"{"input_tokens":18446744073709551615,"cache_read_input_tokens":9,"output_tokens":18446744073709551615}"#;
        let costs = Costs {
            usage: Some(serde_json::from_str(huge).unwrap()),
            ..Costs::default()
        };
        let timed = Costs {
            timings: Some(Timings {
                cache_n: u64::MAX,
                prompt_n: 1,
                predicted_n: u64::MAX,
                ..Timings::default()
            }),
            ..costs
        };
        let mut account = Account::new(CallApi::Completions);
        for costs in [costs, timed, costs] {
            account.add(&costs);
        }
        let summary = account.summary(Duration::ZERO, Duration::ZERO);
        assert_eq!(
            (summary.tokens_in, summary.tokens_out),
            (u64::MAX, u64::MAX)
        );
    }
}
