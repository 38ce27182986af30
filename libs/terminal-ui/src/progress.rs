//! Progress, shown: bars on a terminal, log lines otherwise.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use provision_kit::progress::{ProgressEvent, Reporter, StepId, Unit};

/// How often a step may write a line where there are no bars.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// Where lines go.
pub type Sink = Box<dyn Fn(&str) + Send + Sync>;

/// Bars on standard error. Whatever else is written there has to go through
/// the same `MultiProgress`, or it breaks into the bars.
pub fn bars(screen: &MultiProgress) -> Arc<dyn Reporter> {
    Arc::new(Bars {
        screen: screen.clone(),
        steps: Mutex::default(),
    })
}

/// One line for every start, end and note, and one now and then in between.
pub fn lines(sink: Sink) -> Arc<dyn Reporter> {
    Arc::new(Lines {
        sink,
        steps: Mutex::default(),
    })
}

/// Bars if standard error is a terminal, else plain lines there.
pub fn on_stderr() -> Arc<dyn Reporter> {
    if std::io::stderr().is_terminal() {
        bars(&MultiProgress::new())
    } else {
        lines(Box::new(|line| crate::say(line)))
    }
}

#[derive(Debug)]
struct Bars {
    screen: MultiProgress,
    steps: Mutex<HashMap<StepId, Bar>>,
}

#[derive(Debug)]
struct Bar {
    shown: ProgressBar,
    description: String,
    unit: Unit,
}

fn style(unit: Unit, total: Option<u64>) -> ProgressStyle {
    let template = match (unit, total) {
        (Unit::Bytes, Some(_)) => {
            "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, {eta} left"
        }
        (Unit::BuildSteps, Some(_)) => {
            "{spinner} {msg} [{bar:30}] [{pos}/{len}] {elapsed}, {eta} left"
        }
        (Unit::Bytes, None) => "{spinner} {msg} {bytes} {bytes_per_sec}",
        _ => "{spinner} {msg} {elapsed}",
    };
    // The templates above are all well-formed; a plain bar is no harm.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

impl Bars {
    fn lock(&self) -> MutexGuard<'_, HashMap<StepId, Bar>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn line(&self, text: &str) {
        // Only fails if standard error is gone, and then nobody reads.
        let _ = self.screen.println(text);
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
                let bar = self.screen.add(ProgressBar::new(total.unwrap_or(0)));
                bar.set_style(style(unit, total));
                bar.set_message(description.clone());
                bar.enable_steady_tick(Duration::from_millis(120));
                let bar = Bar {
                    shown: bar,
                    description,
                    unit,
                };
                self.lock().insert(id, bar);
            }
            ProgressEvent::Advanced { id, done, total } => {
                if let Some(Bar {
                    shown: bar, unit, ..
                }) = self.lock().get(&id)
                {
                    if let Some(total) = total.filter(|total| bar.length() != Some(*total)) {
                        bar.set_length(total);
                        bar.set_style(style(*unit, Some(total)));
                    }
                    bar.set_position(done);
                }
            }
            ProgressEvent::Note { text, .. } => self.line(&format!("  {text}")),
            ProgressEvent::Finished { id } => {
                if let Some(Bar {
                    shown: bar,
                    description,
                    ..
                }) = self.lock().remove(&id)
                {
                    bar.finish_and_clear();
                    self.line(&format!(
                        "  done: {description} ({} s)",
                        bar.elapsed().as_secs()
                    ));
                }
            }
            ProgressEvent::Failed { id, reason } => {
                if let Some(Bar {
                    shown: bar,
                    description,
                    ..
                }) = self.lock().remove(&id)
                {
                    bar.finish_and_clear();
                    self.line(&format!("  not done: {description}: {reason}"));
                }
            }
        }
    }
}

struct Lines {
    sink: Sink,
    steps: Mutex<HashMap<StepId, Line>>,
}

impl std::fmt::Debug for Lines {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

#[derive(Debug)]
struct Line {
    description: String,
    unit: Unit,
    begun: Instant,
    written: Instant,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, HashMap<StepId, Line>> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn amount(unit: Unit, done: u64, total: Option<u64>) -> String {
    let share = |total: u64| (done as f64 / total.max(1) as f64 * 100.0).min(100.0);
    match (unit, total) {
        (Unit::Bytes, Some(total)) => {
            format!(
                "{:.0} % ({} of {})",
                share(total),
                HumanBytes(done),
                HumanBytes(total)
            )
        }
        (Unit::Bytes, None) => HumanBytes(done).to_string(),
        (Unit::BuildSteps, Some(total)) => format!("[{done}/{total}]"),
        (_, _) => format!("{done}"),
    }
}

impl Reporter for Lines {
    fn report(&self, event: ProgressEvent) {
        if let Some(line) = self.line_for(event) {
            (self.sink)(&line);
        }
    }
}

impl Lines {
    /// What an event is worth saying; the sink is called without the lock.
    fn line_for(&self, event: ProgressEvent) -> Option<String> {
        let mut steps = self.lock();
        match event {
            ProgressEvent::Started {
                id,
                description,
                unit,
                ..
            } => {
                let line = description.clone();
                let now = Instant::now();
                let step = Line {
                    description,
                    unit,
                    begun: now,
                    written: now,
                };
                steps.insert(id, step);
                Some(line)
            }
            ProgressEvent::Advanced { id, done, total } => {
                let step = steps.get_mut(&id)?;
                if step.written.elapsed() < LINE_EVERY {
                    return None;
                }
                step.written = Instant::now();
                Some(format!(
                    "{} {}",
                    step.description,
                    amount(step.unit, done, total)
                ))
            }
            ProgressEvent::Note { text, .. } => Some(text),
            ProgressEvent::Finished { id } => {
                let step = steps.remove(&id)?;
                let took = step.begun.elapsed().as_secs_f64();
                Some(format!("done: {} ({took:.1} s)", step.description))
            }
            ProgressEvent::Failed { id, reason } => {
                let step = steps.remove(&id)?;
                Some(format!("not done: {}: {reason}", step.description))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_as_people_read_them() {
        assert_eq!(
            amount(Unit::Bytes, 50 << 20, Some(100 << 20)),
            "50 % (50.00 MiB of 100.00 MiB)"
        );
        assert_eq!(amount(Unit::BuildSteps, 3, Some(208)), "[3/208]");
        assert_eq!(amount(Unit::Bytes, 0, Some(0)), "0 % (0 B of 0 B)");
    }

    #[test]
    fn lines_tell_of_starts_notes_and_ends() {
        use provision_kit::progress::{Step, StepKind};
        use std::sync::mpsc::channel;

        let (sender, receiver) = channel();
        let sink: Sink = Box::new(move |line| sender.send(line.to_owned()).unwrap());
        let reporter = lines(sink);
        let step = |name| Step::start(&reporter, StepKind::ModelFetch, name, Unit::Bytes, None);
        let good = step("model a");
        good.note("from the cache");
        good.finish();
        step("model b").fail("no space");
        drop(reporter);
        let said: Vec<String> = receiver.iter().collect();
        assert_eq!(said[..2], ["model a", "from the cache"]);
        assert!(said[2].starts_with("done: model a ("), "{said:?}");
        assert_eq!(said[3..], ["model b", "not done: model b: no space"]);
    }

    #[test]
    fn every_bar_style_is_well_formed() {
        for unit in [Unit::Bytes, Unit::BuildSteps, Unit::None] {
            for total in [None, Some(5)] {
                style(unit, total);
            }
        }
    }
}
