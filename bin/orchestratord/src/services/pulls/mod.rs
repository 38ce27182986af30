//! Fetching models before anybody needs them.
//!
//! ```text
//! POST ─► owner ─► queued ─► running (two at a time) ─► done │ failed
//!           │ the same bytes asked for again: the same pull
//!           └► pulls.json: what is not over, for the next process
//! ```
//!
//! One actor owns all pulls. Readers watch a pull's [`Work`]; they cost the
//! owner nothing. What a pull brings belongs to nobody: it is in the store and
//! in use by none.
//!
//! [`Work`]: super::watched::Work

mod kept;
mod owner;
#[cfg(feature = "provisioning")]
mod provisioned;
#[cfg(test)]
mod tests;
mod view;

use std::fmt::Debug;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use llama_orch_types::ErrorCode;
use provision_kit::progress::Reporter;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::kept::Kept;
use self::owner::{Command, Owner};
pub use self::view::{Pull, PullView, PulledModel};
use super::event_log::Failure;
use super::failure::shortened;

/// How many pulls run at a time: more would share the same line and disk.
pub const AT_ONCE: usize = 2;

/// How many may wait.
pub const QUEUED_AT_MOST: usize = 64;

/// What a reference stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// For people and logs: without what may be secret.
    pub model: String,
    /// Equal for references that want the same bytes.
    pub key: String,
    /// It holds something that must not be written down.
    pub has_secret: bool,
}

/// How models come.
#[async_trait]
pub trait Fetch: Debug + Send + Sync {
    /// What a reference stands for; fails for one that can never be pulled.
    fn identify(&self, reference: &str) -> Result<Identity, Failure>;

    /// Brings the model here. Dropping the future stops it; what has arrived is
    /// gone on with next time.
    async fn fetch(
        &self,
        reference: &str,
        reporter: Arc<dyn Reporter>,
    ) -> Result<PulledModel, Failure>;
}

/// The way to the owner of the pulls.
#[derive(Debug, Clone)]
pub struct Pulls {
    commands: mpsc::Sender<Command>,
}

impl Pulls {
    /// Starts the owner, which ends with `stop`. `kept` is the file of what is
    /// not over.
    pub fn start(
        fetch: Arc<dyn Fetch>,
        kept: PathBuf,
        reporter: Arc<dyn Reporter>,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let (commands, inbox) = mpsc::channel(64);
        tracker.spawn(Owner::new(inbox, fetch, Kept(kept), reporter).run(stop));
        Self { commands }
    }

    /// Goes on with what an earlier process left.
    pub async fn go_on(&self) -> Result<(), Failure> {
        self.ask(Command::GoOn).await
    }

    /// Pulls a model, or joins the pull of it that is under way.
    pub async fn begin(&self, reference: &str) -> Result<PullView, Failure> {
        let reference = reference.trim().to_owned();
        self.ask(|reply| Command::Begin { reference, reply })
            .await?
    }

    /// All pulls that are known, the oldest first.
    pub async fn list(&self) -> Result<Vec<PullView>, Failure> {
        self.ask(Command::List).await
    }

    pub async fn show(&self, id: &str) -> Result<(Arc<Pull>, PullView), Failure> {
        let wanted = id.to_owned();
        let found = self.ask(|reply| Command::Show { id: wanted, reply });
        found.await?.ok_or_else(|| not_found(id))
    }

    /// Stops a pull. What has arrived of it stays for the next one.
    pub async fn cancel(&self, id: &str) -> Result<PullView, Failure> {
        let wanted = id.to_owned();
        let cancelled = self.ask(|reply| Command::Cancel { id: wanted, reply });
        cancelled.await?.ok_or_else(|| not_found(id))
    }

    async fn ask<T>(
        &self,
        command: impl FnOnce(oneshot::Sender<T>) -> Command,
    ) -> Result<T, Failure> {
        let (reply, answer) = oneshot::channel();
        let gone =
            || Failure::new(ErrorCode::ModelUnavailable, "the daemon is shutting down").retriable();
        let sent = self.commands.send(command(reply)).await;
        sent.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())
    }
}

fn not_found(id: &str) -> Failure {
    Failure::new(
        ErrorCode::PullNotFound,
        format!("there is no pull `{}`", shortened(id)),
    )
    .with_hint("GET /v2/catalog/pulls lists them; finished ones are kept for a while only")
}

/// In builds without provisioning no model can be fetched.
#[cfg(not(feature = "provisioning"))]
#[derive(Debug)]
pub struct NoModels;

#[cfg(not(feature = "provisioning"))]
#[async_trait]
impl Fetch for NoModels {
    fn identify(&self, _: &str) -> Result<Identity, Failure> {
        Err(Failure::no_models_in_this_build())
    }

    async fn fetch(&self, _: &str, _: Arc<dyn Reporter>) -> Result<PulledModel, Failure> {
        Err(Failure::no_models_in_this_build())
    }
}
