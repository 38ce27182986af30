//! How long to wait for the engine's next sign of life. Pure but for the one
//! figure that is measured, the engine's speed on prompts.
//!
//! The settings are for short tasks. A long prompt is given more time by its
//! length, at the speed that was measured on this engine or, before anything
//! was measured, at one that is slow for any machine. An engine that tells of its
//! progress in the prompt is waited for from one such word to the next.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Prompt tokens that the settings' own figure covers.
const COVERED_PROMPT: u64 = 256;
/// Tokens of context that the settings' own figure for the next token covers.
const COVERED_CONTEXT: u64 = 4096;
/// The engine's largest batch, by its default: between two signs of life it
/// works on no more prompt tokens than that.
const LARGEST_BATCH: u64 = 2048;
/// No context is larger; an engine that tells of one is not taken at its word.
const LARGEST_CONTEXT: u64 = 1 << 24;
/// How many times slower than measured an engine may be before it counts as hung.
const MARGIN: f64 = 4.0;
/// How long a batch takes, before anything was measured.
const UNKNOWN_BATCH: Duration = Duration::from_secs(5);
/// Tokens per second: a large model on a weak machine.
const SLOW: f64 = 5.0;
/// Below, fixed costs hide the speed.
const TELLING_PROMPT: u64 = 32;
/// Weight of the newest measurement.
const NEWEST_WEIGHT: f64 = 0.3;

/// Prompt tokens per second, measured; shared by all tasks of an engine.
#[derive(Debug, Default)]
pub(crate) struct PromptSpeed {
    /// In thousandths; 0 is not measured yet.
    milli_tokens: AtomicU64,
}

impl PromptSpeed {
    /// Takes note that so many prompt tokens took so many milliseconds.
    pub(crate) fn record(&self, tokens: u64, ms: f64) {
        if tokens < TELLING_PROMPT || ms <= 0.0 {
            return;
        }
        let newest = tokens as f64 * 1000.0 / ms;
        let speed = self
            .tokens_per_second()
            .map_or(newest, |speed| speed + NEWEST_WEIGHT * (newest - speed));
        let milli = (speed * 1000.0).max(1.0) as u64;
        // Two tasks that end at once may lose one measurement.
        self.milli_tokens.store(milli, Ordering::Relaxed);
    }

    pub(crate) fn tokens_per_second(&self) -> Option<f64> {
        let milli = self.milli_tokens.load(Ordering::Relaxed);
        (milli > 0).then(|| milli as f64 / 1000.0)
    }
}

/// The settings' figures.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadlines {
    pub(crate) first_token: Duration,
    pub(crate) next_token: Duration,
}

impl Deadlines {
    /// While the engine works on the prompt: for its next word, with so many
    /// tokens of the prompt left. `told` is whether it tells of its progress, and
    /// so owes a word after each batch.
    pub(crate) fn in_prompt(&self, left: u64, told: bool, speed: Option<f64>) -> Duration {
        let owed = if told { left.min(LARGEST_BATCH) } else { left };
        self.first_token + working_on(owed.saturating_sub(COVERED_PROMPT), speed)
    }

    /// For the next token, with so many tokens of context in use. So many tokens
    /// of other tasks' prompts hold it up for as long as their batch takes.
    pub(crate) fn decoding(
        &self,
        context: u64,
        other_prompts: u64,
        speed: Option<f64>,
    ) -> Duration {
        let context = context.clamp(COVERED_CONTEXT, LARGEST_CONTEXT);
        let scale = context as f64 / COVERED_CONTEXT as f64;
        let shared = other_prompts.min(LARGEST_BATCH);
        self.next_token.mul_f64(scale) + working_on(shared, speed)
    }

    /// The same, when the last token came at `since` and other tasks' prompts
    /// held it up until `shared_until`: from then on it has the time of one that
    /// was not held up, within what a whole batch may take.
    pub(crate) fn decoding_until<T>(
        &self,
        context: u64,
        (since, shared_until): (T, Option<T>),
        speed: Option<f64>,
    ) -> T
    where
        T: Ord + Copy + std::ops::Add<Duration, Output = T>,
    {
        let alone = self.decoding(context, 0, speed);
        let latest = since + self.decoding(context, LARGEST_BATCH, speed);
        let from = shared_until.map_or(since, |until| until.max(since));
        (from + alone).min(latest)
    }
}

/// How long the first batch of a prompt of so many tokens will take.
pub(crate) fn first_batch(tokens: u64, speed: Option<f64>) -> Duration {
    let tokens = tokens.min(LARGEST_BATCH) as f64;
    speed.map_or(UNKNOWN_BATCH, |speed| {
        Duration::from_secs_f64(tokens / speed.max(0.01))
    })
}

/// The longest that so many prompt tokens may take.
fn working_on(tokens: u64, speed: Option<f64>) -> Duration {
    let slowest = speed.map_or(SLOW, |speed| (speed / MARGIN).max(0.01));
    Duration::from_secs_f64(tokens.min(LARGEST_CONTEXT) as f64 / slowest)
}

/// Tokens of a text, from above for usual texts, before the engine has counted
/// them: three bytes each.
pub(crate) fn guess_tokens(text: &str) -> u64 {
    text.len() as u64 / 3 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SET: Deadlines = Deadlines {
        first_token: Duration::from_secs(10),
        next_token: Duration::from_secs(2),
    };

    #[test]
    fn short_tasks_get_what_is_set_and_long_ones_more() {
        assert_eq!(SET.in_prompt(200, false, None), SET.first_token);
        assert_eq!(SET.decoding(4000, 0, None), SET.next_token);
        // 1000 tokens beyond the covered ones, at 5 and at 100 / 4 tokens per second.
        let prompt = 1000 + COVERED_PROMPT;
        assert_eq!(SET.in_prompt(prompt, false, None).as_secs(), 210);
        assert_eq!(SET.in_prompt(prompt, false, Some(100.0)).as_secs(), 50);
        assert_eq!(SET.decoding(8192, 0, None), 2 * SET.next_token);
        // Ten tokens of somebody else's prompt, at 5 per second.
        assert_eq!(SET.decoding(10, 10, None), 2 * SET.next_token);
    }

    #[test]
    fn a_token_that_was_held_up_is_not_waited_for_much_longer_afterwards() {
        let at = |seconds| Duration::from_secs(seconds);
        let until = |shared| {
            SET.decoding_until(10, (at(100), shared), Some(4096.0))
                .as_secs()
        };
        assert_eq!(until(None), 102);
        assert_eq!(until(Some(at(50))), 102, "before the last token");
        assert_eq!(until(Some(at(101))), 103);
        // A batch of 2048 takes 2 s at a quarter of the speed.
        assert_eq!(until(Some(at(1000))), 104, "never for ever");
    }

    #[test]
    fn an_engine_that_tells_owes_a_word_after_each_batch() {
        let told = SET.in_prompt(100_000, true, Some(100.0));
        assert_eq!(told, SET.in_prompt(LARGEST_BATCH, true, Some(100.0)));
        assert!(told < SET.in_prompt(100_000, false, Some(100.0)));
    }

    #[test]
    fn only_telling_prompts_are_measured() {
        let speed = PromptSpeed::default();
        speed.record(3, 1.0);
        speed.record(1000, 0.0);
        assert_eq!(speed.tokens_per_second(), None);
        speed.record(1000, 2000.0);
        assert_eq!(speed.tokens_per_second(), Some(500.0));
        speed.record(1000, 1000.0);
        assert_eq!(speed.tokens_per_second(), Some(650.0));
    }

    proptest! {
        #[test]
        fn whatever_an_engine_tells_gives_a_time(
            left: u64, context: u64, others: u64, told: bool, speed in prop::option::of(any::<f64>()),
        ) {
            let longest = Duration::from_secs(LARGEST_CONTEXT * 101);
            prop_assert!(SET.in_prompt(left, told, speed) < longest);
            prop_assert!(SET.decoding(context, others, speed) < longest);
        }

        #[test]
        fn more_work_never_gets_less_time(
            fewer in 0u64..100_000, more in 0u64..100_000, told: bool, others in 0u64..10_000, speed in prop::option::of(0.001f64..10_000.0),
        ) {
            let both = fewer + more;
            prop_assert!(SET.in_prompt(both, told, speed) >= SET.in_prompt(fewer, told, speed));
            prop_assert!(SET.in_prompt(fewer, told, speed) >= SET.first_token);
            prop_assert!(SET.decoding(both, others, speed) >= SET.decoding(fewer, others, speed));
            prop_assert!(SET.decoding(fewer, others, speed) >= SET.next_token);
        }
    }
}
