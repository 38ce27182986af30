//! Waiting until the engine has let go of a cancelled task.
//!
//! The engine sees its client gone when it has something to send: between two
//! tokens, or, if it tells of its progress, between two batches of the prompt.
//! Otherwise it looks for its client only after a second without any other
//! request, so that looking at its slots more often would keep it from it.

use std::time::Duration;

use llama_orch_types::TaskId;
use tokio::time::{Instant, sleep_until};
use worker_adapters_adapter_api::{CancelReport, WorkerError};

use crate::client::EngineClient;
use crate::live::{Handle, LiveTasks};
use crate::tagging::Tagging;
use crate::wire::SlotAnswer;

/// How long to wait at least. An engine that was slow before gets more.
const DECODING_BOUND: Duration = Duration::from_secs(2);
const PROMPT_BOUND: Duration = Duration::from_secs(6);
/// What it gets, in times its longest pause between two events: the rest of a
/// batch, and one more if the cancel came a moment too late for the next.
const GAPS: u32 = 4;
const LONGEST_BOUND: Duration = Duration::from_mins(5);

/// The engine's quiet second, and a little more.
const QUIET: Duration = Duration::from_millis(1020);
const QUIET_PAUSE: Duration = Duration::from_millis(1100);

/// When to look at the engine's slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Looks {
    /// Soon, and then less and less often: it decodes.
    Soon,
    /// One look after the other: it answers them between two batches.
    Steadily,
    /// After its quiet second, for which its batches leave time, and then steadily.
    QuietlyFirst,
    /// Only ever after a quiet second.
    Quietly,
}

impl Looks {
    pub(crate) fn at(handle: &Handle) -> Self {
        if handle.is_decoding() {
            Self::Soon
        } else if !handle.is_telling() {
            Self::Quietly
        } else if handle.batch() < QUIET {
            Self::Steadily
        } else {
            Self::QuietlyFirst
        }
    }

    pub(crate) fn first(self) -> Duration {
        match self {
            Self::Soon => Duration::from_millis(3),
            Self::Steadily => Duration::from_millis(10),
            Self::QuietlyFirst | Self::Quietly => QUIET,
        }
    }

    /// The pause after a look so long after the cancel.
    pub(crate) fn pause(self, elapsed: Duration) -> Duration {
        match self {
            // At 3, 5, 7, … ms; from 16 ms on each an eighth later.
            Self::Soon => (elapsed / 8).max(Duration::from_millis(2)),
            Self::Steadily | Self::QuietlyFirst => Duration::from_millis(15),
            Self::Quietly => QUIET_PAUSE,
        }
    }
}

fn bound(handle: &Handle) -> Duration {
    let (gap, least) = if handle.is_decoding() {
        (handle.longest_gap(), DECODING_BOUND)
    } else {
        (handle.batch(), PROMPT_BOUND)
    };
    gap.saturating_mul(GAPS).clamp(least, LONGEST_BOUND)
}

/// Waits, with a bound, until the task's slot is free. An engine that is not
/// there any more holds no slot.
pub(crate) async fn wait_until_freed(
    client: &EngineClient,
    live: &LiveTasks,
    tagged: bool,
    task: TaskId,
    handle: &Handle,
) -> CancelReport {
    let (cancelled, begun) = (handle.cancelled_at(), Instant::now());
    let (looks, bound) = (Looks::at(handle), bound(handle));
    let since_cancel = || cancelled.elapsed().as_millis() as u64;
    let mut look = looks.first();
    loop {
        sleep_until(begun + look).await;
        match busy(client, live, tagged, task, handle, begun + bound).await {
            Ok(false) | Err(WorkerError::Unreachable { .. }) => {
                live.forget(task);
                return CancelReport::Freed {
                    after_ms: since_cancel(),
                };
            }
            Ok(true) => {}
            // This engine was told not to show its slots.
            Err(WorkerError::InvalidParams { .. }) => return CancelReport::NotShown,
            Err(error) => tracing::debug!(%error, %task, "the engine's slots cannot be seen"),
        }
        let elapsed = begun.elapsed().max(look);
        if elapsed >= bound {
            break;
        }
        // The last look is at the bound.
        look = (elapsed + looks.pause(elapsed)).min(bound);
    }
    live.linger(task, handle);
    CancelReport::NotSeenFree {
        waited_ms: since_cancel(),
    }
}

/// Whether the task's slot is busy. Where the engine does not show which one it
/// is, as long as more slots are busy than tasks other than this one run.
async fn busy(
    client: &EngineClient,
    live: &LiveTasks,
    tagged: bool,
    task: TaskId,
    handle: &Handle,
    deadline: Instant,
) -> Result<bool, WorkerError> {
    let limit = (deadline - Instant::now()).max(Duration::from_millis(100));
    let slots: Vec<SlotAnswer> = client.get_within("/slots", limit).await?;
    let mut busy = slots.iter().filter(|slot| slot.is_processing);
    Ok(if tagged {
        busy.any(|slot| Tagging::shows(slot, handle.tag()))
    } else {
        busy.count() > live.others_in_slots(task)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_is_looked_at_as_it_can_bear() {
        let handle = Handle::default();
        assert_eq!(Looks::at(&handle), Looks::Quietly);
        handle.set_telling();
        handle.expect_batch(Duration::from_secs(5));
        handle.set_longest_gap(Duration::from_millis(4));
        assert_eq!(
            Looks::at(&handle),
            Looks::QuietlyFirst,
            "no batch was seen yet"
        );
        assert_eq!(bound(&handle), Duration::from_secs(20));
        handle.set_longest_gap(Duration::from_millis(400));
        handle.set_several_events();
        assert_eq!(Looks::at(&handle), Looks::Steadily);
        assert_eq!(bound(&handle), PROMPT_BOUND);
        handle.set_longest_gap(Duration::from_secs(3));
        assert_eq!(Looks::at(&handle), Looks::QuietlyFirst);
        assert_eq!(bound(&handle), Duration::from_secs(12));
        handle.set_decoding();
        assert_eq!(Looks::at(&handle), Looks::Soon);
    }
}
