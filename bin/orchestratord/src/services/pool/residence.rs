//! Whether a pool's engine is in memory: loaded for the first task, unloaded
//! when none comes any more or when somebody asks, and how long loads take.

use std::time::{Duration, Instant};

use metrics::{counter, histogram};

use super::actor::Actor;
use super::lifecycle::{Engine, Event, Phase, ReloadState};
use super::orders::{LoadCause, Unload, UnloadCause};
use crate::services::estimates::{Loading, ServiceTimes};
use crate::services::event_log::Failure;
use crate::services::telemetry;

/// What is known of the engine's place in memory.
#[derive(Debug)]
pub(super) struct Residence {
    /// Since when no task runs or waits.
    pub(super) idle_since: Option<Instant>,
    pub(super) loaded_since: Option<Instant>,
    pub(super) load_took: Option<Duration>,
    pub(super) loads: ServiceTimes,
    /// Since when the engine loads.
    loading_since: Option<Instant>,
    load_cause: LoadCause,
    /// Why it is being unloaded.
    unload_cause: Option<UnloadCause>,
}

impl Residence {
    /// That of a pool without tasks and engine.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            idle_since: Some(now),
            loaded_since: None,
            load_took: None,
            loads: ServiceTimes::default(),
            loading_since: None,
            load_cause: LoadCause::Begin,
            unload_cause: None,
        }
    }
}

impl Actor {
    /// Whether a task runs or waits.
    fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.runs.is_empty()
    }

    /// Has the engine of an unloaded pool loaded if a task waits for it, and
    /// notes since when none does. Called after everything that happens.
    pub(super) fn settle_residence(&mut self) {
        if self.phase() == Phase::Unloaded && !self.queue.is_empty() {
            self.take(Event::Wanted, "a task came");
        }
        if self.is_busy() {
            self.residence.idle_since = None;
        } else if self.residence.idle_since.is_none() {
            self.residence.idle_since = Some(Instant::now());
        }
    }

    /// When the engine is unloaded for want of tasks, unless one comes: the time
    /// counts from the last task, or from when the engine was ready.
    pub(super) fn unloads_at(&self) -> Option<Instant> {
        let config = &self.settings.config;
        let ttl = config.idle_ttl_seconds.filter(|_| !config.pin)?;
        if self.phase() != Phase::Ready || self.lifecycle.reload_under_way() {
            return None;
        }
        let since = self.residence.idle_since?;
        let since = self
            .residence
            .loaded_since
            .map_or(since, |loaded| loaded.max(since));
        since.checked_add(Duration::from_secs(ttl))
    }

    /// The time of an engine without tasks may be up.
    pub(super) fn end_idleness(&mut self) {
        let due = |at: Instant| at <= Instant::now();
        if self.unloads_at().is_some_and(due) && !self.is_busy() {
            // It is refused for nothing that was not looked at here.
            let _ = self.unload(Unload::IfIdle, UnloadCause::IdleTtl);
        }
    }

    pub(super) fn unload(&mut self, how: Unload, why: UnloadCause) -> Result<(), Failure> {
        if self.settings.config.pin && matches!(why, UnloadCause::Memory(_)) {
            return Err(self.pinned());
        }
        if how == Unload::IfIdle && self.is_busy() {
            return Err(self.busy());
        }
        let event = Event::Unload {
            waited_for: !self.queue.is_empty(),
        };
        let before = self.lifecycle.unloading();
        self.event(event, &why.to_string())?;
        if self.lifecycle.unloading() && !before {
            self.residence.unload_cause = Some(why);
        }
        Ok(())
    }

    /// Follows the engine through its phases. `event` led from one to the other.
    pub(super) fn note_residence(&mut self, event: Event, from: Phase, to: Phase) {
        let now = Instant::now();
        if let (Phase::Provisioning, Some(cause)) = (to, self.start_cause(event, from)) {
            self.residence.load_cause = cause;
        }
        if to == Phase::Starting {
            self.residence.loading_since = Some(now);
        }
        if to == Phase::Unloaded
            && let Some(cause) = self.residence.unload_cause.take()
        {
            counter!(telemetry::UNLOADS, "pool" => self.label(), "cause" => cause.label())
                .increment(1);
        }
        let new = self.residence.loaded_since.is_none() || event == Event::Replaced;
        if to == Phase::Ready && new {
            self.note_load(event, now);
        }
    }

    /// Why a start was ordered; `None` where it goes on as it was.
    fn start_cause(&self, event: Event, from: Phase) -> Option<LoadCause> {
        let reload = self.lifecycle.reload().map(|reload| reload.state);
        match event {
            Event::Providing | Event::Loading => None,
            Event::Wanted => Some(LoadCause::Task),
            Event::Resume => Some(LoadCause::Asked),
            _ if matches!(
                reload,
                Some(ReloadState::Starting | ReloadState::RollingBack)
            ) =>
            {
                Some(LoadCause::Reload)
            }
            // A start was asked for before the engine was gone.
            Event::Stopped if from == Phase::Stopping => Some(LoadCause::Asked),
            _ => Some(LoadCause::Restart),
        }
    }

    fn note_load(&mut self, event: Event, now: Instant) {
        let residence = &mut self.residence;
        residence.loaded_since = Some(now);
        let cause = match event {
            Event::Replaced => LoadCause::Reload,
            _ => residence.load_cause,
        };
        let began = residence.loading_since.take();
        counter!(telemetry::LOADS, "pool" => self.settings.id.to_string(), "cause" => cause.label())
            .increment(1);
        if let Some(began) = began.filter(|_| event == Event::Ready) {
            let took = now.saturating_duration_since(began);
            residence.load_took = Some(took);
            residence.loads.record(took);
            histogram!(telemetry::LOAD_TIME, "pool" => self.settings.id.to_string()).record(took);
        }
    }

    /// Notes that no engine serves, if none does.
    pub(super) fn note_engine(&mut self) {
        if self.lifecycle.engine() != Engine::Up {
            self.residence.loaded_since = None;
        }
        if self.phase() != Phase::Starting {
            self.residence.loading_since = None;
        }
    }

    /// How long until the engine takes tasks.
    pub(super) fn until_ready(&self) -> Duration {
        let now = Instant::now();
        let elapsed = |since: Instant| now.saturating_duration_since(since);
        let stage = match self.phase() {
            Phase::Ready => return Duration::ZERO,
            Phase::Starting => Loading::Begun(elapsed(self.lifecycle.since())),
            Phase::Backoff => {
                let next = self.lifecycle.next_try().unwrap_or(now);
                Loading::After(next.saturating_duration_since(now))
            }
            Phase::Provisioning => Loading::After(self.board.known_remaining()),
            _ => Loading::After(Duration::ZERO),
        };
        let measured = self.residence.loads.measured_mean();
        stage.until_ready(measured, self.board.remaining())
    }
}
