//! Takes what a provisioner reports, for one piece of work.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use provision_kit::progress::{ProgressEvent, Reporter};

/// How far it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reading {
    pub done: u64,
    pub total: Option<u64>,
    /// The last note.
    pub note: Option<String>,
}

/// Keeps the newest figures and passes every event on.
#[derive(Debug)]
pub struct Meter {
    // Held for a look or an update only, never across an await.
    reading: Mutex<Reading>,
    next: Arc<dyn Reporter>,
}

impl Meter {
    pub fn new(next: Arc<dyn Reporter>) -> Arc<Self> {
        Arc::new(Self {
            reading: Mutex::default(),
            next,
        })
    }

    pub fn reading(&self) -> Reading {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        // Nothing in between panics, so the figures are whole.
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reporter for Meter {
    fn report(&self, event: ProgressEvent) {
        match &event {
            ProgressEvent::Started { total, .. } => self.lock().total = *total,
            ProgressEvent::Advanced { done, total, .. } => {
                let mut reading = self.lock();
                reading.done = *done;
                reading.total = *total;
            }
            ProgressEvent::Note { text, .. } => self.lock().note = Some(text.clone()),
            ProgressEvent::Finished { .. } | ProgressEvent::Failed { .. } => {}
        }
        self.next.report(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use provision_kit::progress::{Silent, Step, StepKind, Unit};

    #[test]
    fn the_newest_figures_are_kept() {
        let meter = Meter::new(Arc::new(Silent));
        let reporter: Arc<dyn Reporter> = meter.clone();
        let mut step = Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, Some(9));
        assert_eq!(meter.reading().total, Some(9));
        step.set(3, Some(12));
        step.note("elsewhere");
        step.finish();
        let reading = meter.reading();
        assert_eq!((reading.done, reading.total), (3, Some(12)));
        assert_eq!(reading.note.as_deref(), Some("elsewhere"));
    }
}
