//! `orchestratord` turns a bare machine into a working LLM endpoint.
//!
//! # Layout
//!
//! - [`cli`]: the command line
//! - [`app`]: how the daemon is put together; [`app::bootstrap`] says what
//!   happens at start
//! - `provisioning` (feature `provisioning`): engine and model, from nothing to
//!   a bound pool
//! - [`services`]: queues, tasks, event logs, streams
//! - [`api`]: the HTTP API, one file for each resource
//! - [`ui`]: progress and logs as people see them
//! - [`remote_pool`]: pools whose engine runs elsewhere
//! - [`runtimes`]: which thread does what
//! - `env_shim`, `mock_pool`: development only, off by default

pub mod api;
pub mod app;
pub mod cli;
#[cfg(any(feature = "env-shim", all(test, feature = "provisioning")))]
#[cfg_attr(not(feature = "env-shim"), allow(dead_code))]
pub mod env_shim;
#[cfg(feature = "mock-adapter")]
pub mod mock_pool;
#[cfg(feature = "provisioning")]
pub mod provisioning;
pub mod remote_pool;
pub mod runtimes;
pub mod services;
pub mod ui;

use std::process::ExitCode;
use std::sync::OnceLock;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// The program, apart from its `main`.
pub fn main() -> ExitCode {
    cli::main()
}

/// Has the metrics recorder made on a thread of its own: its clock is measured for
/// milliseconds, in which the rest of the start goes on.
pub(crate) fn begin_telemetry() {
    let made = runtimes::beside("telemetry", || drop(telemetry_recorder()));
    if let Err(error) = made {
        tracing::debug!(%error, "no thread for the metrics recorder; it is made when it is asked for");
    }
}

/// The process's one metrics recorder. A process has one, however many
/// daemons a test starts in it.
pub fn telemetry_recorder() -> PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER
        .get_or_init(|| {
            let builder = PrometheusBuilder::new().set_buckets(services::telemetry::BUCKETS);
            // Refused only for an empty list of buckets, and for a second
            // recorder, which the OnceLock rules out.
            let recorder = builder
                .expect("the bucket list is not empty")
                .build_recorder();
            let handle = recorder.handle();
            if metrics::set_global_recorder(recorder).is_err() {
                tracing::warn!("another metrics recorder is in place; /metrics stays empty");
            }
            services::telemetry::describe();
            handle
        })
        .clone()
}
