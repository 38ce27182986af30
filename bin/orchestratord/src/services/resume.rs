//! What a task that lost its engine takes along to the next one. Pure.
//!
//! The next engine goes on from the text that was sent, not from token ids: an
//! engine holds back a token that is half a character or may be the beginning of
//! a stop text, so what was sent ends at a place that both can begin from. What
//! was held back is generated again.

use std::time::{Duration, Instant};

/// How often a task is gone on with after an engine that failed. One that ends
/// engines must not do it for ever.
pub const MAX_RESUMES: u32 = 3;

/// What was done on engines that were lost.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Carried {
    /// How many engines it lost in mid-stream.
    pub resets: u32,
    /// How many of them failed over it. The others were replaced, which is no fault
    /// of the task.
    failed: u32,
    /// Pieces that were sent.
    pub pieces: u64,
    /// Tokens that those pieces took.
    pub tokens_out: u64,
    /// Time that was spent on generating them.
    pub decode: Duration,
}

/// How a task lost its engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The engine failed.
    Failed,
    /// Another engine was put in its place.
    Replaced,
}

/// What one run has seen of its engine's work.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seen {
    pub pieces: u64,
    pub tokens_out: u64,
    pub decode: Duration,
    first: Option<Instant>,
}

impl Seen {
    /// A piece came, with so many tokens so far.
    pub fn saw(&mut self, tokens_out: u64, now: Instant) {
        let first = *self.first.get_or_insert(now);
        self.pieces += 1;
        self.tokens_out = tokens_out;
        self.decode = now.saturating_duration_since(first);
    }
}

impl Carried {
    /// Whether the task may be gone on with once more.
    pub fn may_resume(self, loss: Loss) -> bool {
        loss == Loss::Replaced || self.failed < MAX_RESUMES
    }

    /// With what the run that has just lost its engine had done.
    #[must_use]
    pub fn after(self, seen: Seen, loss: Loss) -> Self {
        Self {
            resets: self.resets + 1,
            failed: self.failed + u32::from(loss == Loss::Failed),
            pieces: self.pieces + seen.pieces,
            tokens_out: self.tokens_out + seen.tokens_out,
            decode: self.decode + seen.decode,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_adds_up_and_ends_after_three_engines() {
        let (now, mut seen) = (Instant::now(), Seen::default());
        seen.saw(1, now);
        seen.saw(3, now + Duration::from_secs(1));
        let mut carried = Carried::default();
        for _ in 0..MAX_RESUMES {
            assert!(carried.may_resume(Loss::Failed));
            carried = carried.after(seen, Loss::Failed);
        }
        assert!(!carried.may_resume(Loss::Failed));
        assert_eq!((carried.pieces, carried.tokens_out), (6, 9));
        assert_eq!(carried.decode, Duration::from_secs(3));
    }

    #[test]
    fn engines_that_were_replaced_are_told_of_and_not_held_against_the_task() {
        let mut carried = Carried::default();
        for _ in 0..2 * MAX_RESUMES {
            assert!(carried.may_resume(Loss::Replaced));
            carried = carried.after(Seen::default(), Loss::Replaced);
        }
        assert_eq!(carried.resets, 2 * MAX_RESUMES);
        for _ in 0..MAX_RESUMES {
            assert!(carried.may_resume(Loss::Failed));
            carried = carried.after(Seen::default(), Loss::Failed);
        }
        assert!(!carried.may_resume(Loss::Failed));
        assert!(carried.may_resume(Loss::Replaced));
    }
}
