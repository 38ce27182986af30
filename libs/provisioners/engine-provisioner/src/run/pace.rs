//! When a loading engine is asked next whether it is ready.
//!
//! An engine writes a line about each step of its load, the last one when it is ready, so a line is
//! the sign to ask at once. One that writes nothing is asked by the clock: the longer it has loaded,
//! the longer it will not have mattered that it was asked a little late, and each question is work
//! for it, too.

use std::time::Duration;

/// The least time between two questions, however much an engine writes.
const LEAST_PAUSE: Duration = Duration::from_millis(3);
/// The longest.
pub(super) const MAX_PAUSE: Duration = Duration::from_millis(500);
/// A pause is this part of the load so far.
const SHARE: u32 = 64;

/// The pause before the next question to an engine that writes nothing, `loading` after its start.
fn pause(loading: Duration) -> Duration {
    (loading / SHARE).clamp(LEAST_PAUSE, MAX_PAUSE)
}

/// Waits until the engine is to be asked again, which was last asked `loading` after its start.
/// `said` ends when it has written a line.
pub(super) async fn until_next(loading: Duration, said: impl Future<Output = ()>) {
    tokio::time::sleep(LEAST_PAUSE).await;
    let rest = pause(loading).saturating_sub(LEAST_PAUSE);
    // A line or the time, whichever comes first.
    let _ = tokio::time::timeout(rest, said).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use tokio::time::Instant;

    /// How often an engine is asked that loads for so long and writes nothing.
    fn asked_during(load: Duration) -> usize {
        let mut now = Duration::ZERO;
        let mut asked = 0;
        while now < load {
            asked += 1;
            now += pause(now);
        }
        asked
    }

    #[test]
    fn a_silent_engine_is_asked_soon_and_not_often() {
        assert!(pause(Duration::from_millis(600)) < Duration::from_millis(10));
        assert!(asked_during(Duration::from_millis(400)) < 140);
        assert!(asked_during(Duration::from_secs(10)) < 400);
        // A load of an hour: about twice a second.
        assert!(asked_during(Duration::from_hours(1)) < 2 * 3_600 + 600);
    }

    #[tokio::test(start_paused = true)]
    async fn a_line_is_the_sign_to_ask_within_ten_milliseconds_however_long_the_load() {
        for loading in [
            Duration::ZERO,
            Duration::from_secs(1),
            Duration::from_hours(1),
        ] {
            let begun = Instant::now();
            until_next(loading, std::future::ready(())).await;
            assert!(begun.elapsed() < Duration::from_millis(10), "{loading:?}");
            assert!(begun.elapsed() >= LEAST_PAUSE);
        }
        let begun = Instant::now();
        until_next(Duration::from_hours(1), std::future::pending()).await;
        assert!(begun.elapsed() >= MAX_PAUSE);
    }

    proptest! {
        #[test]
        fn nobody_waits_longer_than_a_share_of_the_load(millis in 0u64..10_000_000) {
            let loading = Duration::from_millis(millis);
            let pause = pause(loading);
            prop_assert!(pause >= LEAST_PAUSE && pause <= MAX_PAUSE);
            prop_assert!(pause <= (loading / SHARE).max(LEAST_PAUSE));
        }
    }
}
