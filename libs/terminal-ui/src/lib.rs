//! What the programs show people, all on standard error: standard output is
//! for answers alone.
//!
//! - [`progress`]: bars on a terminal, lines otherwise
//! - [`report`]: an error, its causes and its hint

pub mod progress;
pub mod report;

use std::fmt::Display;
use std::io::Write;

/// One line on standard error. Whether it can be written decides nothing: on a
/// full disk, or with its reader gone, `eprintln!` would end the program.
pub fn say(text: impl Display) {
    let _ = writeln!(std::io::stderr(), "{text}");
}
