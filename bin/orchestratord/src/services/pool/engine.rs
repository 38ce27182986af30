//! What the pool's actor does about its engine: takes in what the supervisor
//! reports and what operators ask, lets [`super::lifecycle`] decide, and
//! carries out what follows.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use metrics::counter;

use super::actor::Actor;
use super::lifecycle::{
    Drain, Effect, Engine, Event, Move, Phase, ReloadMode, ReloadState, RestartCause, Which,
};
use super::orders::Request;
use super::{Bound, Change, LogTail, Order, PoolSettings, ReloadView, Transition, Wanted};
use crate::app::config::{PoolConfig, shown_model};
use crate::services::event_log::Failure;
use crate::services::telemetry;

/// How many changes of phase are kept.
const TRANSITIONS: usize = 20;

impl Actor {
    /// Takes in what the supervisor says, unless a newer order overtook it. That
    /// an engine has retired is true under any order, and that one ended by itself
    /// is if all that was ordered since is its end.
    pub(super) fn report(&mut self, serial: u64, change: Change) {
        let holds = match change {
            Change::Retired => true,
            Change::Exited { .. } => self.phase() == Phase::Stopping && serial + 1 == self.serial(),
            _ => false,
        };
        if serial < self.serial() && !holds {
            tracing::debug!(pool = %self.settings.id, ?change, "a report that was overtaken");
            return;
        }
        match change {
            Change::Provisioning => self.take(Event::Providing, "engine and model are provided"),
            Change::Starting => self.take(Event::Loading, "the engine loads the model"),
            Change::Trouble(failure) => {
                let message = &failure.message;
                tracing::warn!(pool = %self.settings.id, "the pool will not get ready: {message}");
                self.note_error(failure);
            }
            Change::Ready(bound) => {
                self.take(Event::Ready, "the engine is ready");
                self.bound(bound);
            }
            Change::Replaced(bound) => {
                self.take(Event::Replaced, "the new engine took over");
                self.bound(bound);
            }
            Change::Exited { cause, failure } => self.fails(Event::Exited(cause), failure),
            Change::NotStarted { failure, log } => {
                if !log.is_empty() {
                    self.engine_log = LogTail::of(log);
                }
                let retriable = failure.retriable;
                self.fails(Event::NotStarted { retriable }, failure);
            }
            Change::Lost(failure) => self.fails(Event::Lost, failure),
            Change::Stopped => self.take(Event::Stopped, "the engine is stopped"),
            Change::NotReplaced(failure) => {
                self.reload_failed(failure);
                self.take(Event::NotReplaced, "the new engine could not be had");
            }
            Change::NoRoom(why) => {
                if let Some(reload) = &mut self.reload {
                    reload.note = Some(why.clone());
                }
                self.take(
                    Event::NoRoom,
                    &format!("reload, the old engine first: {why}"),
                );
            }
            Change::Capacity(slots) => self.capacity = Some(slots),
            Change::Retired => {
                self.retire_until = None;
                self.take(Event::Retired, "the old engine is gone");
            }
        }
    }

    /// Follows what an operator asks, or says why not.
    pub(super) fn request(&mut self, request: Request) -> Result<(), Failure> {
        match request {
            Request::Drain(deadline) => {
                let until = Instant::now() + deadline;
                self.event(Event::Drain { until }, "drain was asked for")
            }
            Request::Resume => self.event(Event::Resume, "resume was asked for"),
            Request::Reload(request) => {
                let config = request.applied_to(&self.settings.config);
                self.begin_reload(config)
            }
            Request::Apply(config) => self.apply(*config),
            Request::Unload(how, why) => self.unload(how, why),
        }
    }

    fn apply(&mut self, config: PoolConfig) -> Result<(), Failure> {
        let coming = self.candidate.as_ref();
        let current = coming.unwrap_or(&self.settings.config);
        if config == **current {
            return Ok(());
        }
        if coming.is_none() && config.same_engine(current) {
            self.adopt(Arc::new(config));
            return Ok(());
        }
        self.begin_reload(config)
    }

    fn begin_reload(&mut self, config: PoolConfig) -> Result<(), Failure> {
        let model = shown_model(&config.model);
        let candidate = self.candidate.replace(Arc::new(config));
        let last = self.reload.take();
        let begun = self.event(Event::Reload, "reload was asked for");
        if begun.is_err() {
            (self.candidate, self.reload) = (candidate, last);
        } else {
            self.show_reload(model);
        }
        begun
    }

    /// An event whose outcome is nobody's question.
    pub(super) fn take(&mut self, event: Event, cause: &str) {
        // Only requests are refused, and those have somebody who asks.
        let _ = self.event(event, cause);
    }

    /// An event that comes of a failure.
    fn fails(&mut self, event: Event, mut failure: Failure) {
        let cause = failure.message.clone();
        if matches!(event, Event::Exited(_)) {
            failure.retriable = true;
        }
        self.note_error(failure.clone());
        let before = self.lifecycle.reload().map(|reload| reload.state);
        self.take(event, &cause);
        let after = self.lifecycle.reload().map(|reload| reload.state);
        // Only what turned the reload is its error: it may go on without the old
        // engine, and be done before the new one ends.
        let turned = matches!(
            after,
            Some(ReloadState::RollingBack | ReloadState::RolledBack | ReloadState::Failed)
        );
        let first = |reload: &ReloadView| reload.error.is_none();
        if turned && before != after && self.reload.as_ref().is_some_and(first) {
            self.reload_failed(failure);
        }
    }

    fn note_error(&mut self, failure: Failure) {
        self.last_error = Some(failure);
        self.last_error_at = Some(SystemTime::now());
    }

    fn reload_failed(&mut self, failure: Failure) {
        if let Some(reload) = &mut self.reload {
            reload.error = Some(failure);
        }
    }

    /// Takes an event in and carries out what follows.
    pub(super) fn event(&mut self, event: Event, cause: &str) -> Result<(), Failure> {
        let reaction = self
            .lifecycle
            .on(event, Instant::now(), random())
            .map_err(|refusal| self.refused(refusal))?;
        if reaction.ignored {
            let phase = self.phase().as_str();
            tracing::debug!(pool = %self.settings.id, ?event, phase, "changes nothing");
            return Ok(());
        }
        if let Some(cause) = reaction.counted {
            self.count_restart(cause);
        }
        if reaction.opened {
            self.say_why_open();
        }
        if let Some(Move { from, to }) = reaction.moved {
            self.note_transition(from, to, cause);
            self.note_residence(event, from, to);
        }
        self.note_engine();
        if self.lifecycle.engine() != Engine::Up {
            self.context = None;
            self.capacity = None;
            self.distrust = None;
        }
        for effect in reaction.effects {
            self.carry_out(effect);
        }
        if let (Some(shown), Some(reload)) = (&mut self.reload, self.lifecycle.reload()) {
            (shown.mode, shown.state) = (reload.mode, reload.state);
        }
        Ok(())
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::Start(Which::Current) => {
                let config = Arc::clone(&self.settings.config);
                self.order(Wanted::Start {
                    config,
                    prove: false,
                });
            }
            Effect::Start(Which::Candidate) => {
                let config = self.candidate_or_current();
                self.order(Wanted::Start {
                    config,
                    prove: true,
                });
            }
            Effect::Replace => {
                let config = self.candidate_or_current();
                self.order(Wanted::Replace(config));
            }
            Effect::Keep => self.order(Wanted::Keep),
            Effect::Rest => self.order(Wanted::Rest),
            Effect::Adopt => {
                if let Some(config) = self.candidate.take() {
                    self.adopt(config);
                }
            }
            Effect::DropCandidate => self.candidate = None,
            Effect::EndQueued => {
                let failure = self.doom().unwrap_or_else(|| self.drained());
                self.end_queued(&failure);
            }
            Effect::CancelRunning => self.end_running(|_| true),
            Effect::RetireUntil(until) => self.retire_until = Some(until.into()),
            Effect::End => self.ended = true,
        }
    }

    fn candidate_or_current(&self) -> Arc<PoolConfig> {
        let candidate = self.candidate.as_ref();
        Arc::clone(candidate.unwrap_or(&self.settings.config))
    }

    fn order(&mut self, wanted: Wanted) {
        let serial = self.serial() + 1;
        self.orders.send_replace(Order { serial, wanted });
    }

    fn serial(&self) -> u64 {
        self.orders.borrow().serial
    }

    fn adopt(&mut self, config: Arc<PoolConfig>) {
        let (id, drain) = (self.settings.id.clone(), self.settings.drain);
        self.settings = Arc::new(PoolSettings::new(id, config, drain));
        self.lifecycle.set_policy(self.settings.policy());
        self.queue
            .set_limits(self.settings.queue_capacity, self.settings.batch_ageing);
    }

    /// Takes an engine for the tasks, if the machine took it for ready.
    fn bound(&mut self, bound: Bound) {
        // The one that the pool has may be told of again, with tasks on it.
        if self.lifecycle.engine() != Engine::Up || self.is_current(&bound.context) {
            return;
        }
        if self.context.is_some() && self.retire_until.is_none() {
            let until = Instant::now() + self.settings.drain;
            self.retire_until = Some(until.into());
        }
        if let Some(config) = bound.config
            && !config.same_engine(&self.settings.config)
        {
            self.adopt(config);
        }
        self.context = Some(bound.context);
        self.capacity = None;
        self.engine_log = bound.log;
        self.engines += 1;
        self.hold = None;
        self.distrust = None;
    }

    /// The time of tasks on an engine that was replaced is up.
    pub(super) fn end_retiring(&mut self) {
        self.retire_until = None;
        let current = self.context.clone();
        self.end_running(|running| {
            current
                .as_ref()
                .is_none_or(|current| !running.is_on(current))
        });
    }

    /// Notes that a task's end makes it doubtful that the engine works.
    pub(super) fn raise_doubt(&mut self, reason: &str) {
        tracing::info!(pool = %self.settings.id, reason, "it is doubtful that the engine works");
        self.doubt += 1;
    }

    /// Tells the machine when a drain is over.
    pub(super) fn settle_drain(&mut self) {
        let waits = match self.lifecycle.drain() {
            Some(Drain::Operator) => !self.queue.is_empty(),
            _ => false,
        };
        if self.phase() == Phase::Draining && self.runs.is_empty() && !waits {
            self.take(Event::TasksOver, "no task is left");
        }
    }

    fn show_reload(&mut self, model: String) {
        self.reload = self.lifecycle.reload().map(|reload| ReloadView {
            state: reload.state,
            mode: reload.mode,
            model,
            note: match reload.mode {
                ReloadMode::Restart if reload.state == ReloadState::Done => {
                    Some("no engine is wanted now; it is tried when one is".to_owned())
                }
                ReloadMode::Restart => Some("no engine was running".to_owned()),
                _ => None,
            },
            error: None,
        });
    }

    fn count_restart(&self, cause: RestartCause) {
        counter!(telemetry::RESTARTS, "pool" => self.label(), "cause" => cause.as_str())
            .increment(1);
        if matches!(cause, RestartCause::Crash | RestartCause::Hang) {
            counter!(telemetry::ENGINE_EXITS, "pool" => self.label()).increment(1);
        }
    }

    fn say_why_open(&mut self) {
        let restart = &self.settings.config.restart;
        let (crashes, window) = (restart.crashes, restart.window_seconds);
        if let Some(error) = &mut self.last_error {
            error.message = format!(
                "the engine ended {crashes} times within {window} s, or once more after that, and is not started again for now; the last time: {}",
                error.message
            );
            error.hint = Some(format!(
                "its log tells more; POST /v2/pools/{}/resume tries it again, and /reload with another model or other flags",
                self.settings.id
            ));
        }
    }

    fn note_transition(&mut self, from: Phase, to: Phase, cause: &str) {
        let pool = &self.settings.id;
        tracing::info!(%pool, from = from.as_str(), to = to.as_str(), cause, "pool phase");
        let transitions = Arc::make_mut(&mut self.transitions);
        if transitions.len() == TRANSITIONS {
            transitions.remove(0);
        }
        transitions.push(Transition {
            from,
            to,
            cause: cause.to_owned(),
            at: SystemTime::now(),
        });
    }

    pub(super) fn phase(&self) -> Phase {
        self.lifecycle.phase()
    }
}

/// At least 0 and below 1; different from pool to pool.
fn random() -> f64 {
    const BITS: u32 = 53;
    let (high, _) = uuid::Uuid::new_v4().as_u64_pair();
    // A uuid's fixed bits lie low in this half, where they hardly count.
    (high >> (u64::BITS - BITS)) as f64 / (1u64 << BITS) as f64
}
