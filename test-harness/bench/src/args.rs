//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::points::Size;

/// Measures what a layer in front of an engine costs, side by side.
///
/// Everything that is needed is started here: the engine and the model are
/// provided as the daemon provides them, into the same cache. nginx is used
/// where it is installed. Use a release build.
#[derive(Debug, Clone, Parser)]
#[command(name = "bench", version)]
pub struct Args {
    /// What to measure.
    #[arg(value_enum, default_value_t = What::All)]
    pub what: What,
    /// Shorter, for a look: figures with more noise.
    #[arg(long)]
    pub quick: bool,
    /// How often each comparison is repeated, in turns. Default: 3, or 2 with --quick.
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Where `bench.json`, `bench.md` and `bench.svg` are written.
    #[arg(long, default_value = "target/bench")]
    pub out: PathBuf,
    /// Threads that real engines compute with.
    #[arg(long, default_value_t = 1)]
    pub threads: u32,
    /// A file whose lines between `<!-- bench:begin -->` and `<!-- bench:end -->`
    /// become this run's summary.
    #[arg(long)]
    pub readme: Option<PathBuf>,
    /// The executable of `bench-engine`; otherwise the one beside this program.
    #[arg(skip)]
    pub bench_engine: Option<PathBuf>,
    /// Only as much as a test of the benchmark itself needs, and no real engine.
    #[arg(skip)]
    pub smoke: bool,
}

/// The parts of the benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// First token, gaps and tokens per second beside the bare engine and its router.
    Overhead,
    /// Tokens per second and CPU time per token of the relay alone, beside nginx.
    Relay,
    /// From a process's start to its first token.
    Start,
    /// Memory and time of ten thousand queued tasks and their readers.
    Scale,
    All,
}

impl What {
    pub fn includes(self, part: Self) -> bool {
        self == Self::All || self == part
    }
}

impl Args {
    pub fn size(&self) -> Size {
        match (self.smoke, self.quick) {
            (true, _) => Size::Smoke,
            (false, true) => Size::Quick,
            (false, false) => Size::Full,
        }
    }

    pub fn rounds(&self) -> usize {
        let usual = self.size().pick(3, 2, 1);
        self.rounds.unwrap_or(usual).max(1)
    }
}
