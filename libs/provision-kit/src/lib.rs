//! What both provisioners share.
//!
//! Each module is one mechanism and knows nothing of engines or models:
//!
//! - [`blocking`]: work that blocks, away from the threads that must not
//! - [`chain`]: an error and its causes in one line
//! - [`config`]: strict configuration files
//! - [`dirs`]: where files live
//! - [`download`]: one file over HTTP, resumed and hashed
//! - [`fs`]: whole-file writes, digests, free space
//! - [`leftovers`]: what ended processes left behind
//! - [`lock`]: locks between processes
//! - [`part`]: a file that is still arriving
//! - [`pip`]: the machine's own pip
//! - [`process`]: child processes that never outlive their owner
//! - [`progress`]: progress, reported and never printed
//! - [`rate`]: how fast downloads may be
//! - [`repair`]: mending a part file instead of fetching all of it again
//! - [`secret`]: a secret that does not get into logs

pub mod blocking;
pub mod chain;
mod chunks;
pub mod config;
pub mod dirs;
pub mod download;
mod download_again;
mod download_error;
mod download_headers;
pub mod fs;
pub mod leftovers;
pub mod lock;
pub mod part;
pub mod pip;
pub mod process;
pub mod progress;
pub mod rate;
pub mod repair;
pub mod secret;
