//! What commands print: answers on standard output, everything else beside it.

use std::io::Write;
use std::process::ExitCode;

use llama_orch_types::Hinted;

use crate::services::event_log::Failure;

/// Prints an error, its causes and its hint.
pub(super) fn error<E: Hinted>(error: &E) -> ExitCode {
    terminal_ui::report::print(error);
    ExitCode::FAILURE
}

/// Prints a failure of the service.
pub(super) fn failure(failure: &Failure) -> ExitCode {
    aside(format!("error: {} ({})", failure.message, failure.code));
    if let Some(hint) = &failure.hint {
        aside(format!("hint: {hint}"));
    }
    ExitCode::FAILURE
}

/// One line of an answer on standard output. A reader that has gone away
/// (`| head`) is no error.
pub(super) fn line(text: impl std::fmt::Display) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// One line beside the answer.
pub(super) fn aside(text: impl std::fmt::Display) {
    terminal_ui::say(text);
}
