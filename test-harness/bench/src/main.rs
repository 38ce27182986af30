//! The command. See the library.

#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "a program whose purpose is its output"
)]

use std::process::ExitCode;

use clap::Parser;
use test_harness_bench::args::Args;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let args = Args::parse();
    match test_harness_bench::run(&args).await {
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
