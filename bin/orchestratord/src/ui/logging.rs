//! Logs: readable lines, or JSON for machines.

use std::io::{self, Write};
use std::str::FromStr;

use clap::ValueEnum;
use indicatif::MultiProgress;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Readable lines.
    #[default]
    Text,
    /// One JSON object for each line.
    Json,
}

/// Takes a level, or a list of `target=level`. A word that is neither would be
/// read as a target's name, and silence everything else.
pub fn check_level(text: &str) -> Result<String, String> {
    for directive in text.split(',') {
        let level = directive.rsplit('=').next().unwrap_or_default().trim();
        if level.is_empty() || LevelFilter::from_str(level).is_err() {
            return Err(format!(
                "`{level}` is no level; the levels are off, error, warn, info, debug and trace"
            ));
        }
    }
    Ok(text.to_owned())
}

/// Sets the process's log up. `RUST_LOG` overrides `level`.
pub fn set_up(format: LogFormat, level: &str, bars: &MultiProgress) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(AroundBars(bars.clone()))
        // A line that cannot be written is lost; saying so on the same file would panic.
        .log_internal_errors(false)
        .with_ansi(std::io::IsTerminal::is_terminal(&io::stderr()));
    // Fails only if a log is set up already, which then stays.
    let _ = match format {
        LogFormat::Text => builder.with_target(false).compact().try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}

/// Writes log lines above the progress bars instead of through them.
#[derive(Debug, Clone)]
struct AroundBars(MultiProgress);

impl Write for AroundBars {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().lock().write_all(line))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

impl<'a> MakeWriter<'a> for AroundBars {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_refused() {
        for good in ["info", "DEBUG", "off", "warn,orchestratord=debug"] {
            assert!(check_level(good).is_ok(), "{good}");
        }
        for bad in ["loud", "", "orchestratord=", "info,orchestratord"] {
            assert!(check_level(bad).is_err(), "{bad}");
        }
    }
}
