//! What a run is asked to do.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

/// Which engine stands behind the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EngineChoice {
    /// llama-server and the small model `haiku`, as this machine's daemon
    /// provides them: fetched or built now if they are not in its cache.
    Real,
    /// A scripted stand-in, which can be made to fail in more ways and whose
    /// answers are known word by word.
    Scripted,
}

impl EngineChoice {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Real => "real",
            Self::Scripted => "scripted",
        }
    }
}

/// Kills, stops, corrupts, fills and floods a real orchestratord while clients
/// run, and checks all along that nothing is lost and nothing is left behind.
///
/// The daemon is a process of its own with temporary directories; nothing else
/// on the machine is touched. Faults come in rounds, shuffled by the seed; each
/// comes up at least once in every round. After each fault the pool must serve
/// again within a bound. The exit status is 0 only if no promise was broken.
#[derive(Debug, Clone, Parser)]
#[command(name = "test-harness-chaos", after_help = EXAMPLES)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent switches of a command line"
)]
pub struct Options {
    /// The engine behind the daemon.
    #[arg(long, value_enum, default_value_t = EngineChoice::Scripted)]
    pub engine: EngineChoice,
    /// How long faults are injected, in minutes; fractions are allowed.
    #[arg(long, default_value_t = 2.0)]
    pub minutes: f64,
    /// Which faults come in which order, with which parameters.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Only these faults, by name, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    pub faults: Vec<String>,
    /// List the faults and stop.
    #[arg(long)]
    pub list: bool,
    /// A daemon that lacks a route or a command that a fault needs does not
    /// fail the run.
    #[arg(long)]
    pub allow_missing: bool,
    /// Stop at the first broken promise.
    #[arg(long)]
    pub fail_fast: bool,
    /// Write the report as JSON, too.
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
    /// Test this orchestratord instead of one built from this workspace.
    #[arg(long, value_name = "PATH")]
    pub daemon: Option<PathBuf>,
    /// Keep the run's directory even if nothing was broken.
    #[arg(long)]
    pub keep: bool,
    /// How many clients run all along.
    #[arg(long, default_value_t = 4)]
    pub clients: u32,
}

const EXAMPLES: &str = "\
Examples:
  test-harness-chaos --list                              what can be done to it
  test-harness-chaos --minutes 5 --seed 7                five minutes, scripted engine
  test-harness-chaos --engine real --minutes 30          the soak
  test-harness-chaos --faults kill-engine-streaming,flood --minutes 1
  test-harness-chaos --minutes 30 --json report.json

A broken promise is printed with the last lines of the journal and the command
line that repeats the run; the run's directory, with the journal and the
daemon's logs, is kept. Timing cannot be repeated, so a repeat makes the same
choices but may not meet the same moment.";

impl Options {
    /// For tests: this engine, for this long, with this seed.
    pub fn new(engine: EngineChoice, minutes: f64, seed: u64) -> Self {
        Self {
            engine,
            minutes,
            seed,
            faults: Vec::new(),
            list: false,
            allow_missing: false,
            fail_fast: false,
            json: None,
            daemon: None,
            keep: false,
            clients: 4,
        }
    }

    pub fn duration(&self) -> Duration {
        Duration::try_from_secs_f64(self.minutes * 60.0).unwrap_or(Duration::from_mins(2))
    }

    /// The command line that makes the same choices.
    pub fn command_line(&self) -> String {
        let mut line = format!(
            "cargo run --release -p test-harness-chaos -- --engine {} --minutes {} --seed {}",
            self.engine.as_str(),
            self.minutes,
            self.seed
        );
        if !self.faults.is_empty() {
            line = format!("{line} --faults {}", self.faults.join(","));
        }
        if self.clients != 4 {
            line = format!("{line} --clients {}", self.clients);
        }
        if self.allow_missing {
            line.push_str(" --allow-missing");
        }
        line
    }
}
