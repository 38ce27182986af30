//! The command. See the library.

#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program whose purpose is its output"
)]

use std::io;
use std::process::ExitCode;

use clap::Parser;
use test_harness_bench::args::Args;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    // What was started here ends with the run, also where that is broken off.
    let measured = tokio::select! {
        measured = test_harness_bench::run(&args) => measured,
        error = broken_off() => Err(error),
    };
    match measured {
        Ok(report) => {
            println!("{}", report.shown());
            println!("written to {}", args.out.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Returns when somebody wants this to end.
async fn broken_off() -> io::Error {
    let (interrupt, terminate) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    );
    let (mut interrupt, mut terminate) = match (interrupt, terminate) {
        (Ok(interrupt), Ok(terminate)) => (interrupt, terminate),
        (Err(error), _) | (_, Err(error)) => return error,
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    io::Error::other("broken off by a signal")
}
