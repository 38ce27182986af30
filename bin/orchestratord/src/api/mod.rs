//! How the daemon is asked: one file for each resource.
//!
//! Handlers check input, ask the services, and shape answers. They decide
//! nothing about queues or engines.

pub mod admin;
pub mod auth;
pub mod catalog;
pub mod correlation;
pub mod dialect;
pub mod error;
pub mod health;
pub mod meta;
pub mod metrics;
pub mod openai;
pub mod outcome;
pub mod panics;
pub mod pools;
pub mod repeats;
pub mod streams;
pub mod submission;
pub mod task_request;
pub mod tasks;
