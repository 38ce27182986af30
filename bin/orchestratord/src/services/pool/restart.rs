//! How long until an engine is tried again, and when that is given up. Pure:
//! the time and the random number are passed in.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_mins(5);

/// What does not get better by itself is tried again too, but seldom: somebody
/// may have mended it, and nobody should have to restart the daemon for that.
const FIRST_SELDOM_RETRY: Duration = Duration::from_mins(2);
const LAST_SELDOM_RETRY: Duration = Duration::from_hours(1);

/// How a pool's engine is tried again after it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPolicy {
    /// The delay after the first crash. Every further one within the window
    /// doubles it.
    pub first_delay: Duration,
    pub last_delay: Duration,
    /// So many crashes within the window open the breaker.
    pub crashes: usize,
    pub window: Duration,
    /// How long an open breaker keeps the pool from being tried again.
    pub cool_down: Duration,
}

/// That of a pool whose configuration says nothing.
#[cfg(test)]
impl Default for RestartPolicy {
    fn default() -> Self {
        crate::app::config::restart_policy(&crate::app::config::RestartConfig::default())
    }
}

/// What follows a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Queued tasks are kept; the engine is started again.
    Restart { after: Duration },
    /// Too many crashes: tried again after the cool-down.
    Open { cool_down: Duration },
}

/// What is remembered of an engine's failures.
#[derive(Debug, Clone, Default)]
pub struct FailureHistory {
    /// Crashes within the window, the oldest first.
    crashes: VecDeque<Instant>,
    /// The breaker has opened. Until a whole window passes without a crash,
    /// one more opens it again.
    tripped: bool,
    load_failures: u32,
}

impl FailureHistory {
    /// An engine that was ready has ended. `random` is at least 0 and below 1.
    pub fn crashed(&mut self, policy: &RestartPolicy, now: Instant, random: f64) -> Verdict {
        let last = self.crashes.back().copied();
        if last.is_none_or(|last| now.saturating_duration_since(last) > policy.window) {
            self.tripped = false;
        }
        while let Some(oldest) = self.crashes.front()
            && now.saturating_duration_since(*oldest) > policy.window
        {
            self.crashes.pop_front();
        }
        self.crashes.push_back(now);
        // Bounded, whatever the policy is changed to.
        while self.crashes.len() > policy.crashes.max(1) {
            self.crashes.pop_front();
        }
        if self.tripped || self.crashes.len() >= policy.crashes {
            self.tripped = true;
            return Verdict::Open {
                cool_down: policy.cool_down,
            };
        }
        let times = u32::try_from(self.crashes.len() - 1).unwrap_or(u32::MAX);
        Verdict::Restart {
            after: jittered(
                doubled(policy.first_delay, times, policy.last_delay),
                random,
            ),
        }
    }

    /// An engine never became ready.
    pub fn not_started(&mut self, retriable: bool, random: f64) -> Duration {
        self.load_failures = self.load_failures.saturating_add(1);
        let (first, last) = if retriable {
            (FIRST_RETRY, LAST_RETRY)
        } else {
            (FIRST_SELDOM_RETRY, LAST_SELDOM_RETRY)
        };
        jittered(doubled(first, self.load_failures - 1, last), random)
    }

    pub fn started(&mut self) {
        self.load_failures = 0;
    }

    /// Somebody asked for another try: what was before does not count.
    pub fn forget(&mut self) {
        *self = Self::default();
    }
}

fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    first.saturating_mul(2u32.saturating_pow(times)).min(most)
}

/// Between half of the delay and the whole of it, so that pools that failed
/// together do not all come back in the same moment.
fn jittered(delay: Duration, random: f64) -> Duration {
    delay.mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn delays(history: &mut FailureHistory, apart: Duration, count: usize) -> Vec<Verdict> {
        let begun = Instant::now();
        (0..count)
            .map(|number| {
                let now = begun + apart * u32::try_from(number).unwrap();
                history.crashed(&RestartPolicy::default(), now, 1.0)
            })
            .collect()
    }

    #[test]
    fn delays_double_until_the_breaker_opens() {
        let verdicts = delays(&mut FailureHistory::default(), Duration::from_secs(1), 7);
        let restart = |ms| Verdict::Restart {
            after: Duration::from_millis(ms),
        };
        let open = Verdict::Open {
            cool_down: Duration::from_mins(5),
        };
        let expected = [
            restart(500),
            restart(1000),
            restart(2000),
            restart(4000),
            open,
            // Tried once after the cool-down, and crashed again.
            open,
            open,
        ];
        assert_eq!(verdicts, expected);
    }

    #[test]
    fn crashes_far_apart_never_open_the_breaker() {
        let verdicts = delays(&mut FailureHistory::default(), Duration::from_mins(6), 50);
        assert!(
            verdicts
                .iter()
                .all(|verdict| matches!(verdict, Verdict::Restart { .. })),
            "at most two are within ten minutes: {verdicts:?}"
        );
    }

    #[test]
    fn what_does_not_get_better_is_tried_seldom() {
        let mut history = FailureHistory::default();
        assert_eq!(history.not_started(false, 1.0), FIRST_SELDOM_RETRY);
        assert_eq!(history.not_started(false, 0.0), FIRST_SELDOM_RETRY);
        assert_eq!(history.not_started(true, 1.0), FIRST_RETRY * 4);
    }

    proptest! {
        #[test]
        fn every_delay_is_bounded_by_the_policy(
            apart in prop::collection::vec((0u64..2000, 0.0f64..1.0), 0..100), crashes in 1usize..8,
        ) {
            let policy = RestartPolicy { crashes, ..RestartPolicy::default() };
            let mut history = FailureHistory::default();
            let mut now = Instant::now();
            for (seconds, random) in apart {
                now += Duration::from_secs(seconds);
                match history.crashed(&policy, now, random) {
                    Verdict::Restart { after } => {
                        prop_assert!(after >= policy.first_delay / 2 && after <= policy.last_delay);
                    }
                    Verdict::Open { cool_down } => prop_assert_eq!(cool_down, policy.cool_down),
                }
                prop_assert!(history.crashes.len() <= crashes);
                prop_assert!(history.not_started(false, random) <= LAST_SELDOM_RETRY);
            }
        }
    }
}
