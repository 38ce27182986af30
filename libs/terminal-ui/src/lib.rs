//! What the programs show people, all on standard error: standard output is
//! for answers alone.
//!
//! - [`progress`]: bars on a terminal, lines otherwise
//! - [`report`]: an error, its causes and its hint

pub mod progress;
pub mod report;
