//! What each event does in each phase.

use std::time::{Duration, Instant};

use super::{
    Configured, Drain, Effect, Engine, Event, Lifecycle, Move, Phase, Reaction, Refusal, Reload,
    ReloadMode, ReloadState, RestartCause, Which,
};
use crate::services::pool::restart::Verdict;

/// How long the supervisor may take to end an engine before it is asked again.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long tasks that were told to end are waited for: their engine is ended in
/// any case, and a busy one may let go of a task late.
const END_LIMIT: Duration = Duration::from_secs(10);

/// One event being taken in.
pub(super) struct Step<'a> {
    pub(super) life: &'a mut Lifecycle,
    pub(super) now: Instant,
    random: f64,
    out: Reaction,
}

impl<'a> Step<'a> {
    pub(super) fn new(life: &'a mut Lifecycle, now: Instant, random: f64) -> Self {
        Self {
            life,
            now,
            random,
            out: Reaction::default(),
        }
    }

    pub(super) fn take(mut self, event: Event) -> Result<Reaction, Refusal> {
        match event {
            Event::Providing | Event::Loading => self.progress(event == Event::Loading),
            Event::Ready => self.ready(),
            Event::Exited(cause) => self.exited(cause),
            Event::NotStarted { retriable } => self.not_started(retriable),
            Event::Stopped => self.stopped(),
            Event::Lost => self.lost(),
            Event::Replaced => self.replaced(),
            Event::NotReplaced => self.not_replaced(),
            Event::NoRoom => self.no_room(),
            Event::Retired => self.retired(),
            Event::Drain { until } => self.drain(until)?,
            Event::Resume => self.resume()?,
            Event::Reload => self.reload()?,
            Event::Unload { waited_for } => self.unload(waited_for)?,
            Event::Wanted => self.wanted(),
            Event::Shutdown { until } => self.shut_down(until),
            Event::TasksOver => self.tasks_over(),
            Event::TimeUp => self.time_up(),
        }
        Ok(self.out)
    }

    pub(super) fn enter(&mut self, phase: Phase, until: Option<Instant>) {
        let from = self.life.phase;
        self.life.until = until;
        if from != phase {
            self.life.overdue = false;
            self.life.phase = phase;
            self.life.since = self.now;
            // One event may pass through a phase; what counts is where it led.
            let from = self.out.moved.map_or(from, |moved| moved.from);
            self.out.moved = Some(Move { from, to: phase });
        }
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.out.effects.push(effect);
    }

    pub(super) fn ignore(&mut self) {
        self.out.ignored = true;
    }

    fn count(&mut self, cause: RestartCause) {
        let restarts = &mut self.life.restarts;
        *match cause {
            RestartCause::Crash => &mut restarts.crash,
            RestartCause::Hang => &mut restarts.hang,
            RestartCause::LoadFailure => &mut restarts.load_failure,
            RestartCause::Reload => &mut restarts.reload,
        } += 1;
        self.out.counted = Some(cause);
    }

    pub(super) fn start(&mut self, which: Which) {
        self.life.engine = Engine::Starting;
        self.life.loading = false;
        self.life.drain = None;
        self.life.resume = false;
        self.life.configured = Configured::AsNow;
        self.enter(Phase::Provisioning, None);
        self.effect(Effect::Start(which));
    }

    pub(super) fn set_reload(&mut self, state: ReloadState) {
        if let Some(reload) = &mut self.life.reload {
            reload.state = state;
        }
    }

    pub(super) fn reload_is(&self, state: ReloadState) -> bool {
        self.life.reload.is_some_and(|reload| reload.state == state)
    }

    /// Whether the engine that starts can still be rolled back.
    fn candidate_starts(&self) -> bool {
        self.life.reload.is_some_and(|reload| {
            reload.mode == ReloadMode::DrainFirst && reload.state == ReloadState::Starting
        })
    }

    /// Ends a reload that could still be rolled back, if there is one.
    pub(super) fn end_reload(&mut self, state: ReloadState) {
        let Some(reload) = self.life.reload.filter(|reload| !reload.state.is_over()) else {
            return;
        };
        let adopted = reload.mode == ReloadMode::Restart;
        // A new engine that serves already, or the only one that is wanted, is
        // not given up.
        if reload.state == ReloadState::Retiring || (adopted && state == ReloadState::Abandoned) {
            return;
        }
        if !adopted {
            self.effect(Effect::DropCandidate);
        }
        self.set_reload(state);
    }

    fn progress(&mut self, loading: bool) {
        match self.life.phase {
            Phase::Provisioning | Phase::Starting => {
                self.life.loading = loading;
                let phase = if loading {
                    Phase::Starting
                } else {
                    Phase::Provisioning
                };
                self.enter(phase, None);
            }
            Phase::Draining if self.life.engine == Engine::Starting => self.life.loading = loading,
            // An engine that is not ours, and has come back by itself.
            Phase::Backoff | Phase::Failed if loading => {
                self.life.engine = Engine::Starting;
                self.life.loading = true;
                self.enter(Phase::Starting, None);
            }
            _ => self.ignore(),
        }
    }

    fn ready(&mut self) {
        match (self.life.phase, self.life.engine) {
            (Phase::Provisioning | Phase::Starting | Phase::Backoff | Phase::Failed, _) => {
                self.came_up();
                self.enter(Phase::Ready, None);
            }
            // The supervisor says which engine it has.
            (Phase::Ready, _) => {}
            (Phase::Draining, Engine::Starting | Engine::Up) => self.came_up(),
            // Nobody asked for it.
            (Phase::Draining | Phase::Stopped | Phase::Unloaded, _) => self.effect(Effect::Rest),
            // Its end has been asked for.
            (Phase::Stopping, _) => self.ignore(),
        }
    }

    fn came_up(&mut self) {
        self.life.engine = Engine::Up;
        self.life.history.started();
        let Some(reload) = self.life.reload else {
            return;
        };
        match (reload.mode, reload.state) {
            (ReloadMode::Restart, ReloadState::Starting) => {
                self.count(RestartCause::Reload);
                self.set_reload(ReloadState::Done);
            }
            (_, ReloadState::Starting) => {
                self.effect(Effect::Adopt);
                self.count(RestartCause::Reload);
                self.set_reload(ReloadState::Done);
            }
            (_, ReloadState::RollingBack) => self.set_reload(ReloadState::RolledBack),
            _ => {}
        }
    }

    fn exited(&mut self, cause: RestartCause) {
        match self.life.phase {
            // One that is not ours may be gone before it was ready.
            Phase::Provisioning | Phase::Starting | Phase::Ready => {
                if self.candidate_starts() {
                    return self.not_started(true);
                }
                self.life.engine = Engine::None;
                self.count(cause);
                let verdict =
                    self.life
                        .history
                        .crashed(&self.life.policy.restart, self.now, self.random);
                if self.reload_is(ReloadState::Preparing) {
                    // The old engine is gone, so the new one need not wait.
                    self.life.reload = Some(Reload {
                        mode: ReloadMode::DrainFirst,
                        state: ReloadState::Starting,
                    });
                    self.start(Which::Candidate);
                } else {
                    self.after_crash(verdict);
                }
            }
            Phase::Draining if self.life.drain == Some(Drain::Unload) => {
                self.crashed_in_unload(cause);
            }
            Phase::Draining if self.life.engine != Engine::None => {
                self.count(cause);
                self.drained_engine_gone();
            }
            Phase::Stopping => self.crashed_while_stopping(cause),
            _ => self.ignore(),
        }
    }

    /// It ended by itself before it could be ended: its tasks had failed by that, and
    /// so its end was asked for.
    fn crashed_while_stopping(&mut self, cause: RestartCause) {
        self.count(cause);
        if self.life.drain == Some(Drain::Unload) {
            let policy = &self.life.policy.restart;
            let verdict = self.life.history.crashed(policy, self.now, self.random);
            if let open @ Verdict::Open { .. } = verdict {
                return self.after_crash(open);
            }
        }
        self.engine_is_gone();
        // One that was retiring is gone, too.
        self.retired();
    }

    /// Its tasks are given back, and the next engine is soon wanted for them: it
    /// counts as any other crash, but for the pause.
    fn crashed_in_unload(&mut self, cause: RestartCause) {
        if self.life.engine == Engine::None {
            return self.ignore();
        }
        self.count(cause);
        let policy = &self.life.policy.restart;
        match self.life.history.crashed(policy, self.now, self.random) {
            Verdict::Restart { .. } => self.drained_engine_gone(),
            open @ Verdict::Open { .. } => self.after_crash(open),
        }
    }

    fn after_crash(&mut self, verdict: Verdict) {
        match verdict {
            Verdict::Restart { after } => self.enter(Phase::Backoff, Some(self.now + after)),
            Verdict::Open { cool_down } => {
                self.out.opened = true;
                self.fail(cool_down);
            }
        }
    }

    fn fail(&mut self, retry_after: Duration) {
        self.life.engine = Engine::None;
        self.life.drain = None;
        self.end_reload(ReloadState::Failed);
        self.enter(Phase::Failed, Some(self.now + retry_after));
        self.effect(Effect::EndQueued);
    }

    fn not_started(&mut self, retriable: bool) {
        match self.life.phase {
            Phase::Provisioning | Phase::Starting => {
                self.life.engine = Engine::None;
                if self.candidate_starts() {
                    self.effect(Effect::DropCandidate);
                    self.start(Which::Current);
                    self.set_reload(ReloadState::RollingBack);
                } else {
                    self.count(RestartCause::LoadFailure);
                    let retry_after = self.life.history.not_started(retriable, self.random);
                    self.fail(retry_after);
                }
            }
            Phase::Draining if self.life.engine != Engine::None => {
                if !self.candidate_starts() {
                    self.count(RestartCause::LoadFailure);
                }
                self.drained_engine_gone();
            }
            Phase::Stopping => self.engine_is_gone(),
            _ => self.ignore(),
        }
    }

    /// The engine of a pool that drains is gone before its tasks are.
    fn drained_engine_gone(&mut self) {
        self.life.engine = Engine::None;
        match self.life.drain {
            Some(Drain::Reload) => {
                self.set_reload(ReloadState::Starting);
                self.start(Which::Candidate);
            }
            // The queue is kept.
            Some(Drain::Unload) => {}
            _ => {
                self.end_reload(ReloadState::Failed);
                self.effect(Effect::EndQueued);
            }
        }
    }

    /// The engine whose end was asked for is gone.
    fn engine_is_gone(&mut self) {
        self.life.engine = Engine::None;
        match self.life.drain {
            Some(Drain::Reload) => {
                self.set_reload(ReloadState::Starting);
                self.start(Which::Candidate);
            }
            Some(Drain::Shutdown) => {
                self.enter(Phase::Stopped, None);
                self.effect(Effect::End);
            }
            _ if self.life.resume => self.start(Which::Current),
            Some(Drain::Unload) => {
                self.life.drain = None;
                self.life.configured = Configured::AsNow;
                self.enter(Phase::Unloaded, None);
            }
            _ => self.enter(Phase::Stopped, None),
        }
    }

    fn stopped(&mut self) {
        match self.life.phase {
            Phase::Stopping => self.engine_is_gone(),
            Phase::Provisioning | Phase::Starting | Phase::Ready => self.lost(),
            Phase::Draining if self.life.engine != Engine::None => self.drained_engine_gone(),
            _ => return self.ignore(),
        }
        // One that was retiring is gone, too.
        self.retired();
    }

    fn lost(&mut self) {
        match self.life.phase {
            Phase::Provisioning | Phase::Starting | Phase::Ready => {
                self.count(RestartCause::Crash);
                let retry_after = self.life.history.not_started(true, self.random);
                self.fail(retry_after);
            }
            Phase::Draining if self.life.engine != Engine::None => {
                self.count(RestartCause::Crash);
                if self.life.drain == Some(Drain::Reload) {
                    let retry_after = self.life.history.not_started(true, self.random);
                    self.fail(retry_after);
                } else {
                    self.drained_engine_gone();
                }
            }
            Phase::Stopping => self.engine_is_gone(),
            _ => self.ignore(),
        }
        // What it was retiring is gone, too.
        self.retired();
    }

    fn replaced(&mut self) {
        let preparing = self.reload_is(ReloadState::Preparing);
        if self.life.phase != Phase::Ready || !preparing {
            return self.ignore();
        }
        self.life.history.forget();
        self.count(RestartCause::Reload);
        self.set_reload(ReloadState::Retiring);
        self.life.since = self.now;
        self.out.moved = Some(Move {
            from: Phase::Ready,
            to: Phase::Ready,
        });
        self.effect(Effect::Adopt);
        self.effect(Effect::RetireUntil(self.now + self.life.policy.drain));
    }

    fn not_replaced(&mut self) {
        let preparing = self.reload_is(ReloadState::Preparing);
        if preparing {
            self.end_reload(ReloadState::RolledBack);
        } else {
            self.ignore();
        }
    }

    fn no_room(&mut self) {
        let preparing = self.reload_is(ReloadState::Preparing);
        if self.life.phase != Phase::Ready || !preparing {
            return self.ignore();
        }
        self.life.reload = Some(Reload {
            mode: ReloadMode::DrainFirst,
            state: ReloadState::Draining,
        });
        self.life.drain = Some(Drain::Reload);
        self.enter(Phase::Draining, Some(self.now + self.life.policy.drain));
    }

    fn retired(&mut self) {
        if self.reload_is(ReloadState::Retiring) {
            self.set_reload(ReloadState::Done);
        }
    }

    fn tasks_over(&mut self) {
        if self.life.phase != Phase::Draining {
            return self.ignore();
        }
        if self.life.engine == Engine::None {
            return self.engine_is_gone();
        }
        self.stop_engine();
    }

    pub(super) fn stop_engine(&mut self) {
        self.life.engine = Engine::Stopping;
        self.enter(Phase::Stopping, Some(self.now + STOP_LIMIT));
        self.effect(Effect::Rest);
    }

    fn time_up(&mut self) {
        if self.life.until.is_none_or(|until| until > self.now) {
            return self.ignore();
        }
        self.life.until = None;
        match self.life.phase {
            Phase::Backoff | Phase::Failed => self.start(Which::Current),
            Phase::Draining if self.life.overdue => self.tasks_over(),
            Phase::Draining => {
                self.life.overdue = true;
                self.life.until = Some(self.now + END_LIMIT);
                if self.life.drain != Some(Drain::Reload) {
                    self.effect(Effect::EndQueued);
                }
                self.effect(Effect::CancelRunning);
            }
            // The daemon's end waits for no engine that outlives KILL.
            Phase::Stopping if self.life.drain == Some(Drain::Shutdown) => self.engine_is_gone(),
            // Nor is another one started beside it: the supervisor is asked again.
            Phase::Stopping => {
                self.life.until = Some(self.now + STOP_LIMIT);
                self.effect(Effect::Rest);
            }
            _ => self.ignore(),
        }
    }
}
