//! Long work that many may watch: how far it is, and how it ended.
//!
//! Whoever does the work publishes where it stands; a reader sees the newest
//! state, never a backlog, so any number of slow readers cost nothing.
//!
//! - [`meter`]: takes a provisioner's progress
//! - [`pace`]: how fast, and how long still
//! - [`stream`]: what a reader is sent

pub mod meter;
pub mod pace;
pub mod stream;

use std::time::{Duration, Instant};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use self::meter::Reading;
use self::pace::Pace;
use super::event_log::Failure;

/// How often progress is published, and so how often a reader is told of it.
pub const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Where long work stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkState {
    /// It waits for others of its kind.
    #[default]
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl WorkState {
    pub fn is_over(self) -> bool {
        !matches!(self, Self::Queued | Self::Running)
    }
}

/// Data of `event: progress`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub state: WorkState,
    /// Bytes that are done, those of an earlier attempt included.
    pub bytes: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_bytes: Option<u64>,
    /// Over the last seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
    /// What is left, in milliseconds, where the pace tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_ms: Option<u64>,
    /// The last thing worth saying: why a source was passed over, for example.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// Everything about a piece of work that changes.
#[derive(Debug, Clone)]
pub struct Standing<R> {
    /// Of the last change, as an SSE id: it grows with every one.
    pub event: u64,
    pub progress: Progress,
    pub ended_at: Option<Timestamp>,
    pub result: Option<R>,
    pub error: Option<Failure>,
    /// Nobody works on it any more although it is not over: the daemon ends.
    pub abandoned: bool,
}

/// A piece of work.
#[derive(Debug)]
pub struct Work<R> {
    pub created_at: Timestamp,
    standing: watch::Sender<Standing<R>>,
}

impl<R: Clone> Work<R> {
    /// `created_at` may lie in an earlier process: event ids go on from there.
    pub fn new(created_at: Timestamp) -> Self {
        let standing = Standing {
            event: age(created_at),
            progress: Progress::default(),
            ended_at: None,
            result: None,
            error: None,
            abandoned: false,
        };
        Self {
            created_at,
            standing: watch::Sender::new(standing),
        }
    }

    pub fn standing(&self) -> Standing<R> {
        self.standing.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Standing<R>> {
        self.standing.subscribe()
    }

    pub fn begin(&self) {
        self.change(|standing| standing.progress.state = WorkState::Running);
    }

    /// Publishes what a meter says, if that is new.
    pub fn advance(&self, reading: Reading, pace: &Pace) {
        let left = pace.left(reading.done, reading.total);
        let progress = Progress {
            state: WorkState::Running,
            bytes: reading.done,
            total_bytes: reading.total,
            bytes_per_second: pace.bytes_per_second(),
            estimated_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            note: reading.note,
        };
        if self.standing.borrow().progress != progress {
            self.change(|standing| standing.progress = progress);
        }
    }

    pub fn end(&self, outcome: Result<R, Failure>) {
        self.change(|standing| {
            standing.ended_at = Some(Timestamp::now());
            standing.progress.bytes_per_second = None;
            standing.progress.estimated_ms = None;
            match outcome {
                Ok(result) => {
                    standing.progress.state = WorkState::Done;
                    standing.result = Some(result);
                }
                Err(failure) => {
                    standing.progress.state = WorkState::Failed;
                    standing.error = Some(failure);
                }
            }
        });
    }

    pub fn cancel(&self) {
        self.change(|standing| {
            standing.ended_at = Some(Timestamp::now());
            standing.progress.state = WorkState::Cancelled;
            standing.progress.bytes_per_second = None;
            standing.progress.estimated_ms = None;
        });
    }

    /// Readers are let go; the work itself goes on in the next process.
    pub fn abandon(&self) {
        self.change(|standing| standing.abandoned = true);
    }

    /// What is over stays as it is.
    fn change(&self, change: impl FnOnce(&mut Standing<R>)) {
        self.standing.send_if_modified(|standing| {
            if standing.progress.state.is_over() {
                return false;
            }
            change(standing);
            standing.event = age(self.created_at).max(standing.event + 1);
            true
        });
    }
}

/// Milliseconds since then: ids grow although a restart forgets the last one.
fn age(since: Timestamp) -> u64 {
    let age = Timestamp::now().duration_since(since).as_millis();
    u64::try_from(age).unwrap_or(0).max(1)
}

/// Watches `work` with the meter's eyes until it is over.
pub async fn measured<R: Clone, T>(
    work: &Work<R>,
    meter: &meter::Meter,
    doing: impl Future<Output = T>,
) -> T {
    let mut doing = std::pin::pin!(doing);
    let mut tick = tokio::time::interval(PROGRESS_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut pace = Pace::default();
    loop {
        tokio::select! {
            done = &mut doing => {
                // So that what is shown at the end is all that was done.
                work.advance(meter.reading(), &pace);
                return done;
            }
            _ = tick.tick() => {
                let reading = meter.reading();
                pace.note(Instant::now(), reading.done);
                work.advance(reading, &pace);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_ids_grow_and_what_is_over_stays() {
        let work = Work::<u8>::new(Timestamp::now());
        let mut last = work.standing().event;
        let mut grown = || {
            let event = work.standing().event;
            std::mem::replace(&mut last, event) < event
        };
        work.begin();
        assert!(grown());
        let reading = Reading {
            done: 5,
            total: Some(10),
            note: None,
        };
        work.advance(reading.clone(), &Pace::default());
        assert!(grown());
        work.advance(reading, &Pace::default());
        assert!(!grown(), "nothing new is no event");
        work.end(Ok(7));
        assert!(grown());
        work.cancel();
        work.end(Err(Failure::internal("late")));
        work.advance(Reading::default(), &Pace::default());
        work.abandon();
        assert!(!grown());
        let end = work.standing();
        assert_eq!((end.progress.state, end.result), (WorkState::Done, Some(7)));
        assert_eq!(end.progress.bytes, 5);
        assert!(!end.abandoned && end.error.is_none());
    }

    #[test]
    fn ids_go_on_after_a_restart() {
        let hour_ago = Timestamp::now() - Duration::from_hours(1);
        let work = Work::<u8>::new(hour_ago);
        assert!(work.standing().event >= 3_600_000);
    }
}
