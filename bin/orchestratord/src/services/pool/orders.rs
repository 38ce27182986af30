//! What a pool and its supervisor say to each other, and what is shown of it.
//!
//! An order is a level, not an edge: the supervisor does what the newest one
//! wants, and one that was overtaken need not be followed. Each has a serial
//! number, under which the supervisor reports.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use llama_orch_types::ProvisionedContext;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::lifecycle::{Phase, ReloadMode, ReloadState, RestartCause};
use crate::app::config::PoolConfig;
use crate::services::event_log::Failure;

/// What the pool wants of its supervisor.
#[derive(Debug, Clone)]
pub struct Order {
    /// Grows with every order.
    pub serial: u64,
    pub wanted: Wanted,
}

/// What is wanted, and how it is answered.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// An engine with this configuration, and no other. Answered by `Ready` or
    /// `NotStarted`.
    Start {
        config: Arc<PoolConfig>,
        /// It must have completed something before it counts as ready.
        prove: bool,
    },
    /// One with this configuration beside the one that runs. Answered by
    /// `Replaced`, `NotReplaced`, `NoRoom`, or `Exited` if that one is gone.
    Replace(Arc<PoolConfig>),
    /// The engine that runs. Answered by `Ready`, or `Exited` if it is gone.
    Keep,
    /// None. Answered by `Stopped`.
    Rest,
}

/// What the supervisor tells the pool.
#[derive(Debug)]
pub enum Change {
    Provisioning,
    Starting,
    /// One of model and engine cannot be had, and the other is still under
    /// way: the reason, before everything has ended.
    Trouble(Failure),
    /// The engine is bound in the adapter host.
    Ready(Bound),
    /// The engine ended that was ready.
    Exited {
        cause: RestartCause,
        failure: Failure,
    },
    NotStarted {
        failure: Failure,
        /// The engine's last lines, if it came to any.
        log: Vec<String>,
    },
    /// The engine was stopped as asked, or there was none.
    Stopped,
    /// The supervisor broke.
    Lost(Failure),
    /// Another engine is bound in the place of the one that ran.
    Replaced(Bound),
    /// It could not be had.
    NotReplaced(Failure),
    /// There is no room for two engines: why.
    NoRoom(String),
    /// The engine that is bound takes so many tasks by now: replicas went or came.
    Capacity(u32),
    /// The engine that was replaced is gone.
    Retired,
}

/// An engine that is bound in the adapter host.
#[derive(Debug, Clone)]
pub struct Bound {
    pub context: Arc<ProvisionedContext>,
    pub log: LogTail,
    /// What it was started with; `None` for engines that are not ours.
    pub config: Option<Arc<PoolConfig>>,
}

impl From<Arc<ProvisionedContext>> for Bound {
    /// For engines that are not ours.
    fn from(context: Arc<ProvisionedContext>) -> Self {
        Self {
            context,
            log: LogTail::default(),
            config: None,
        }
    }
}

/// What somebody asks of a pool.
#[derive(Debug)]
pub(super) enum Request {
    Drain(Duration),
    Resume,
    Reload(ReloadRequest),
    Apply(Box<PoolConfig>),
    Unload(Unload, UnloadCause),
}

/// How a pool's engine is unloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unload {
    /// Only if no task runs or waits in the moment in which the pool is asked.
    IfIdle,
    /// Running tasks finish, in their own time, and no further one begins; those
    /// that wait then have the pool started again.
    Yield,
}

/// Why a pool's engine is unloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnloadCause {
    /// No task came for `idle_ttl_seconds`.
    IdleTtl,
    /// Its memory is wanted: for whom, for people.
    Memory(String),
    /// Somebody asked.
    Asked,
}

impl UnloadCause {
    /// For metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::IdleTtl => "idle_ttl",
            Self::Memory(_) => "memory",
            Self::Asked => "asked",
        }
    }
}

impl fmt::Display for UnloadCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdleTtl => f.write_str("unload: no task came for `idle_ttl_seconds`"),
            Self::Memory(whom) => write!(f, "unload: its memory is wanted for {whom}"),
            Self::Asked => f.write_str("unload was asked for"),
        }
    }
}

/// Why a pool's engine was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadCause {
    /// The daemon, or the pool, began.
    Begin,
    /// A task came.
    Task,
    /// Somebody asked.
    Asked,
    /// The one before ended by itself, or could not be had.
    Restart,
    Reload,
}

impl LoadCause {
    /// For metrics.
    pub fn label(self) -> &'static str {
        match self {
            Self::Begin => "begin",
            Self::Task => "task",
            Self::Asked => "asked",
            Self::Restart => "restart",
            Self::Reload => "reload",
        }
    }
}

/// What a reload changes; what is not named stays.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReloadRequest {
    /// As in the configuration: a profile's name or a model reference.
    pub model: Option<String>,
    /// All further flags of the engine, as in the configuration.
    pub flags: Option<Vec<String>>,
}

impl ReloadRequest {
    /// What the pool is to have.
    pub fn applied_to(&self, config: &PoolConfig) -> PoolConfig {
        let mut config = config.clone();
        if let Some(model) = &self.model {
            config.model.clone_from(model);
        }
        if let Some(flags) = &self.flags {
            config.flags.clone_from(flags);
        }
        config
    }
}

/// One change of phase.
#[derive(Debug, Clone)]
pub struct Transition {
    pub from: Phase,
    pub to: Phase,
    pub cause: String,
    pub at: SystemTime,
}

/// A reload as it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReloadView {
    pub state: ReloadState,
    pub mode: ReloadMode,
    /// The model that it brings.
    pub model: String,
    /// Why the old engine had to go first, if it had to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

/// The last lines of an engine's log, as they are when they are asked for.
#[derive(Clone)]
pub struct LogTail(Arc<dyn Fn() -> Vec<String> + Send + Sync>);

impl LogTail {
    /// `lines` must be quick: it is called for every look at the pool.
    pub fn new(lines: impl Fn() -> Vec<String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(lines))
    }

    pub fn of(lines: Vec<String>) -> Self {
        Self::new(move || lines.clone())
    }

    /// At most the last `count` lines.
    pub fn last(&self, count: usize) -> Vec<String> {
        let mut lines = (self.0)();
        lines.split_off(lines.len().saturating_sub(count))
    }
}

impl Default for LogTail {
    fn default() -> Self {
        Self::new(Vec::new)
    }
}

impl fmt::Debug for LogTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogTail(…)")
    }
}
