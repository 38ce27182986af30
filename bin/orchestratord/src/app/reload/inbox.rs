//! What goes to the reloader and what comes back: commands, and the report of
//! the last reload.

use std::sync::Arc;

use axum::http::StatusCode;
use llama_orch_types::{ErrorCode, PoolId};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::examine::Refused;
use super::report::{ChangeKind, PoolProgress, RefusedReload, ReloadReport, ReloadStage};
use crate::api::error::ApiError;
use crate::services::event_log::Failure;

/// Commands that may wait before senders have to.
const COMMAND_QUEUE: usize = 16;

pub(super) struct Command {
    pub(super) dry_run: bool,
    pub(super) reply: oneshot::Sender<Result<ReloadReport, ApiError>>,
}

/// The way to the reloader. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ReloadHandle {
    commands: mpsc::Sender<Command>,
    hung_up: Arc<Notify>,
    report: watch::Receiver<ReloadReport>,
}

/// The reloader's end of it.
#[derive(Debug)]
pub(in crate::app) struct Inbox {
    pub(super) commands: mpsc::Receiver<Command>,
    /// SIGHUP: nobody waits for an answer, and many are as good as one.
    pub(super) hung_up: Arc<Notify>,
    report: watch::Sender<ReloadReport>,
    /// A SIGHUP came that was not heeded yet.
    pub(super) again: bool,
}

pub(in crate::app) fn channel() -> (ReloadHandle, Inbox) {
    let (sender, commands) = mpsc::channel(COMMAND_QUEUE);
    let (publish, report) = watch::channel(ReloadReport::default());
    let hung_up = Arc::new(Notify::new());
    let handle = ReloadHandle {
        commands: sender,
        hung_up: Arc::clone(&hung_up),
        report,
    };
    let inbox = Inbox {
        commands,
        hung_up,
        report: publish,
        again: false,
    };
    (handle, inbox)
}

impl ReloadHandle {
    /// Reads the configuration again and begins to do what it says, or only
    /// says what that would be. A wrong one changes nothing.
    pub async fn reload(&self, dry_run: bool) -> Result<ReloadReport, ApiError> {
        let (reply, answer) = oneshot::channel();
        // Both fail only when the reloader has ended.
        let _ = self.commands.send(Command { dry_run, reply }).await;
        answer.await.unwrap_or_else(|_| {
            let stopping = Failure::new(ErrorCode::PoolUnavailable, "the daemon is shutting down");
            Err(stopping.into())
        })
    }

    /// The same for a signal: what comes of it is logged. Never waits, so that
    /// no signal that ends the daemon waits behind it.
    pub fn hang_up(&self) {
        self.hung_up.notify_one();
    }

    /// The last reload, as far as it is.
    pub fn last(&self) -> ReloadReport {
        self.report.borrow().clone()
    }
}

impl Inbox {
    /// Publishes a new reload. `starting` are the pools that an earlier one
    /// started and that are not ready yet.
    pub(super) fn begin<'a>(
        &self,
        report: &ReloadReport,
        starting: impl Iterator<Item = &'a PoolId>,
    ) -> ReloadReport {
        let mut begun = ReloadReport {
            id: self.report.borrow().id + 1,
            state: ReloadStage::Running,
            ..report.clone()
        };
        tracing::info!(reload = begun.id, "the configuration is read again");
        for warning in begun.warnings() {
            tracing::warn!("{warning}");
        }
        for pool in &mut begun.pools {
            // There is nothing to do for it.
            if pool.change == ChangeKind::Unchanged {
                pool.state = PoolProgress::Done;
            }
        }
        for pool in starting {
            begun.note(pool, PoolProgress::Working, None);
        }
        self.report.send_replace(begun.clone());
        begun
    }

    /// Publishes a configuration that was not taken over, beside the last that was.
    pub(super) fn refuse(&self, Refused { failure, place }: Refused) {
        let refused = RefusedReload::now(failure, place);
        self.report
            .send_modify(|report| report.refused = Some(refused));
    }

    pub(super) fn note(&self, pool: &PoolId, state: PoolProgress, error: Option<Failure>) {
        self.report
            .send_modify(|report| report.note(pool, state, error));
    }

    pub(super) fn is_running(&self) -> bool {
        self.report.borrow().state == ReloadStage::Running
    }

    pub(super) fn finish(&self) {
        self.report.send_modify(|report| {
            report.state = if report.has_failed() {
                ReloadStage::Failed
            } else {
                ReloadStage::Done
            };
        });
        let report = self.report.borrow().clone();
        for line in report.lines() {
            if report.state == ReloadStage::Failed {
                tracing::warn!(reload = report.id, "{line}");
            } else {
                tracing::info!(reload = report.id, "{line}");
            }
        }
    }

    /// Waits for work that must not be mixed with another reload.
    pub(super) async fn refusing<T>(&mut self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(Command { reply, .. }) = self.commands.recv() => {
                    let _ = reply.send(Err(busy()));
                }
                () = self.hung_up.notified() => self.again = true,
            }
        }
    }
}

fn busy() -> ApiError {
    let failure = Failure::new(
        ErrorCode::AdmissionReject,
        "another reload drains, stops or starts pools",
    )
    .retriable()
    .with_hint("GET /v2/admin/reload says how far it is");
    ApiError::from(failure).with_status(StatusCode::CONFLICT)
}
