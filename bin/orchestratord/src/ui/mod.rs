//! What people see: progress and logs. Everything goes to standard error;
//! standard output is for answers alone.

pub mod logging;
pub mod progress;
