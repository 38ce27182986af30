//! Errors as people see them: what failed, why, and the next thing to try.

#![allow(clippy::print_stderr, clippy::print_stdout)]

use std::error::Error;
use std::process::ExitCode;

use llama_orch_types::Hinted;

use crate::services::event_log::Failure;

/// Exit status of a command that failed.
const FAILED: u8 = 1;

/// Prints an error, its causes and its hint.
pub(super) fn error<E: Hinted + 'static>(error: &E) -> ExitCode {
    let hint = error.hint();
    failed(
        &error.to_string(),
        error.source().unwrap_or(&Nothing),
        hint.as_deref(),
    )
}

/// Prints what failed, the chain of causes from `cause` on, and a hint.
pub(super) fn failed(what: &str, cause: &(dyn Error + 'static), hint: Option<&str>) -> ExitCode {
    eprintln!("error: {what}");
    let mut next = Some(cause);
    while let Some(cause) = next {
        let text = cause.to_string();
        if !text.is_empty() {
            eprintln!("  because: {}", text.trim_end().replace('\n', "\n    "));
        }
        next = cause.source();
    }
    if let Some(hint) = hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(FAILED)
}

/// Prints a failure of the service.
pub(super) fn failure(failure: &Failure) -> ExitCode {
    eprintln!("error: {} ({})", failure.message, failure.code);
    if let Some(hint) = &failure.hint {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(FAILED)
}

/// One line of an answer on standard output.
pub(super) fn line(text: impl std::fmt::Display) {
    println!("{text}");
}

/// One line beside the answer.
pub(super) fn aside(text: impl std::fmt::Display) {
    eprintln!("{text}");
}

/// Stands for an error without a cause.
#[derive(Debug)]
struct Nothing;

impl std::fmt::Display for Nothing {
    fn fmt(&self, _: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        Ok(())
    }
}

impl Error for Nothing {}
