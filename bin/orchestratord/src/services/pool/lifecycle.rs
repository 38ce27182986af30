//! The life of a pool's engine as a state machine. Pure: events and times come
//! in, the new state and what is to be done about it come out. The pool's
//! actor owns it and carries out the [`Effect`]s that concern tasks; the
//! supervisor carries out those that concern the engine and reports back.
//!
//! ```text
//!                    ┌──────────────── time up, resume, reload ──────────────┐
//!                    ▼                                                       │
//!          ┌─► Provisioning ──► Starting ──► Ready ──── crash, hang ───► Backoff
//!  resume, │     │      │         │  │       │ ▲ │                          │
//!  reload  │     │      └── not ──┘  │       │ │ │ the breaker opens        │
//!          │     │        started     │       │ │ └────────┐                 │
//!          │     │           ▼        │       │ │          ▼                 │
//!          │     │         Failed ◄───┼───────┼─┼── too many crashes         │
//!          │     │           │        │       │ │ resume                     │
//!          │     ▼ drain     ▼        ▼       ▼ │                            ▼
//!          │    Draining ◄── of an operator, a reload or the daemon's end ───┘
//!          │        │ no task left, or none that is waited for any longer
//!          │        ▼
//!          │    Stopping ── a reload goes on ──► Provisioning
//!          │        │ the engine is gone
//!          │        ▼
//!          └──── Stopped ── for ever, if the daemon ends
//! ```
//!
//! A pool that is loaded on demand begins without an engine, and any pool can be
//! brought there to free its memory:
//!
//! ```text
//!                 a task, start               unload: of somebody, for want of
//!     Unloaded ──────────────► Provisioning    tasks or of memory
//!        ▲                                          │
//!        │ the engine is gone                       ▼
//!        └─────────────────── Stopping ◄──────── Draining
//!                                no task runs
//! ```
//!
//! Tasks are taken all along. While it drains for that, running ones finish in
//! their own time and queued ones wait; if some still do when it is Unloaded, it
//! is started again. A start for which no task waits is given up by an unload; one
//! for which some do is not, or they might wait for ever. Without an engine an
//! unload only ends the wait for the next try.
//!
//! A reload of a Ready pool starts beside: the pool stays Ready, and either
//! `Replaced` or `NotReplaced` ends it. Where memory has no room for two
//! (`NoRoom`) it goes through Draining and Stopping to Provisioning, and if
//! the new engine then cannot be started, the old configuration is. Without a
//! running engine the new configuration is simply the one that is tried; by an
//! Unloaded pool, and one that is being unloaded, when it is next started.

mod requests;
mod step;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use self::step::Step;
use super::restart::{FailureHistory, RestartPolicy};

/// Where a pool stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The engine and the model are being provided.
    Provisioning,
    /// The engine is loading the model.
    Starting,
    /// Tasks go to the engine.
    Ready,
    /// The engine ended, or had to be ended, and will be started again.
    Backoff,
    /// The engine or the model could not be provided or started, or ended too
    /// often.
    Failed,
    /// Admitted tasks are finishing; then the engine is stopped.
    Draining,
    /// The engine is being stopped.
    Stopping,
    /// Somebody wants no engine: no task is taken.
    Stopped,
    /// No engine, and tasks are taken: the first one has it loaded.
    Unloaded,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Provisioning => "provisioning",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Backoff => "backoff",
            Self::Failed => "failed",
            Self::Draining => "draining",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Unloaded => "unloaded",
        }
    }
}

/// What is known of the engine process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    None,
    /// Asked for and not ready.
    Starting,
    Up,
    /// Its end was asked for.
    Stopping,
}

/// What an engine was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Configured {
    /// The current configuration.
    AsNow,
    /// One that another was adopted after, while it drained.
    AsBefore,
}

/// Why an engine that was ready has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum RestartCause {
    /// It ended by itself.
    Crash,
    /// It gave no tokens and was ended.
    Hang,
    /// It, or its model, could not be provided or started.
    LoadFailure,
    /// Somebody asked for another one.
    Reload,
}

impl RestartCause {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Crash => "crash",
            Self::Hang => "hang",
            Self::LoadFailure => "load_failure",
            Self::Reload => "reload",
        }
    }
}

/// How often an engine was started again, or is to be, by cause. A reload that was
/// rolled back is none: its pool shows it under `reload`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Restarts {
    /// Engines that ended by themselves.
    pub crash: u64,
    /// Engines that gave no tokens and were ended.
    pub hang: u64,
    /// Tries at the engine that the pool needs, because it had none, which gave no
    /// engine: it, or its model, could not be provided, or it did not get ready.
    pub load_failure: u64,
    /// Engines that came by a reload.
    pub reload: u64,
}

/// Why a pool drains, and then stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drain {
    /// Somebody asked; no engine until somebody asks for that.
    Operator,
    /// To make room for another engine; the queue is kept for it.
    Reload,
    /// To free its memory: the queue is kept, and tasks are taken.
    Unload,
    /// The daemon ends.
    Shutdown,
}

/// How a reload is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReloadMode {
    /// The new engine is started while the old one serves.
    Beside,
    /// The old engine ends first: there is no room for two.
    DrainFirst,
    /// No engine ran: the new configuration is the one that is tried.
    Restart,
}

/// How far a reload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReloadState {
    /// Model and engine are provided, started and proved; the old engine serves.
    Preparing,
    /// The old engine finishes its tasks, and then ends, to make room.
    Draining,
    /// The new engine is being started; no engine serves.
    Starting,
    /// The new engine could not be had: the old configuration is started again.
    RollingBack,
    /// The new engine serves; the old one finishes its tasks.
    Retiring,
    Done,
    /// The old engine, or one of the old configuration, serves.
    RolledBack,
    /// It was given up for something that mattered more.
    Abandoned,
    /// It failed, and there is no engine.
    Failed,
}

impl ReloadState {
    pub fn is_over(self) -> bool {
        matches!(
            self,
            Self::Done | Self::RolledBack | Self::Abandoned | Self::Failed
        )
    }
}

/// A reload: the last one, or the one under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reload {
    pub mode: ReloadMode,
    pub state: ReloadState,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Event {
    /// Engine and model are being provided.
    Providing,
    /// The engine is loading.
    Loading,
    /// An engine is bound.
    Ready,
    /// An engine that was ready has ended, by itself or for its silence.
    Exited(RestartCause),
    NotStarted {
        retriable: bool,
    },
    /// The engine was stopped as asked, or there was none.
    Stopped,
    /// The supervisor broke, and its engine is gone with it.
    Lost,
    /// Another engine is bound in the place of the one that ran.
    Replaced,
    /// It could not be had; the one that ran goes on.
    NotReplaced,
    /// There is no room for two engines.
    NoRoom,
    /// The engine that was replaced is gone.
    Retired,
    /// Finish what was admitted, until then.
    Drain {
        until: Instant,
    },
    Resume,
    Reload,
    /// Free the engine's memory.
    Unload {
        /// Whether tasks wait for an engine.
        waited_for: bool,
    },
    /// A task waits.
    Wanted,
    /// Finish what runs, until then; for ever.
    Shutdown {
        until: Instant,
    },
    /// No task is waited for any longer.
    TasksOver,
    /// [`Lifecycle::deadline`] has come.
    TimeUp,
}

/// Which configuration an engine is started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Current,
    /// The one that a reload brings.
    Candidate,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Start an engine; whatever else the supervisor did is given up.
    Start(Which),
    /// Start one with the candidate's configuration beside the one that runs.
    Replace,
    /// Go on with the engine that runs and with no other.
    Keep,
    /// End the engine, and give up any that is being started.
    Rest,
    /// The candidate is the current configuration from now on.
    Adopt,
    DropCandidate,
    /// Queued tasks end.
    EndQueued,
    /// Running tasks end.
    CancelRunning,
    /// Tasks on the engine that was replaced have until then.
    RetireUntil(Instant),
    /// The pool is over.
    End,
}

/// Why a request is not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    ShuttingDown,
    ReloadUnderWay,
    BeingDrained,
    /// An unload of a pool that takes no tasks.
    Stopped,
    /// An unload of a pool that is being loaded for tasks that wait.
    LoadsForTasks,
}

/// One step from state to state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub from: Phase,
    pub to: Phase,
}

/// What follows from an event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reaction {
    pub moved: Option<Move>,
    pub effects: Vec<Effect>,
    /// The event did not fit the state and changed nothing.
    pub ignored: bool,
    /// The breaker opened.
    pub opened: bool,
    /// What is to be counted as a cause of a restart.
    pub counted: Option<RestartCause>,
}

/// How long things may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    pub restart: RestartPolicy,
    /// How long running tasks may go on when a reload ends their engine.
    pub drain: Duration,
}

/// The state of one pool's engine.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    policy: Policy,
    phase: Phase,
    since: Instant,
    engine: Engine,
    /// Why it drains, stops or has stopped.
    drain: Option<Drain>,
    /// When the phase ends by itself.
    until: Option<Instant>,
    /// The time of its drain is up, and its tasks were told to end.
    overdue: bool,
    /// The engine that starts has got as far as loading.
    loading: bool,
    /// An engine is wanted as soon as the one that stops is gone.
    resume: bool,
    configured: Configured,
    reload: Option<Reload>,
    history: FailureHistory,
    restarts: Restarts,
}

impl Lifecycle {
    /// A pool whose first engine has been asked for, or one that is loaded on
    /// demand.
    pub fn new(policy: Policy, on_demand: bool, now: Instant) -> Self {
        let (phase, engine) = if on_demand {
            (Phase::Unloaded, Engine::None)
        } else {
            (Phase::Provisioning, Engine::Starting)
        };
        Self {
            policy,
            phase,
            since: now,
            engine,
            drain: None,
            until: None,
            overdue: false,
            loading: false,
            resume: false,
            configured: Configured::AsNow,
            reload: None,
            history: FailureHistory::default(),
            restarts: Restarts::default(),
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn since(&self) -> Instant {
        self.since
    }

    pub fn engine(&self) -> Engine {
        self.engine
    }

    pub fn drain(&self) -> Option<Drain> {
        self.drain
    }

    pub fn reload(&self) -> Option<Reload> {
        self.reload
    }

    pub fn restarts(&self) -> Restarts {
        self.restarts
    }

    /// Whether a drain's time is up.
    pub fn overdue(&self) -> bool {
        self.overdue
    }

    /// When [`Event::TimeUp`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        self.until
    }

    /// When the engine is tried again, if it is waited for that.
    pub fn next_try(&self) -> Option<Instant> {
        self.until
            .filter(|_| matches!(self.phase, Phase::Backoff | Phase::Failed))
    }

    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// Whether queued tasks go to the engine.
    pub fn runs_tasks(&self) -> bool {
        let serving = match self.phase {
            Phase::Ready => true,
            Phase::Draining => self.drain == Some(Drain::Operator),
            _ => false,
        };
        serving && self.engine == Engine::Up
    }

    /// Whether the engine is on its way out to free its memory.
    pub fn unloading(&self) -> bool {
        self.drain == Some(Drain::Unload) && matches!(self.phase, Phase::Draining | Phase::Stopping)
    }

    /// Whether a reload could still be rolled back, or its old engine is not gone.
    pub fn reload_under_way(&self) -> bool {
        self.reload
            .is_some_and(|reload| reload.mode != ReloadMode::Restart && !reload.state.is_over())
    }

    /// Takes an event in. `random` is at least 0 and below 1. A request that
    /// cannot be followed changes nothing.
    pub fn on(&mut self, event: Event, now: Instant, random: f64) -> Result<Reaction, Refusal> {
        let out = Step::new(self, now, random).take(event)?;
        debug_assert!(self.phase != Phase::Ready || self.engine == Engine::Up);
        Ok(out)
    }
}
