//! What people ask: drain, resume, reload, shut down.

use std::time::Instant;

use super::step::Step;
use super::{Drain, Effect, Engine, Phase, Refusal, Reload, ReloadMode, ReloadState, Which};

impl Step<'_> {
    pub(super) fn drain(&mut self, until: Instant) -> Result<(), Refusal> {
        if self.life.drain == Some(Drain::Shutdown) {
            return Err(Refusal::ShuttingDown);
        }
        match self.life.phase {
            Phase::Stopped => {}
            Phase::Stopping => {
                self.life.resume = false;
                if self.life.drain == Some(Drain::Reload) {
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
        self.enter(Phase::Draining, Some(until));
        if why == Drain::Shutdown || self.life.engine == Engine::None {
            self.effect(Effect::EndQueued);
        }
    }

    pub(super) fn resume(&mut self) -> Result<(), Refusal> {
        if self.life.drain == Some(Drain::Shutdown) {
            return Err(Refusal::ShuttingDown);
        }
        match (self.life.phase, self.life.drain) {
            (Phase::Draining, Some(Drain::Operator)) => {
                self.life.drain = None;
                match (self.life.engine, self.life.loading) {
                    (Engine::Up, _) => self.enter(Phase::Ready, None),
                    (Engine::Starting, true) => self.enter(Phase::Starting, None),
                    (Engine::Starting, false) => self.enter(Phase::Provisioning, None),
                    (Engine::None | Engine::Stopping, _) => self.start(Which::Current),
                }
            }
            (Phase::Stopping, Some(Drain::Operator)) => self.life.resume = true,
            (Phase::Stopped | Phase::Backoff | Phase::Failed, _) => {
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
            | Phase::Stopped => {
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
