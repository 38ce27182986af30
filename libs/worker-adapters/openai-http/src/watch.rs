//! When a replica is given tasks. Pure: times come in.
//!
//! A replica goes out at once when it is not there for a task, and after
//! [`BAD_CHECKS`] failed checks in a row. It comes back after as many good checks as it
//! has earned: one, and twice as many for every further time that it went out within
//! [`MEMORY`]. The pauses between failed checks grow.

use std::time::Duration;

use tokio::time::Instant;

const BAD_CHECKS: u32 = 2;
/// Between two checks of a replica that is well.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Between two good checks of one that is to come back.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
/// How long a suspect is given no task at the most, until it was checked.
const SUSPECTED: Duration = Duration::from_secs(2);
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LAST_PAUSE: Duration = Duration::from_secs(30);
/// After so long without going out, it is forgotten that a replica did.
const MEMORY: Duration = Duration::from_mins(5);
/// The most good checks that are wanted.
const GOOD_CHECKS_AT_MOST: u32 = 8;

/// What is known of one replica.
#[derive(Debug)]
pub(crate) struct Watch {
    up: bool,
    bad: u32,
    good: u32,
    falls: u32,
    last_fall: Option<Instant>,
    pause: Duration,
    next: Instant,
    rest_until: Option<Instant>,
    suspected_until: Option<Instant>,
    /// It gave no token in time: it has to generate one before it is relied on.
    doubted: bool,
    error: Option<String>,
}

impl Watch {
    /// One that was not asked yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            up: false,
            bad: 0,
            good: 0,
            falls: 0,
            last_fall: None,
            pause: FIRST_PAUSE,
            next: now,
            rest_until: None,
            suspected_until: None,
            doubted: false,
            error: None,
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up
    }

    /// Until when it is left alone: it said that it is busy, or is to be checked first.
    pub(crate) fn rests_until(&self, now: Instant) -> Option<Instant> {
        self.rest_until
            .max(self.suspected_until)
            .filter(|until| *until > now)
    }

    /// When it is to be checked.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Whether the check must see it generate a token.
    pub(crate) fn wants_probe(&self) -> bool {
        self.doubted
    }

    /// Why it is out, or was the last time.
    pub(crate) fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Takes in a check. Says whether the replica came back or went out.
    pub(crate) fn checked(&mut self, outcome: Result<(), String>, now: Instant) -> bool {
        self.suspected_until = None;
        match outcome {
            Ok(()) => self.is_well(now),
            Err(why) => {
                self.bad += 1;
                if self.up && self.bad < BAD_CHECKS {
                    self.error = Some(why);
                    self.next = now + self.pause;
                    return false;
                }
                self.goes_out(why, now)
            }
        }
    }

    fn is_well(&mut self, now: Instant) -> bool {
        self.bad = 0;
        self.pause = FIRST_PAUSE;
        self.doubted = false;
        if self.up {
            self.next = now + CHECK_EVERY;
            return false;
        }
        self.good += 1;
        self.forget(now);
        let wanted = 1u32 << self.falls.saturating_sub(1).min(8);
        if self.good < wanted.min(GOOD_CHECKS_AT_MOST) {
            self.next = now + CONFIRM_EVERY;
            return false;
        }
        self.up = true;
        self.rest_until = None;
        self.next = now + CHECK_EVERY;
        true
    }

    /// It was not there for a task. Says whether it went out by that.
    pub(crate) fn gone(&mut self, why: String, now: Instant) -> bool {
        self.goes_out(why, now)
    }

    /// It gave a task nothing in time.
    pub(crate) fn hung(&mut self, why: String, now: Instant) -> bool {
        self.doubted = true;
        self.goes_out(why, now)
    }

    /// It broke a task off: it is checked at once, before another task, and one failed
    /// check is enough.
    pub(crate) fn suspect(&mut self, why: String, now: Instant) {
        self.error = Some(why);
        if self.up {
            self.bad = self.bad.max(BAD_CHECKS - 1);
            self.next = now;
            self.suspected_until = Some(now + SUSPECTED);
        }
    }

    /// It said that it is busy.
    pub(crate) fn busy(&mut self, why: String, until: Instant) {
        self.error = Some(why);
        self.rest_until = self.rest_until.max(Some(until));
    }

    fn goes_out(&mut self, why: String, now: Instant) -> bool {
        self.error = Some(why);
        self.good = 0;
        self.next = now + self.pause;
        self.pause = (self.pause * 2).min(LAST_PAUSE);
        if !std::mem::take(&mut self.up) {
            return false;
        }
        self.forget(now);
        self.falls = self.falls.saturating_add(1);
        self.last_fall = Some(now);
        true
    }

    fn forget(&mut self, now: Instant) {
        if self.last_fall.is_some_and(|fall| now - fall > MEMORY) {
            self.falls = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bad() -> Result<(), String> {
        Err("down".to_owned())
    }

    #[test]
    fn one_good_check_is_enough_at_first_and_one_bad_one_is_forgiven() {
        let now = Instant::now();
        let mut watch = Watch::new(now);
        assert!(!watch.is_up() && watch.next() == now);
        assert!(watch.checked(Ok(()), now) && watch.is_up());
        assert!(!watch.checked(bad(), now) && watch.is_up());
        assert!(!watch.checked(Ok(()), now) && watch.is_up());
        assert!(!watch.checked(bad(), now));
        assert!(watch.checked(bad(), now) && !watch.is_up());
        assert_eq!(watch.error(), Some("down"));
    }

    #[test]
    fn who_flaps_has_to_prove_more() {
        let mut now = Instant::now();
        let mut watch = Watch::new(now);
        watch.checked(Ok(()), now);
        for wanted in [1, 2, 4, 8, 8] {
            assert!(watch.gone("gone".to_owned(), now));
            let mut checks = 0;
            while !watch.is_up() {
                checks += 1;
                watch.checked(Ok(()), now);
            }
            assert_eq!(checks, wanted);
        }
        now += MEMORY + Duration::from_secs(1);
        watch.gone("gone".to_owned(), now);
        assert!(watch.checked(Ok(()), now), "what is long past is forgotten");
    }

    #[test]
    fn pauses_grow_while_it_is_down() {
        let now = Instant::now();
        let mut watch = Watch::new(now);
        let mut last = Duration::ZERO;
        for _ in 0..12 {
            watch.checked(bad(), now);
            let pause = watch.next() - now;
            assert!(pause >= last && pause <= LAST_PAUSE);
            last = pause;
        }
        assert_eq!(last, LAST_PAUSE);
        watch.checked(Ok(()), now);
        watch.gone("gone".to_owned(), now);
        assert_eq!(watch.next() - now, FIRST_PAUSE);
    }

    #[test]
    fn a_hung_one_has_to_generate_a_token() {
        let now = Instant::now();
        let mut watch = Watch::new(now);
        watch.checked(Ok(()), now);
        assert!(watch.hung("no first token".to_owned(), now) && watch.wants_probe());
        watch.checked(bad(), now);
        assert!(watch.wants_probe());
        watch.checked(Ok(()), now);
        assert!(watch.is_up() && !watch.wants_probe());
    }

    #[test]
    fn a_suspect_goes_out_by_one_bad_check() {
        let now = Instant::now();
        let mut watch = Watch::new(now);
        watch.checked(Ok(()), now);
        watch.suspect("broke off".to_owned(), now);
        assert!(watch.is_up() && watch.next() == now);
        assert!(watch.rests_until(now).is_some(), "no task before the check");
        assert!(watch.checked(bad(), now));
        watch.checked(Ok(()), now);
        watch.suspect("broke off".to_owned(), now);
        watch.checked(Ok(()), now);
        assert!(watch.is_up() && watch.rests_until(now).is_none());
    }

    proptest! {
        #[test]
        fn it_always_comes_back(steps in prop::collection::vec(0u8..5, 0..200)) {
            let mut now = Instant::now();
            let mut watch = Watch::new(now);
            for step in steps {
                now += Duration::from_millis(700);
                match step {
                    0 => { watch.checked(Ok(()), now); }
                    1 => { watch.checked(bad(), now); }
                    2 => { watch.gone("gone".to_owned(), now); }
                    3 => { watch.hung("hung".to_owned(), now); }
                    _ => watch.suspect("broke".to_owned(), now),
                }
                prop_assert!(watch.next() <= now + LAST_PAUSE);
            }
            for _ in 0..GOOD_CHECKS_AT_MOST {
                watch.checked(Ok(()), now);
            }
            prop_assert!(watch.is_up());
        }
    }
}
