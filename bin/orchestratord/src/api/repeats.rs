//! Errors that come again and again, told once in a while: a client that asks a
//! pool without an engine in a loop must not fill the log.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use llama_orch_types::ErrorCode;

/// Of the same pool and code, one within this time is told.
const EVERY: Duration = Duration::from_secs(10);

/// How long a pool that gives no errors any more is remembered.
const REMEMBERED: Duration = Duration::from_mins(10);

/// What was told last.
#[derive(Debug)]
struct Told {
    at: Instant,
    /// How many came since and were not told.
    kept_back: u64,
}

/// What is told of each pool and code. There are as many as pools that answer with
/// errors at a time.
#[derive(Debug, Default)]
pub struct Repeats {
    // Held for a look-up or an insertion only, never across an await.
    told: Mutex<HashMap<(Option<String>, ErrorCode), Told>>,
}

impl Repeats {
    /// Whether an error is to be told: the first, and then one in a while, with
    /// the number of those since the last that were not told.
    pub fn tell(&self, pool: Option<&str>, code: ErrorCode, now: Instant) -> Option<u64> {
        // Map operations do not panic half-way, so the map is whole.
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (pool.map(str::to_owned), code);
        let since = |last: &Told| now.saturating_duration_since(last.at);
        if let Some(last) = told.get_mut(&key) {
            if since(last) < EVERY {
                last.kept_back += 1;
                return None;
            }
            last.at = now;
            return Some(std::mem::take(&mut last.kept_back));
        }
        // Pools come and go.
        told.retain(|_, last| since(last) < REMEMBERED);
        let first = Told {
            at: now,
            kept_back: 0,
        };
        told.insert(key, first);
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_each_is_told_and_then_one_in_a_while_with_a_count() {
        let (repeats, now) = (Repeats::default(), Instant::now());
        let tell = |pool, after| repeats.tell(Some(pool), ErrorCode::PoolUnready, now + after);
        assert_eq!(tell("a", Duration::ZERO), Some(0));
        for _ in 0..1000 {
            assert_eq!(tell("a", EVERY / 2), None);
        }
        assert_eq!(tell("b", EVERY / 2), Some(0), "another pool");
        let other = repeats.tell(Some("a"), ErrorCode::PoolUnavailable, now);
        assert_eq!(other, Some(0), "another reason");
        assert_eq!(tell("a", EVERY), Some(1000));
        assert_eq!(tell("a", EVERY), None, "counted afresh");
        assert_eq!(tell("a", EVERY * 3), Some(1));
    }
}
