//! Progress for a person: bars on a terminal, plain lines otherwise, all on standard error.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use provision_kit::progress::{ProgressEvent, Reporter, StepId, Unit};

/// How often a plain line may repeat how far a step is.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// What fits the place that standard error leads to.
pub(crate) fn reporter() -> Arc<dyn Reporter> {
    if std::io::stderr().is_terminal() {
        Arc::new(Bars::default())
    } else {
        Arc::new(Lines::default())
    }
}

#[derive(Debug, Default)]
struct Bars {
    screen: MultiProgress,
    bars: Mutex<HashMap<StepId, ProgressBar>>,
}

impl Bars {
    fn style(unit: Unit) -> ProgressStyle {
        let template = match unit {
            Unit::Bytes => "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}",
            Unit::BuildSteps => "{spinner} {msg} [{bar:30}] {pos}/{len} {elapsed}",
            Unit::None => "{spinner} {msg} {elapsed}",
        };
        // The templates above are constants; a plain bar serves where one does not parse.
        ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
    }

    fn bar(&self, id: StepId) -> Option<ProgressBar> {
        self.bars
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&id)
            .cloned()
    }

    fn take(&self, id: StepId) -> Option<ProgressBar> {
        self.bars
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id)
    }

    fn say(&self, line: &str) {
        // A terminal that has gone away is no reason to stop.
        let _ = self.screen.println(line);
    }
}

impl Reporter for Bars {
    fn report(&self, event: ProgressEvent) {
        match event {
            ProgressEvent::Started {
                id,
                description,
                unit,
                total,
                ..
            } => {
                let bar = self.screen.add(ProgressBar::no_length());
                if let Some(total) = total {
                    bar.set_length(total);
                }
                bar.set_style(Self::style(unit));
                bar.set_message(description);
                bar.enable_steady_tick(Duration::from_millis(120));
                self.bars
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(id, bar);
            }
            ProgressEvent::Advanced { id, done, total } => {
                if let Some(bar) = self.bar(id) {
                    if let Some(total) = total {
                        bar.set_length(total);
                    }
                    bar.set_position(done);
                }
            }
            ProgressEvent::Note { text, .. } => self.say(&format!("  {text}")),
            ProgressEvent::Finished { id } => {
                if let Some(bar) = self.take(id) {
                    self.say(&format!(
                        "done: {} ({:.1} s)",
                        bar.message(),
                        bar.elapsed().as_secs_f32()
                    ));
                    bar.finish_and_clear();
                }
            }
            ProgressEvent::Failed { id, reason } => {
                if let Some(bar) = self.take(id) {
                    self.say(&format!("failed: {}: {reason}", bar.message()));
                    bar.finish_and_clear();
                }
            }
        }
    }
}

#[derive(Debug, Default)]
struct Lines(Mutex<HashMap<StepId, LineStep>>);

#[derive(Debug)]
struct LineStep {
    description: String,
    unit: Unit,
    started: Instant,
    said: Instant,
}

#[allow(
    clippy::print_stderr,
    reason = "a program's progress belongs on standard error"
)]
fn say(line: &str) {
    eprintln!("{line}");
}

impl Reporter for Lines {
    fn report(&self, event: ProgressEvent) {
        let mut steps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            ProgressEvent::Started {
                id,
                description,
                unit,
                ..
            } => {
                say(&format!("begin: {description}"));
                let now = Instant::now();
                steps.insert(
                    id,
                    LineStep {
                        description,
                        unit,
                        started: now,
                        said: now,
                    },
                );
            }
            ProgressEvent::Advanced { id, done, total } => {
                if let Some(step) = steps.get_mut(&id)
                    && step.said.elapsed() >= LINE_EVERY
                {
                    step.said = Instant::now();
                    say(&format!(
                        "  {}: {}",
                        step.description,
                        amount(step.unit, done, total)
                    ));
                }
            }
            ProgressEvent::Note { text, .. } => say(&format!("  {text}")),
            ProgressEvent::Finished { id } => {
                if let Some(step) = steps.remove(&id) {
                    let seconds = step.started.elapsed().as_secs_f32();
                    say(&format!("done: {} ({seconds:.1} s)", step.description));
                }
            }
            ProgressEvent::Failed { id, reason } => {
                if let Some(step) = steps.remove(&id) {
                    say(&format!("failed: {}: {reason}", step.description));
                }
            }
        }
    }
}

fn amount(unit: Unit, done: u64, total: Option<u64>) -> String {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    match (unit, total) {
        (Unit::Bytes, Some(total)) => format!("{} of {}", mib(done), mib(total)),
        (Unit::Bytes, None) => mib(done),
        (Unit::BuildSteps | Unit::None, Some(total)) => format!("[{done}/{total}]"),
        (Unit::BuildSteps | Unit::None, None) => done.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_for_people() {
        assert_eq!(amount(Unit::BuildSteps, 3, Some(9)), "[3/9]");
        assert_eq!(
            amount(Unit::Bytes, 1 << 20, Some(3 << 19)),
            "1.0 MiB of 1.5 MiB"
        );
        assert_eq!(amount(Unit::Bytes, 0, None), "0.0 MiB");
    }
}
