//! Progress, reported and never printed.
//!
//! A library starts a [`Step`] and moves it along; whoever drives the library
//! passes a [`Reporter`] and decides what becomes of it: bars on a terminal,
//! lines in a log, `preparation.steps` in an API answer, a list in a test.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// Which stage of making a pool ready a step belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepKind {
    EngineProvision,
    ModelFetch,
    PoolWarmup,
}

/// What a step's figures count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    Bytes,
    /// Steps of a build, as the build tool counts them.
    BuildSteps,
    /// Nothing is counted; the step only starts and ends.
    None,
}

/// Tells one step from all others of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StepId(u64);

/// Something that happened to a step.
#[derive(Debug, Clone, PartialEq)]
pub enum ProgressEvent {
    Started {
        id: StepId,
        kind: StepKind,
        /// For people: "building llama-server b11434".
        description: String,
        unit: Unit,
        total: Option<u64>,
    },
    /// `done` of `total`; a total may become known, or change, on the way.
    Advanced {
        id: StepId,
        done: u64,
        total: Option<u64>,
    },
    /// One line worth showing, for example why a source was passed over.
    Note {
        id: StepId,
        text: String,
    },
    Finished {
        id: StepId,
    },
    Failed {
        id: StepId,
        reason: String,
    },
}

/// Takes progress. Called from any thread and often: it must be quick and
/// must not block.
pub trait Reporter: Debug + Send + Sync {
    fn report(&self, event: ProgressEvent);
}

/// Takes progress and drops it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn report(&self, _: ProgressEvent) {}
}

/// A running step. A step that is dropped before [`Step::finish`] counts as
/// failed: an early `?` never leaves a bar standing.
#[derive(Debug)]
pub struct Step {
    id: StepId,
    reporter: Arc<dyn Reporter>,
    done: u64,
    total: Option<u64>,
    settled: bool,
}

impl Step {
    pub fn start(
        reporter: &Arc<dyn Reporter>,
        kind: StepKind,
        description: impl Into<String>,
        unit: Unit,
        total: Option<u64>,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let id = StepId(NEXT.fetch_add(1, Ordering::Relaxed));
        reporter.report(ProgressEvent::Started {
            id,
            kind,
            description: description.into(),
            unit,
            total,
        });
        Self {
            id,
            reporter: Arc::clone(reporter),
            done: 0,
            total,
            settled: false,
        }
    }

    /// Adds to what is done.
    pub fn advance(&mut self, by: u64) {
        self.set(self.done.saturating_add(by), self.total);
    }

    /// Says what is done, and of how much.
    pub fn set(&mut self, done: u64, total: Option<u64>) {
        self.done = done;
        self.total = total;
        self.reporter.report(ProgressEvent::Advanced {
            id: self.id,
            done,
            total,
        });
    }

    pub fn note(&self, text: impl Into<String>) {
        self.reporter.report(ProgressEvent::Note {
            id: self.id,
            text: text.into(),
        });
    }

    pub fn finish(mut self) {
        self.settled = true;
        self.reporter
            .report(ProgressEvent::Finished { id: self.id });
    }

    pub fn fail(mut self, reason: impl Into<String>) {
        self.settled = true;
        self.reporter.report(ProgressEvent::Failed {
            id: self.id,
            reason: reason.into(),
        });
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.settled {
            self.reporter.report(ProgressEvent::Failed {
                id: self.id,
                reason: "given up".to_owned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct Recorder(Mutex<Vec<ProgressEvent>>);

    impl Reporter for Recorder {
        fn report(&self, event: ProgressEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[test]
    fn a_dropped_step_has_failed_and_a_finished_one_has_not() {
        let recorder = Arc::new(Recorder::default());
        let reporter: Arc<dyn Reporter> = recorder.clone();
        let start = || Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, Some(2));
        let mut step = start();
        step.advance(2);
        step.finish();
        drop(start());
        let events = recorder.0.lock().unwrap();
        assert!(matches!(
            events[1],
            ProgressEvent::Advanced {
                done: 2,
                total: Some(2),
                ..
            }
        ));
        assert!(matches!(events[2], ProgressEvent::Finished { .. }));
        assert!(matches!(events[4], ProgressEvent::Failed { .. }));
        assert_eq!(events.len(), 5);
    }
}
