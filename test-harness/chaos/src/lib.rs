//! Chaos: a real daemon, clients that run all along, and faults in seeded
//! random order. What must be true is checked all along and at the end.
//!
//! - [`args`]: what a run is asked to do
//! - [`setup`]: its directory, engine, model and configuration
//! - [`keeper`]: starts and ends the daemon's process
//! - [`world`]: what all parts share
//! - [`client`], [`sse`], [`traffic`]: the clients
//! - [`guests`]: clients of `/v1`, of pools that come and go
//! - [`ledger`]: what was promised and what came; pure
//! - [`scheduler`], [`rng`]: which fault is next; pure
//! - [`faults`]: what goes wrong
//! - [`source`]: the model's source, which can be told to serve badly
//! - [`sampler`], [`procs`]: what the daemon holds, and who is left
//! - [`run`], [`report`], [`journal`]: the run and what is told of it
//!
//! Like the end-to-end proof it looks from outside and shares no code with the
//! daemon, so a mistake there cannot hide in here.

pub mod args;
pub mod client;
pub mod error;
pub mod faults;
pub mod guests;
pub mod journal;
pub mod keeper;
pub mod ledger;
pub mod procs;
pub mod report;
pub mod rng;
pub mod run;
pub mod sampler;
pub mod scheduler;
pub mod setup;
pub mod source;
pub mod sse;
pub mod traffic;
pub mod world;
