//! Progress, shown: bars on a terminal, log lines otherwise.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use provision_kit::progress::{ProgressEvent, Reporter, StepId, Unit};

use super::logging::LogFormat;

/// How often a step may write a line where there are no bars.
const LINE_EVERY: Duration = Duration::from_secs(3);

/// Bars if standard error is a terminal and the log is for people.
pub fn reporter(format: LogFormat, bars: &MultiProgress) -> Arc<dyn Reporter> {
    if format == LogFormat::Text && std::io::stderr().is_terminal() {
        Arc::new(Bars {
            all: bars.clone(),
            steps: Mutex::default(),
        })
    } else {
        Arc::new(Lines::default())
    }
}

#[derive(Debug)]
struct Bars {
    all: MultiProgress,
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
        let _ = self.all.println(text);
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
                let bar = self.all.add(ProgressBar::new(total.unwrap_or(0)));
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

#[derive(Debug, Default)]
struct Lines {
    steps: Mutex<HashMap<StepId, Line>>,
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
        match event {
            ProgressEvent::Started {
                id,
                description,
                unit,
                ..
            } => {
                tracing::info!("{description}");
                let now = Instant::now();
                let line = Line {
                    description,
                    unit,
                    begun: now,
                    written: now,
                };
                self.lock().insert(id, line);
            }
            ProgressEvent::Advanced { id, done, total } => {
                if let Some(line) = self.lock().get_mut(&id)
                    && line.written.elapsed() >= LINE_EVERY
                {
                    line.written = Instant::now();
                    tracing::info!("{} {}", line.description, amount(line.unit, done, total));
                }
            }
            ProgressEvent::Note { text, .. } => tracing::info!("{text}"),
            ProgressEvent::Finished { id } => {
                if let Some(line) = self.lock().remove(&id) {
                    let took = line.begun.elapsed().as_secs_f64();
                    tracing::info!("done: {} ({took:.1} s)", line.description);
                }
            }
            ProgressEvent::Failed { id, reason } => {
                if let Some(line) = self.lock().remove(&id) {
                    tracing::warn!("not done: {}: {reason}", line.description);
                }
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
    fn every_bar_style_is_well_formed() {
        for unit in [Unit::Bytes, Unit::BuildSteps, Unit::None] {
            for total in [None, Some(5)] {
                style(unit, total);
            }
        }
    }
}
