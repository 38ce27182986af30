//! When an engine is tried again. Pure.

use std::time::Duration;

/// An engine that lived this long has shown that it can: what happens after
/// counts afresh.
const PROVEN: Duration = Duration::from_mins(1);

const FIRST_RESTART: Duration = Duration::from_millis(500);
const LAST_RESTART: Duration = Duration::from_secs(30);

/// Exits in a row, none of them after a proven life, until the pool fails.
const EXITS_BEFORE_FAILING: u32 = 5;

const FIRST_RETRY: Duration = Duration::from_secs(5);
const LAST_RETRY: Duration = Duration::from_mins(5);

/// What does not get better by itself is tried again too, but seldom: somebody
/// may have mended it, and nobody should have to restart the daemon for that.
const FIRST_SELDOM_RETRY: Duration = Duration::from_mins(2);
const LAST_SELDOM_RETRY: Duration = Duration::from_hours(1);

/// How one attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The engine was ready and then ended by itself.
    Exited { lived: Duration },
    /// It never became ready.
    NotStarted { retriable: bool },
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Queued tasks are kept; the engine is started again.
    Restart { after: Duration },
    /// Queued tasks end; tried again later.
    Fail { retry_after: Duration },
}

/// Counts failures in a row.
#[derive(Debug, Clone, Copy, Default)]
pub struct RestartPolicy {
    exits: u32,
    failures: u32,
}

impl RestartPolicy {
    pub fn decide(&mut self, ending: Ending) -> Verdict {
        match ending {
            Ending::Exited { lived } => {
                self.failures = 0;
                self.exits = if lived >= PROVEN { 1 } else { self.exits + 1 };
                if self.exits > EXITS_BEFORE_FAILING {
                    self.exits = 0;
                    return Verdict::Fail {
                        retry_after: LAST_RETRY,
                    };
                }
                Verdict::Restart {
                    after: doubled(FIRST_RESTART, self.exits - 1, LAST_RESTART),
                }
            }
            Ending::NotStarted { retriable } => {
                self.failures += 1;
                let (first, last) = if retriable {
                    (FIRST_RETRY, LAST_RETRY)
                } else {
                    (FIRST_SELDOM_RETRY, LAST_SELDOM_RETRY)
                };
                Verdict::Fail {
                    retry_after: doubled(first, self.failures - 1, last),
                }
            }
        }
    }
}

fn doubled(first: Duration, times: u32, most: Duration) -> Duration {
    first.saturating_mul(2u32.saturating_pow(times)).min(most)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SHORT: Ending = Ending::Exited {
        lived: Duration::from_secs(1),
    };
    const LONG: Ending = Ending::Exited { lived: PROVEN };

    #[test]
    fn a_crash_loop_ends_in_failure_and_a_long_life_starts_afresh() {
        let mut policy = RestartPolicy::default();
        let mut delays = Vec::new();
        for _ in 0..EXITS_BEFORE_FAILING {
            match policy.decide(SHORT) {
                Verdict::Restart { after } => delays.push(after),
                fail @ Verdict::Fail { .. } => panic!("{fail:?}"),
            }
        }
        assert!(delays.is_sorted());
        assert!(matches!(policy.decide(SHORT), Verdict::Fail { .. }));
        policy.decide(SHORT);
        assert_eq!(
            policy.decide(LONG),
            Verdict::Restart {
                after: FIRST_RESTART
            }
        );
    }

    #[test]
    fn what_does_not_get_better_is_tried_seldom() {
        let mut policy = RestartPolicy::default();
        assert_eq!(
            policy.decide(Ending::NotStarted { retriable: false }),
            Verdict::Fail {
                retry_after: FIRST_SELDOM_RETRY
            }
        );
    }

    proptest! {
        #[test]
        fn every_delay_is_bounded(endings in prop::collection::vec(
            prop_oneof![Just(SHORT), Just(LONG), Just(Ending::NotStarted { retriable: true })], 0..200)) {
            let mut policy = RestartPolicy::default();
            for ending in endings {
                match policy.decide(ending) {
                    Verdict::Restart { after } => prop_assert!(after >= FIRST_RESTART && after <= LAST_RESTART),
                    Verdict::Fail { retry_after } => prop_assert!(retry_after <= LAST_SELDOM_RETRY),
                }
            }
        }
    }
}
