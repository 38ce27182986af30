//! Whether a loading engine gets anywhere.
//!
//! A large model on a slow disk takes as long as it takes; an engine that does nothing takes for
//! ever. So it is not the time that counts but the time without progress. The decision is pure: it
//! is given samples and the time, and neither asks the kernel nor a clock.
//!
//! | sign | counts |
//! |---|---|
//! | lines in its log | always |
//! | bytes read from files, memory grown | by at least [`BYTES`] |
//! | time on the CPU | by at least a tenth of the limit; for [`BUSY_LIMITS`] limits in a row at most, since a loop that never ends is busy, too |

use std::time::Duration;

/// Less than this, in bytes, comes of answering our own questions.
const BYTES: u64 = 256 * 1024;

/// How often the limit may pass while time on the CPU is the only sign: compiling kernels for a GPU
/// takes minutes and shows nothing else.
const BUSY_LIMITS: u32 = 5;

/// What can be seen of an engine, its children included. What the kernel does not tell is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sample {
    pub log_lines: u64,
    /// Bytes read by system calls.
    pub read_bytes: u64,
    /// Memory in use, in bytes: a mapped model's pages are in it once they were read.
    pub resident_bytes: u64,
    pub cpu_time: Duration,
}

/// Watches one load.
#[derive(Debug)]
pub(super) struct LoadWatch {
    limit: Duration,
    /// What each sign is measured from.
    mark: Sample,
    /// When something moved that only moves when work is done.
    moved_at: Duration,
    /// When it was last seen to be busy.
    busy_at: Duration,
}

impl LoadWatch {
    /// A load may go without progress for `limit`.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            mark: Sample::default(),
            moved_at: Duration::ZERO,
            busy_at: Duration::ZERO,
        }
    }

    /// Takes a sample, `now` after the load began; whether the load is stuck.
    pub(super) fn is_stuck(&mut self, now: Duration, sample: Sample) -> bool {
        if self.moves(sample) {
            self.moved_at = now;
        }
        // Counters of a child are gone with it: then they are measured from where they are.
        match sample.cpu_time.checked_sub(self.mark.cpu_time) {
            Some(used) if used < self.limit / 10 => {}
            used => {
                self.mark.cpu_time = sample.cpu_time;
                if used.is_some() {
                    self.busy_at = now;
                }
            }
        }
        let still = now.saturating_sub(self.moved_at);
        let idle = now.saturating_sub(self.moved_at.max(self.busy_at));
        idle >= self.limit || still >= self.limit * BUSY_LIMITS
    }

    /// Whether something moved that only moves when work is done.
    fn moves(&mut self, sample: Sample) -> bool {
        let mark = &mut self.mark;
        let mut moved = false;
        if sample.log_lines > mark.log_lines {
            mark.log_lines = sample.log_lines;
            moved = true;
        }
        if sample.read_bytes < mark.read_bytes {
            mark.read_bytes = sample.read_bytes;
        } else if sample.read_bytes - mark.read_bytes >= BYTES {
            mark.read_bytes = sample.read_bytes;
            moved = true;
        }
        // Memory that shrinks and grows again is no progress: the largest counts.
        if sample.resident_bytes >= mark.resident_bytes.saturating_add(BYTES) {
            mark.resident_bytes = sample.resident_bytes;
            moved = true;
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMIT: Duration = Duration::from_secs(100);

    /// Feeds a sample each second; when it was found stuck, in seconds.
    fn stuck_after(seconds: u64, sample_at: impl Fn(u64) -> Sample) -> Option<u64> {
        let mut watch = LoadWatch::new(LIMIT);
        (0..seconds).find(|&second| watch.is_stuck(Duration::from_secs(second), sample_at(second)))
    }

    #[test]
    fn one_that_does_nothing_is_stuck_after_the_limit() {
        assert_eq!(stuck_after(500, |_| Sample::default()), Some(100));
        // Stopped after a while.
        let stopped = |second: u64| Sample {
            read_bytes: second.min(60) * 10_000_000,
            cpu_time: Duration::from_secs(second.min(60)),
            resident_bytes: 5_000_000_000,
            ..Sample::default()
        };
        assert_eq!(stuck_after(500, stopped), Some(160));
    }

    #[test]
    fn answering_our_questions_is_no_progress() {
        let answering = |second: u64| Sample {
            read_bytes: second * 200,
            resident_bytes: 100_000_000 + second % 7 * 4096,
            cpu_time: Duration::from_millis(second * 5),
            ..Sample::default()
        };
        assert_eq!(stuck_after(500, answering), Some(100));
    }

    #[test]
    fn each_sign_alone_keeps_a_slow_load_going() {
        let signs: [fn(u64) -> Sample; 3] = [
            |second| Sample {
                log_lines: second / 90,
                ..Sample::default()
            },
            |second| Sample {
                read_bytes: second * 10_000,
                ..Sample::default()
            },
            |second| Sample {
                resident_bytes: second * 10_000,
                ..Sample::default()
            },
        ];
        for sign in signs {
            assert_eq!(stuck_after(10_000, sign), None);
        }
    }

    #[test]
    fn one_that_is_only_busy_gets_longer_but_not_for_ever() {
        let busy = |second: u64| Sample {
            cpu_time: Duration::from_secs(second),
            ..Sample::default()
        };
        assert_eq!(stuck_after(10_000, busy), Some(500));
        let compiles_then_loads = |second: u64| Sample {
            read_bytes: second.saturating_sub(300) * 1_000_000,
            ..busy(second)
        };
        assert_eq!(stuck_after(10_000, compiles_then_loads), None);
    }

    #[test]
    fn a_child_that_ends_takes_its_counters_along() {
        let sample = |second: u64| Sample {
            read_bytes: if second < 50 {
                5_000_000_000
            } else {
                second * 10_000
            },
            cpu_time: Duration::from_secs(if second < 50 { 900 } else { 0 }),
            ..Sample::default()
        };
        assert_eq!(stuck_after(2_000, sample), None);
    }

    proptest! {
        /// Whatever the samples: never before the limit, and at the limit when nothing moves.
        #[test]
        fn the_limit_is_kept(
            samples in prop::collection::vec((0u64..40, 0u64..1_000_000, 0u64..1_000_000, 0u64..50), 1..80),
        ) {
            let mut watch = LoadWatch::new(LIMIT);
            let mut now = Duration::ZERO;
            let mut last = Sample::default();
            for (pause, read, resident, cpu) in samples {
                now += Duration::from_secs(pause);
                last = Sample {
                    log_lines: last.log_lines,
                    read_bytes: last.read_bytes + read,
                    resident_bytes: resident,
                    cpu_time: last.cpu_time + Duration::from_secs(cpu),
                };
                if watch.is_stuck(now, last) {
                    prop_assert!(now >= LIMIT);
                }
            }
            prop_assert!(watch.is_stuck(now + LIMIT, last) || watch.is_stuck(now + LIMIT * 2, last));
        }
    }
}
