//! What a layer in front of an engine costs, side by side with its peers. See
//! `README.md` beside this crate.
//!
//! - [`relay`]: a token's way through, beside nginx
//! - [`overhead`]: what a client of a real engine notices
//! - [`start`]: from a process's start to its first token
//! - [`scale`]: ten thousand queued tasks and their readers
//! - [`sides`], [`place`], [`http`], [`processes`]: what they are measured with
//! - [`report`], [`plot`], [`stats`]: what comes out

#![allow(clippy::print_stderr, reason = "a program whose purpose is its output")]

pub mod args;
pub mod http;
pub mod overhead;
pub mod place;
pub mod plot;
pub mod processes;
pub mod relay;
pub mod report;
pub mod scale;
pub mod sides;
pub mod start;
pub mod stats;

use std::io;
use std::path::Path;

use crate::args::{Args, What};
use crate::report::{Report, Table};

/// Measures what the arguments say, and keeps the report.
pub async fn run(args: &Args) -> io::Result<Report> {
    let descriptors = place::raise_descriptors()?;
    let dir = tempfile::Builder::new()
        .prefix("llama-orch-bench-")
        .tempdir()?;
    let mut report = Report::default();
    if cfg!(debug_assertions) {
        report
            .notes
            .push("a debug build: the figures mean nothing".to_owned());
    }
    if place::on_path("nginx").is_none() && args.what.includes(What::Relay) {
        report
            .notes
            .push("nginx is not installed: left out".to_owned());
    }
    for part in [What::Relay, What::Scale, What::Start, What::Overhead] {
        if !args.what.includes(part) {
            continue;
        }
        eprintln!("measuring {part:?} …");
        let own = dir.path().join(format!("{part:?}"));
        std::fs::create_dir_all(&own)?;
        let measured = measure(part, &own, args, descriptors).await;
        let tables = measured.inspect_err(|_| {
            let kept = Path::new(&args.out).join("failed");
            keep_logs(&own, &kept);
            eprintln!("the logs are kept in {}", kept.display());
        })?;
        report.tables.extend(tables);
    }
    report.save(&args.out)?;
    Ok(report)
}

async fn measure(part: What, dir: &Path, args: &Args, descriptors: u64) -> io::Result<Vec<Table>> {
    let (quick, rounds) = (args.quick, args.rounds());
    match part {
        What::Relay => relay::run(dir, quick, rounds).await,
        What::Scale => scale::run(dir, quick, descriptors).await,
        What::Start => start::run(dir, rounds, args.threads).await,
        What::Overhead => overhead::run(dir, quick, rounds, args.threads).await,
        What::All => Ok(Vec::new()),
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
