//! The program: runs the chaos and prints what came of it.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a program for people to watch"
)]

use std::process::ExitCode;

use clap::Parser;
use test_harness_chaos::args::Options;
use test_harness_chaos::client::chain;
use test_harness_chaos::faults;
use test_harness_chaos::run::run;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    if options.list {
        for fault in faults::all() {
            let only = if fault.scripted_only {
                " (scripted engine only)"
            } else {
                ""
            };
            println!("{:<24} {}{only}", fault.name, fault.about);
        }
        return ExitCode::SUCCESS;
    }
    eprintln!("{}", options.command_line());
    let outcome = tokio::select! {
        outcome = run(options, &|line| eprintln!("{line}")) => outcome,
        // The daemon goes with what is dropped here.
        () = asked_to_stop() => {
            eprintln!("given up");
            return ExitCode::from(130);
        }
    };
    let report = match outcome {
        Ok(report) => report,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            return ExitCode::from(2);
        }
    };
    println!("{}", report.table());
    if report.is_clean() {
        println!("no promise was broken");
        return ExitCode::SUCCESS;
    }
    println!("{}", report.story());
    ExitCode::FAILURE
}

/// Waits for SIGINT or SIGTERM.
async fn asked_to_stop() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        // Without a handler the signal itself ends the program.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
