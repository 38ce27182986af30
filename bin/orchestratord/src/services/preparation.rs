//! What is being made ready, for whoever asks while it is going on.
//!
//! The provisioners report steps; this board keeps the ones that are under way
//! and passes every event on to the terminal.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use provision_kit::progress::{ProgressEvent, Reporter, StepId, StepKind, Unit};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::estimates::remaining;

/// A guess for a step that has not shown its pace yet.
const GUESS: Duration = Duration::from_secs(5);

/// One thing that must happen before a pool takes tasks to its engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PreparationStep {
    /// `engine_provision`, `model_fetch` or `pool_warmup`.
    #[schema(value_type = String)]
    pub kind: StepKind,
    /// For people.
    pub description: String,
    /// From 0 to 1, where it is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<f64>,
    /// What is left, in milliseconds, where the pace so far tells.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_ms: Option<u64>,
}

#[derive(Debug)]
struct Running {
    kind: StepKind,
    description: String,
    unit: Unit,
    started: Instant,
    /// What was done when counting began: a resumed download or build starts
    /// above zero, and only the rest tells the pace.
    first: Option<(u64, Instant)>,
    done: u64,
    total: Option<u64>,
}

/// One pool's steps under way.
#[derive(Debug)]
pub struct PreparationBoard {
    // Held for a look or an update only, never across an await.
    running: Mutex<BTreeMap<StepId, Running>>,
    next: Arc<dyn Reporter>,
}

impl PreparationBoard {
    /// Keeps steps and passes every event on to `next`.
    pub fn new(next: Arc<dyn Reporter>) -> Arc<Self> {
        Arc::new(Self {
            running: Mutex::default(),
            next,
        })
    }

    /// The steps under way, in the order they began.
    pub fn steps(&self) -> Vec<PreparationStep> {
        let running = self.lock();
        running
            .values()
            .map(|step| PreparationStep {
                kind: step.kind,
                description: step.description.clone(),
                progress: step
                    .total
                    .filter(|total| *total > 0 && step.unit != Unit::None)
                    .map(|total| (step.done as f64 / total as f64).min(1.0)),
                estimated_ms: step.left().map(|left| left.as_millis() as u64),
            })
            .collect()
    }

    /// What is left of the longest step under way; a short guess where none
    /// is under way, since the next is about to begin.
    pub fn remaining(&self) -> Duration {
        let running = self.lock();
        let left = running.values().map(|step| step.left().unwrap_or(GUESS));
        left.max().unwrap_or(GUESS)
    }

    /// As [`Self::remaining`], but nothing where no step is under way.
    pub fn known_remaining(&self) -> Duration {
        let running = self.lock();
        let left = running.values().map(|step| step.left().unwrap_or(GUESS));
        left.max().unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StepId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(&self, event: &ProgressEvent) {
        let mut running = self.lock();
        match event {
            ProgressEvent::Started {
                id,
                kind,
                description,
                unit,
                total,
            } => {
                let step = Running {
                    kind: *kind,
                    description: description.clone(),
                    unit: *unit,
                    started: Instant::now(),
                    first: None,
                    done: 0,
                    total: *total,
                };
                running.insert(*id, step);
            }
            ProgressEvent::Advanced { id, done, total } => {
                if let Some(step) = running.get_mut(id) {
                    step.first.get_or_insert((*done, step.started));
                    step.done = *done;
                    step.total = *total;
                }
            }
            ProgressEvent::Note { .. } => {}
            ProgressEvent::Finished { id } | ProgressEvent::Failed { id, .. } => {
                running.remove(id);
            }
        }
    }
}

impl Running {
    fn left(&self) -> Option<Duration> {
        let (first, since) = self.first?;
        let total = self.total?;
        remaining(
            self.done.saturating_sub(first),
            total.saturating_sub(first),
            since.elapsed(),
        )
    }
}

impl Reporter for PreparationBoard {
    fn report(&self, event: ProgressEvent) {
        self.keep(&event);
        self.next.report(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use provision_kit::progress::{Silent, Step};

    #[test]
    fn the_board_shows_what_is_under_way_and_nothing_else() {
        let board = PreparationBoard::new(Arc::new(Silent));
        let reporter: Arc<dyn Reporter> = board.clone();
        let mut fetch = Step::start(
            &reporter,
            StepKind::ModelFetch,
            "fetching",
            Unit::Bytes,
            Some(200),
        );
        fetch.advance(50);
        let build = Step::start(
            &reporter,
            StepKind::EngineProvision,
            "building",
            Unit::BuildSteps,
            None,
        );
        let steps = board.steps();
        assert_eq!(steps.len(), 2);
        assert_eq!(steps[0].progress, Some(0.25));
        assert_eq!(steps[1].progress, None);
        fetch.finish();
        drop(build);
        assert!(board.steps().is_empty());
    }
}
