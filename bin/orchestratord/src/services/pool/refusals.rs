//! Why a pool does not do what is asked of it, in words for clients.

use std::time::Instant;

use llama_orch_types::ErrorCode;

use super::Leaving;
use super::actor::Actor;
use super::lifecycle::{Drain, Engine, Phase, Refusal};
use crate::services::event_log::Failure;

impl Actor {
    pub(super) fn refused(&self, refusal: Refusal) -> Failure {
        let pool = &self.settings.id;
        match refusal {
            Refusal::ShuttingDown => self.leaving(),
            Refusal::ReloadUnderWay => {
                Failure::new(ErrorCode::AdmissionReject, "another reload is under way")
                    .with_hint(format!(
                        "GET /v2/pools/{pool} shows how far it is, under `reload`"
                    ))
                    .retriable()
                    .in_pool(pool)
            }
            Refusal::BeingDrained => {
                Failure::new(ErrorCode::AdmissionReject, "the pool is being drained")
                    .with_hint(format!(
                        "POST /v2/pools/{pool}/resume first, or wait until it has stopped"
                    ))
                    .retriable()
                    .in_pool(pool)
            }
            Refusal::LoadsForTasks => Failure::new(
                ErrorCode::AdmissionReject,
                "the pool is being loaded for tasks that wait",
            )
            .with_hint("ask again when it is ready")
            .retriable()
            .in_pool(pool),
            Refusal::Stopped => Failure::new(
                ErrorCode::AdmissionReject,
                "the pool is stopped, so there is nothing to unload",
            )
            .with_hint(format!(
                "POST /v2/pools/{pool}/start lets it take tasks again"
            ))
            .in_pool(pool),
        }
    }

    /// Why a pool with tasks is not unloaded.
    pub(super) fn busy(&self) -> Failure {
        let (running, waiting) = (self.runs.len(), self.queue.len());
        let message = format!("the pool is busy: {running} tasks run and {waiting} wait");
        Failure::new(ErrorCode::AdmissionReject, message)
            .with_hint("ask again when they are over, or with `\"yield\": true`: running tasks finish, those that wait have it loaded again")
            .retriable()
            .in_pool(&self.settings.id)
    }

    /// Why a pool's memory is not to be had for another.
    pub(super) fn pinned(&self) -> Failure {
        Failure::new(ErrorCode::AdmissionReject, "the pool is pinned")
            .with_hint("its setting `pin` keeps it loaded")
            .in_pool(&self.settings.id)
    }

    /// Why no task is taken now, if none is.
    pub(super) fn refusal(&self) -> Option<Failure> {
        match (self.phase(), self.lifecycle.drain()) {
            (Phase::Failed, _) => Some(self.unavailable()),
            (Phase::Draining | Phase::Stopping | Phase::Stopped, Some(Drain::Shutdown)) => {
                Some(self.leaving())
            }
            // The next engine takes them.
            (Phase::Draining | Phase::Stopping, Some(Drain::Reload | Drain::Unload)) => None,
            (Phase::Draining | Phase::Stopping | Phase::Stopped, _) => Some(self.drained()),
            _ => None,
        }
    }

    /// Why queued tasks have no future, if they have none.
    pub(super) fn doom(&self) -> Option<Failure> {
        let served = self.phase() == Phase::Draining
            && self.lifecycle.drain() == Some(Drain::Operator)
            && self.lifecycle.engine() != Engine::None
            && !self.lifecycle.overdue();
        self.refusal().filter(|_| !served)
    }

    /// Why running tasks are ended by us.
    pub(super) fn ends_for(&self) -> Failure {
        match self.lifecycle.drain() {
            Some(Drain::Shutdown) => self.leaving(),
            Some(Drain::Operator) => self.drained(),
            _ => Failure::engine_replaced(&self.settings.id),
        }
    }

    fn leaving(&self) -> Failure {
        let why = self.leaving.unwrap_or(Leaving::DaemonEnds);
        Failure::leaving(&self.settings.id, why)
    }

    pub(super) fn drained(&self) -> Failure {
        Failure::drained(&self.settings.id)
    }

    fn unavailable(&self) -> Failure {
        let last = self.last_error.clone();
        let mut failure = last
            .unwrap_or_else(|| Failure::new(ErrorCode::PoolUnavailable, "the pool has failed"))
            .in_pool(&self.settings.id);
        if let Some(next_try) = self.lifecycle.next_try() {
            failure = failure.retry_after(next_try.saturating_duration_since(Instant::now()));
        }
        failure
    }
}
