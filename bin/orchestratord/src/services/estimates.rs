//! When will it start? Answers from measured service times; pure.

use std::time::Duration;

/// Assumed until the first task has been measured.
const FIRST_GUESS: Duration = Duration::from_secs(2);

/// Weight of the newest measurement in the running mean.
const NEWEST_WEIGHT: f64 = 0.2;

/// Shortest and longest `Retry-After` that is ever given. Below, clients would
/// hammer; above, they would give up on a guess.
const RETRY_RANGE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_mins(10));

/// How long tasks of one pool take in the engine.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServiceTimes {
    mean_seconds: Option<f64>,
    measured: u64,
}

/// What a pool looks like to somebody who asks when a task would start.
#[derive(Debug, Clone, Copy)]
pub struct Outlook {
    /// Tasks that go first.
    pub ahead: usize,
    pub running: usize,
    pub slots: usize,
    /// What is left of making the pool ready; zero if it is.
    pub preparation: Duration,
}

impl ServiceTimes {
    pub fn record(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.mean_seconds = Some(match self.mean_seconds {
            None => seconds,
            Some(mean) => mean + NEWEST_WEIGHT * (seconds - mean),
        });
        self.measured += 1;
    }

    /// The running mean, or a first guess.
    pub fn mean(&self) -> Duration {
        self.mean_seconds
            .map_or(FIRST_GUESS, Duration::from_secs_f64)
    }

    /// The running mean, once something was measured.
    pub fn measured_mean(&self) -> Option<Duration> {
        self.mean_seconds.map(Duration::from_secs_f64)
    }

    /// How many tasks the mean rests on.
    pub fn measured(&self) -> u64 {
        self.measured
    }

    /// Time until a task with this outlook starts. A task that finds a free
    /// slot starts at once. Otherwise slots come free one after another, one
    /// every mean ÷ slots; the first running task is on average half done.
    pub fn until_start(&self, outlook: Outlook) -> Duration {
        let slots = outlook.slots.max(1);
        let free = slots.saturating_sub(outlook.running);
        let wait = if outlook.ahead < free {
            Duration::ZERO
        } else {
            let turns = outlook.ahead - free;
            self.mean().mul_f64((turns as f64 + 0.5) / slots as f64)
        };
        outlook.preparation + wait
    }

    /// When a client that was refused for a full queue should come back: when
    /// a place is likely to be free.
    pub fn retry_after(&self, outlook: Outlook) -> Duration {
        let slots = outlook.slots.max(1) as f64;
        (outlook.preparation + self.mean().mul_f64(1.0 / slots)).clamp(RETRY_RANGE.0, RETRY_RANGE.1)
    }
}

/// Where the loading of an engine stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loading {
    /// It begins after so long.
    After(Duration),
    /// It goes on for so long.
    Begun(Duration),
}

impl Loading {
    /// How long until the engine is ready, by the mean of the pool's loads so far.
    /// Before the first, `guess`, which is for all that is left.
    pub fn until_ready(self, measured: Option<Duration>, guess: Duration) -> Duration {
        match (self, measured) {
            (Self::After(wait), Some(mean)) => wait + mean,
            (Self::After(wait), None) => guess.max(wait),
            // One that takes longer than they did is as likely to take as long again.
            (Self::Begun(elapsed), Some(mean)) => mean.abs_diff(elapsed).max(mean / 10),
            (Self::Begun(_), None) => guess,
        }
    }
}

/// What is left of a counted step, judged by its pace so far.
pub fn remaining(done: u64, total: u64, elapsed: Duration) -> Option<Duration> {
    if done == 0 || total == 0 {
        return None;
    }
    let left = total.saturating_sub(done) as f64 / done as f64;
    Some(elapsed.mul_f64(left.min(1e6)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outlook(ahead: usize, running: usize, slots: usize) -> Outlook {
        Outlook {
            ahead,
            running,
            slots,
            preparation: Duration::ZERO,
        }
    }

    #[test]
    fn a_free_slot_means_now() {
        let times = ServiceTimes::default();
        assert_eq!(times.until_start(outlook(0, 0, 1)), Duration::ZERO);
        assert_eq!(times.until_start(outlook(1, 1, 4)), Duration::ZERO);
        assert!(times.until_start(outlook(1, 3, 4)) > Duration::ZERO);
    }

    #[test]
    fn a_step_half_done_takes_as_long_again() {
        let minute = Duration::from_mins(1);
        assert_eq!(remaining(50, 100, minute), Some(minute));
        assert_eq!(remaining(0, 100, minute), None);
        assert_eq!(remaining(100, 100, minute), Some(Duration::ZERO));
    }

    #[test]
    fn a_load_is_judged_by_those_before_it() {
        let seconds = Duration::from_secs;
        let guess = seconds(5);
        let mean = Some(seconds(20));
        assert_eq!(
            Loading::After(seconds(3)).until_ready(mean, guess),
            seconds(23)
        );
        assert_eq!(Loading::After(seconds(3)).until_ready(None, guess), guess);
        assert_eq!(
            Loading::After(seconds(9)).until_ready(None, guess),
            seconds(9)
        );
        let begun = |elapsed| Loading::Begun(seconds(elapsed)).until_ready(mean, guess);
        assert_eq!(begun(5), seconds(15));
        assert_eq!(
            begun(20),
            seconds(2),
            "never said to be over while it is not"
        );
        assert_eq!(begun(60), seconds(40));
        assert_eq!(Loading::Begun(seconds(60)).until_ready(None, guess), guess);
    }

    proptest! {
        #[test]
        fn a_longer_queue_never_starts_sooner(
            ahead in 0usize..10_000, running in 0usize..16, slots in 1usize..16, seconds in 0.001f64..600.0,
        ) {
            let mut times = ServiceTimes::default();
            times.record(Duration::from_secs_f64(seconds));
            let here = times.until_start(outlook(ahead, running, slots));
            let behind = times.until_start(outlook(ahead + 1, running, slots));
            prop_assert!(behind >= here);
        }

        #[test]
        fn the_mean_stays_among_what_was_measured(all in prop::collection::vec(0.001f64..100.0, 1..50)) {
            let mut times = ServiceTimes::default();
            for seconds in &all {
                times.record(Duration::from_secs_f64(*seconds));
            }
            let mean = times.mean().as_secs_f64();
            let low = all.iter().copied().fold(f64::INFINITY, f64::min);
            let high = all.iter().copied().fold(0.0, f64::max);
            prop_assert!(mean >= low - 1e-6 && mean <= high + 1e-6);
            prop_assert_eq!(times.measured(), all.len() as u64);
        }
    }
}
