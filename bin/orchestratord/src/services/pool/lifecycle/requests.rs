//! What people and tasks ask: drain, resume, reload, unload, shut down.

use std::time::Instant;

use super::step::Step;
use super::{
    Configured, Drain, Effect, Engine, Phase, Refusal, Reload, ReloadMode, ReloadState, Which,
};

impl Step<'_> {
    pub(super) fn drain(&mut self, until: Instant) -> Result<(), Refusal> {
        if self.life.drain == Some(Drain::Shutdown) {
            return Err(Refusal::ShuttingDown);
        }
        match self.life.phase {
            Phase::Stopped => {}
            Phase::Stopping => {
                self.life.resume = false;
                if matches!(self.life.drain, Some(Drain::Reload | Drain::Unload)) {
                    self.effect(Effect::EndQueued);
                }
                self.end_reload(ReloadState::Abandoned);
                self.life.drain = Some(Drain::Operator);
            }
            _ => self.begin_drain(Drain::Operator, until),
        }
        Ok(())
    }

    fn begin_drain(&mut self, why: Drain, until: Instant) {
        let preparing = self.reload_is(ReloadState::Preparing);
        // A candidate that is the one engine under way is kept for the tasks
        // that wait; anything else of a reload is given up.
        if self.life.engine != Engine::Starting {
            self.end_reload(ReloadState::Abandoned);
        }
        if preparing {
            self.effect(Effect::Keep);
        }
        self.life.drain = Some(why);
        self.life.overdue = false;
        self.life.resume = false;
        self.enter(Phase::Draining, Some(until));
        let none_for_the_queue = self.life.engine == Engine::None || self.outdated();
        if why == Drain::Shutdown || none_for_the_queue {
            self.effect(Effect::EndQueued);
        }
    }

    pub(super) fn resume(&mut self) -> Result<(), Refusal> {
        if self.life.drain == Some(Drain::Shutdown) {
            return Err(Refusal::ShuttingDown);
        }
        match (self.life.phase, self.life.drain) {
            (Phase::Draining, Some(Drain::Operator | Drain::Unload))
                if self.outdated() && self.life.engine == Engine::Up =>
            {
                self.life.resume = true;
            }
            (Phase::Draining, Some(Drain::Operator | Drain::Unload)) => {
                self.life.drain = None;
                match (self.life.engine, self.life.loading) {
                    (Engine::Up, _) => self.enter(Phase::Ready, None),
                    (Engine::Starting, true) => self.enter(Phase::Starting, None),
                    (Engine::Starting, false) => self.enter(Phase::Provisioning, None),
                    (Engine::None | Engine::Stopping, _) => self.start(Which::Current),
                }
            }
            (Phase::Stopping, Some(Drain::Operator | Drain::Unload)) => self.life.resume = true,
            (Phase::Stopped | Phase::Unloaded | Phase::Backoff | Phase::Failed, _) => {
                self.life.history.forget();
                self.start(Which::Current);
            }
            // It is on its way already.
            _ => {}
        }
        Ok(())
    }

    pub(super) fn reload(&mut self) -> Result<(), Refusal> {
        if self.life.drain == Some(Drain::Shutdown) {
            return Err(Refusal::ShuttingDown);
        }
        if self.life.reload_under_way() {
            return Err(Refusal::ReloadUnderWay);
        }
        if self.life.phase == Phase::Unloaded || self.life.unloading() {
            self.adopt_unloaded();
            return Ok(());
        }
        let mut mode = ReloadMode::Restart;
        match self.life.phase {
            Phase::Draining | Phase::Stopping => return Err(Refusal::BeingDrained),
            Phase::Ready => {
                mode = ReloadMode::Beside;
                self.effect(Effect::Replace);
            }
            Phase::Provisioning
            | Phase::Starting
            | Phase::Backoff
            | Phase::Failed
            | Phase::Stopped
            | Phase::Unloaded => {
                self.life.history.forget();
                self.effect(Effect::Adopt);
                self.start(Which::Current);
            }
        }
        let state = match mode {
            ReloadMode::Beside => ReloadState::Preparing,
            _ => ReloadState::Starting,
        };
        self.life.reload = Some(Reload { mode, state });
        Ok(())
    }

    /// A pool without an engine is given another configuration and gets no engine
    /// by that: it is tried when the pool is next started.
    fn adopt_unloaded(&mut self) {
        self.life.history.forget();
        if self.life.engine != Engine::None {
            self.life.configured = Configured::AsBefore;
        }
        self.effect(Effect::Adopt);
        self.life.reload = Some(Reload {
            mode: ReloadMode::Restart,
            state: ReloadState::Done,
        });
    }

    pub(super) fn unload(&mut self, waited_for: bool) -> Result<(), Refusal> {
        match self.life.drain {
            Some(Drain::Shutdown) => return Err(Refusal::ShuttingDown),
            Some(Drain::Unload) => {
                self.life.resume = false;
                return Ok(());
            }
            _ => {}
        }
        if self.life.reload_under_way() {
            return Err(Refusal::ReloadUnderWay);
        }
        match self.life.phase {
            Phase::Draining | Phase::Stopping => return Err(Refusal::BeingDrained),
            Phase::Stopped => return Err(Refusal::Stopped),
            Phase::Ready => {
                self.life.drain = Some(Drain::Unload);
                self.life.overdue = false;
                self.enter(Phase::Draining, None);
            }
            Phase::Provisioning | Phase::Starting if waited_for => {
                return Err(Refusal::LoadsForTasks);
            }
            Phase::Provisioning | Phase::Starting => {
                // What it was to try is tried when it is next started.
                self.end_start_of_reload();
                self.life.drain = Some(Drain::Unload);
                self.stop_engine();
            }
            // There is nothing to free, and the pause is not cut short.
            Phase::Backoff if waited_for => self.ignore(),
            Phase::Backoff | Phase::Failed => self.enter(Phase::Unloaded, None),
            Phase::Unloaded => {}
        }
        Ok(())
    }

    /// Whether the engine that drains has another configuration than it would be
    /// started with now.
    fn outdated(&self) -> bool {
        self.life.configured == Configured::AsBefore
    }

    fn end_start_of_reload(&mut self) {
        if self.reload_is(ReloadState::Starting) {
            self.set_reload(ReloadState::Done);
        }
    }

    /// A task waits for an engine that is not there.
    pub(super) fn wanted(&mut self) {
        if self.life.phase == Phase::Unloaded {
            self.start(Which::Current);
        } else {
            self.ignore();
        }
    }

    pub(super) fn shut_down(&mut self, until: Instant) {
        match self.life.phase {
            Phase::Stopped => {
                self.life.drain = Some(Drain::Shutdown);
                self.effect(Effect::End);
            }
            Phase::Stopping => {
                self.end_reload(ReloadState::Abandoned);
                self.life.drain = Some(Drain::Shutdown);
                self.effect(Effect::EndQueued);
            }
            Phase::Draining if self.life.drain == Some(Drain::Shutdown) => {}
            _ => self.begin_drain(Drain::Shutdown, until),
        }
    }
}
