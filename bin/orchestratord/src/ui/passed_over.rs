//! Why modes of providing an engine were passed over, said where it matters: not
//! where a later mode had the engine already, which is the rule at every start but
//! the first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use provision_kit::progress::{ProgressEvent, Reporter, StepId, StepKind};

/// How the engine provisioner begins a note about a mode that it passes over.
const MODE: &str = "mode ";

/// Keeps such notes back until it is known whether something follows from them.
#[derive(Debug)]
pub(super) struct PassedOver {
    next: Arc<dyn Reporter>,
    // Held for a look or an update only; the next reporter is called without it.
    held: Mutex<BTreeMap<StepId, Vec<String>>>,
}

impl PassedOver {
    pub(super) fn before(next: Arc<dyn Reporter>) -> Self {
        Self {
            next,
            held: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<StepId, Vec<String>>> {
        // Map operations do not panic half-way, so the map is whole.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an event back, or says which notes are due before it.
    fn take(&self, event: &ProgressEvent) -> Option<Vec<(StepId, String)>> {
        let mut held = self.lock();
        let due = match event {
            ProgressEvent::Note { id, text } if text.starts_with(MODE) => {
                held.entry(*id).or_default().push(text.clone());
                return None;
            }
            ProgressEvent::Finished { id } => {
                for note in held.remove(id).unwrap_or_default() {
                    tracing::debug!("{note}");
                }
                BTreeMap::new()
            }
            // Something is fetched or built, and the notes say why.
            ProgressEvent::Started {
                kind: StepKind::EngineProvision,
                ..
            } => std::mem::take(&mut *held),
            ProgressEvent::Started { .. } => BTreeMap::new(),
            ProgressEvent::Advanced { id, .. }
            | ProgressEvent::Note { id, .. }
            | ProgressEvent::Failed { id, .. } => held.remove_entry(id).into_iter().collect(),
        };
        let each =
            |(id, notes): (StepId, Vec<String>)| notes.into_iter().map(move |note| (id, note));
        Some(due.into_iter().flat_map(each).collect())
    }
}

impl Reporter for PassedOver {
    fn report(&self, event: ProgressEvent) {
        let Some(due) = self.take(&event) else { return };
        for (id, text) in due {
            self.next.report(ProgressEvent::Note { id, text });
        }
        self.next.report(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use provision_kit::progress::{Step, Unit};

    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<String>>);

    impl Reporter for Heard {
        fn report(&self, event: ProgressEvent) {
            let said = match event {
                ProgressEvent::Started { description, .. } => description,
                ProgressEvent::Note { text, .. } => text,
                ProgressEvent::Finished { .. } => "done".to_owned(),
                ProgressEvent::Failed { .. } => "not done".to_owned(),
                ProgressEvent::Advanced { .. } => "goes on".to_owned(),
            };
            self.0.lock().unwrap().push(said);
        }
    }

    fn heard(what: impl FnOnce(Step, &Arc<dyn Reporter>)) -> Vec<String> {
        let heard = Arc::new(Heard::default());
        let reporter: Arc<dyn Reporter> = Arc::new(PassedOver::before(heard.clone()));
        let step = |name| Step::start(&reporter, StepKind::EngineProvision, name, Unit::None, None);
        let engine = step("engine");
        engine.note("mode system: none");
        what(engine, &reporter);
        let mut said = heard.0.lock().unwrap();
        std::mem::take(&mut *said)
    }

    #[test]
    fn an_engine_that_is_there_needs_no_word_about_other_modes() {
        let said = heard(|engine, _| engine.finish());
        assert_eq!(said, ["engine", "done"]);
    }

    #[test]
    fn where_none_is_there_it_is_said_why() {
        let said = heard(|engine, _| engine.fail("no mode"));
        assert_eq!(said, ["engine", "mode system: none", "not done"]);
    }

    #[test]
    fn before_one_is_made_it_is_said_why() {
        let said = heard(|engine, reporter| {
            let kind = StepKind::ModelFetch;
            Step::start(reporter, kind, "model", Unit::Bytes, None).finish();
            let kind = StepKind::EngineProvision;
            Step::start(reporter, kind, "build", Unit::None, None).finish();
            engine.finish();
        });
        assert_eq!(
            said,
            [
                "engine",
                "model",
                "done",
                "mode system: none",
                "build",
                "done",
                "done"
            ]
        );
    }
}
