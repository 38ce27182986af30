//! Provides `llama-server`, starts it, and ends it.
//!
//! Responsible for: an engine binary that is pinned by version and checked by digest, however it
//! comes to this machine ([`EngineProvisioner::ensure`]); one engine process per pool, supervised
//! for as long as its [`RunningEngine`] lives ([`EngineProvisioner::start`]); the handoff file,
//! the PID file and the provenance records that say so.
//!
//! Not responsible for: models (a start is given a [`llama_orch_types::ModelMetadata`]), restarts
//! (whoever holds the `RunningEngine` decides), and anything said to the engine beyond `/health`,
//! `/metrics` and `/props`.
//!
//! - `config`: what a user may say
//! - `provide`: the four modes
//! - `run`: command line, port, log, readiness, end
//! - `preflight`: what this machine has and lacks

mod config;
mod error;
pub mod machine;
mod manifest;
mod passing;
mod preflight;
mod provide;
mod run;
mod unpack;
mod version;

pub use config::{
    Accelerator, AcceleratorChoice, ArchiveSource, DEFAULT_VERSION, EngineConfig, GitSource, Mode,
    PipSource, ReleaseConfig, Source, SourceConfig,
};
pub use error::{EngineError, ModeFailure, SourceFailure};
pub use manifest::check_manifest;
pub use preflight::{Check, CheckState, Preflight, preflight};
pub use provide::plan::{Plan, PlannedMode};
pub use provide::{EngineInstallation, EngineProvisioner};
pub use run::argv::{FlagError, render_argv};
pub use run::spec::{LaunchSpec, Profile, Purpose};
pub use run::{EngineExit, LogLines, PoolLock, RunningEngine, StopReport, handoff_path};
