//! What a layer in front of an engine costs, side by side with its peers. See
//! `README.md` beside this crate.
//!
//! - [`relay`]: a token's way through, beside nginx
//! - [`overhead`]: what a client of a real engine notices
//! - [`start`]: from a process's start to its first token
//! - [`scale`]: ten thousand queued tasks and their readers
//! - [`points`], [`window`]: how the relay is measured
//! - [`sides`], [`scripted`], [`place`], [`http`], [`processes`]: what they are measured with
//! - [`report`], [`goals`], [`machine`], [`plot`], [`readme`], [`stats`]: what comes out

#![allow(clippy::print_stderr, reason = "a program whose purpose is its output")]

pub mod args;
pub mod goals;
pub mod http;
pub mod machine;
pub mod overhead;
pub mod place;
pub mod plot;
pub mod points;
pub mod processes;
pub mod readme;
pub mod relay;
pub mod report;
pub mod scale;
pub mod scripted;
pub mod sides;
pub mod start;
pub mod stats;
pub mod window;

use std::io;
use std::path::Path;
use std::time::Instant;

use crate::args::{Args, What};
use crate::goals::Goal;
use crate::points::Size;
use crate::report::{Report, Table};

/// What every part is given.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// Its own directory.
    pub dir: &'a Path,
    pub size: Size,
    pub rounds: usize,
    /// Of real engines.
    pub threads: u32,
    /// How many files one process may have open.
    pub descriptors: u64,
    /// The executable of `bench-engine`, where it is known.
    pub engine: Option<&'a Path>,
}

/// What a part came to.
#[derive(Debug, Default)]
pub struct Measured {
    pub tables: Vec<Table>,
    pub goals: Vec<Goal>,
    /// What it was measured with, to be named once.
    pub with: Vec<String>,
}

/// Measures what the arguments say, and keeps the report.
pub async fn run(args: &Args) -> io::Result<Report> {
    let descriptors = place::raise_descriptors()?;
    let dir = tempfile::Builder::new()
        .prefix("llama-orch-bench-")
        .tempdir()?;
    let mut report = Report::new(args.rounds());
    if cfg!(debug_assertions) {
        report
            .notes
            .push("a debug build: the figures mean nothing".to_owned());
    }
    if args.size() != Size::Full {
        report
            .notes
            .push("a short run: more noise than the full one has".to_owned());
    }
    if args.what.includes(What::Relay) {
        match machine::nginx() {
            Some(version) => report.with.push(format!("nginx {version}")),
            None => report
                .notes
                .push("nginx is not installed: left out".to_owned()),
        }
    }
    // The start first: the kernel lists the remains of ten thousand connections for a
    // minute, and engines as well as the daemon may come upon them.
    for part in [What::Start, What::Relay, What::Scale, What::Overhead] {
        if !args.what.includes(part) {
            continue;
        }
        let begun = Instant::now();
        eprintln!("measuring {part:?} …");
        let own = dir.path().join(format!("{part:?}"));
        std::fs::create_dir_all(&own)?;
        let context = Context {
            dir: &own,
            size: args.size(),
            rounds: args.rounds(),
            threads: args.threads,
            descriptors,
            engine: args.bench_engine.as_deref(),
        };
        let measured = measure(part, &context).await;
        let measured = measured.inspect_err(|_| {
            let kept = Path::new(&args.out).join("failed");
            keep_logs(&own, &kept);
            eprintln!("the logs are kept in {}", kept.display());
        })?;
        report.add(measured);
        eprintln!(
            "measured {part:?} in {:.0} s",
            begun.elapsed().as_secs_f64()
        );
    }
    report.save(&args.out)?;
    if let Some(file) = &args.readme {
        readme::write(file, &report.summary())?;
    }
    Ok(report)
}

async fn measure(part: What, context: &Context<'_>) -> io::Result<Measured> {
    match part {
        What::Relay => relay::run(context).await,
        What::Scale => scale::run(context).await,
        What::Start => start::run(context).await,
        What::Overhead => overhead::run(context).await,
        What::All => Ok(Measured::default()),
    }
}

/// What could be kept is what there is to look at.
fn keep_logs(from: &Path, to: &Path) {
    let _ = std::fs::create_dir_all(to);
    for entry in std::fs::read_dir(from).into_iter().flatten().flatten() {
        if entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "log")
        {
            let _ = std::fs::copy(entry.path(), to.join(entry.file_name()));
        }
    }
}
