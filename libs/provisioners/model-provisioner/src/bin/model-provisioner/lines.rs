//! Progress as plain lines on standard error.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use provision_kit::progress::{ProgressEvent, Reporter, StepId};

/// A line at least this often while something moves.
const AT_LEAST_EVERY: Duration = Duration::from_secs(5);

/// And one for each further tenth of the whole, but not more often than this.
const AT_MOST_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug, Default)]
pub(crate) struct Lines(Mutex<BTreeMap<StepId, Running>>);

#[derive(Debug)]
struct Running {
    description: String,
    last_line: Instant,
    last_tenth: u64,
}

impl Reporter for Lines {
    fn report(&self, event: ProgressEvent) {
        // Poison means that another thread panicked; the map itself is whole.
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = line(&mut steps, event) {
            // Progress that nobody can see is no reason to stop.
            let _ = writeln!(io::stderr(), "{line}");
        }
    }
}

fn line(steps: &mut BTreeMap<StepId, Running>, event: ProgressEvent) -> Option<String> {
    let name = |steps: &BTreeMap<StepId, Running>, id| {
        steps
            .get(&id)
            .map(|step: &Running| step.description.clone())
            .unwrap_or_default()
    };
    match event {
        ProgressEvent::Started {
            id, description, ..
        } => {
            let running = Running {
                description,
                last_line: Instant::now(),
                last_tenth: 0,
            };
            steps.insert(id, running);
            None
        }
        ProgressEvent::Advanced { id, done, total } => steps.get_mut(&id)?.advanced(done, total),
        ProgressEvent::Note { id, text } => Some(format!("{}: {text}", name(steps, id))),
        ProgressEvent::Finished { id } => steps
            .remove(&id)
            .map(|step| format!("{}: ready", step.description)),
        // The error itself is printed at the end.
        ProgressEvent::Failed { id, .. } => steps
            .remove(&id)
            .map(|step| format!("{}: failed", step.description)),
    }
}

impl Running {
    fn advanced(&mut self, done: u64, total: Option<u64>) -> Option<String> {
        let total = total.filter(|&total| total > 0);
        let tenth = total.map_or(0, |total| done.saturating_mul(10) / total);
        let waited = self.last_line.elapsed();
        let further = tenth > self.last_tenth && waited >= AT_MOST_EVERY;
        if !further && waited < AT_LEAST_EVERY {
            return None;
        }
        self.last_tenth = tenth;
        self.last_line = Instant::now();
        Some(match total {
            Some(total) => format!(
                "{}: {} of {} ({} %)",
                self.description,
                megabytes(done),
                megabytes(total),
                done.saturating_mul(100) / total
            ),
            None => format!("{}: {}", self.description, megabytes(done)),
        })
    }
}

/// Bytes for people.
pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
