//! How fast bytes come, over the last seconds: pure.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back the pace looks.
const WINDOW: Duration = Duration::from_secs(10);

/// Below this no pace is told: it would be noise.
const LEAST: Duration = Duration::from_millis(500);

/// Samples of what was done when, the oldest first.
#[derive(Debug, Default)]
pub struct Pace(VecDeque<(Instant, u64)>);

impl Pace {
    /// Takes a sample. What is there when counting begins was done before: a
    /// resumed download starts above zero and tells no pace by that.
    pub fn note(&mut self, now: Instant, done: u64) {
        if done == 0 || self.0.back().is_some_and(|(_, before)| *before > done) {
            self.0.clear();
        }
        if done == 0 {
            return;
        }
        self.0.push_back((now, done));
        // One older than the window stays, so that the window is covered.
        while self.0.len() > 2 && now.duration_since(self.0[1].0) >= WINDOW {
            self.0.pop_front();
        }
    }

    pub fn bytes_per_second(&self) -> Option<u64> {
        let ((begin, first), (end, last)) = (self.0.front()?, self.0.back()?);
        let took = end.duration_since(*begin);
        (took >= LEAST).then(|| ((last - first) as f64 / took.as_secs_f64()) as u64)
    }

    /// How long the rest takes at this pace.
    pub fn left(&self, done: u64, total: Option<u64>) -> Option<Duration> {
        let pace = self.bytes_per_second().filter(|pace| *pace > 0)?;
        let rest = total?.saturating_sub(done);
        Some(Duration::from_secs_f64(rest as f64 / pace as f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_resumed_download_is_not_fast_for_what_it_had() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let at = |ms| begin + Duration::from_millis(ms);
        pace.note(at(0), 0);
        pace.note(at(250), 1_000_000);
        assert_eq!(pace.bytes_per_second(), None);
        pace.note(at(1250), 1_002_000);
        assert_eq!(pace.bytes_per_second(), Some(2000));
        let left = pace.left(1_002_000, Some(1_012_000));
        assert_eq!(left, Some(Duration::from_secs(5)));
        assert_eq!(pace.left(0, None), None);
        // A source that has to be read from its beginning again.
        pace.note(at(1500), 10);
        assert_eq!(pace.bytes_per_second(), None);
    }

    #[test]
    fn only_the_last_seconds_count() {
        let (mut pace, begin) = (Pace::default(), Instant::now());
        let mut done = 1;
        for second in 0..120 {
            done += if second < 60 { 1000 } else { 10 };
            pace.note(begin + Duration::from_secs(second), done);
        }
        assert_eq!(pace.bytes_per_second(), Some(10));
        assert!(pace.0.len() <= 12, "{}", pace.0.len());
    }

    proptest! {
        #[test]
        fn no_order_of_samples_breaks_it(samples in prop::collection::vec((0u64..5000, any::<u64>()), 0..60)) {
            let (mut pace, mut now) = (Pace::default(), Instant::now());
            for (later, done) in samples {
                now += Duration::from_millis(later);
                pace.note(now, done);
                let _ = pace.left(done, Some(u64::MAX));
            }
        }
    }
}
