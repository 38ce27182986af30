//! Through the daemon, or on the store itself.

use reqwest::Method;
use serde::Serialize;

use super::ModelsError;
use super::follow::Follower;
use super::here::Here;
use crate::api::catalog::view::{ModelView, ModelsView, RemovedView, VerifiedView};
use crate::app::config::shown_model;
use crate::cli::Context;
use crate::cli::client::{ClientError, Daemon, NO_BODY, encoded};
use crate::services::pulls::{PullView, PulledModel};
use crate::services::watched::WorkState;

/// Who does the work.
pub(super) enum Way {
    Daemon(Box<Follower>),
    Here(Box<Here>),
}

/// A model that is here now, or that a daemon has taken on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Pulled {
    pub(super) model: String,
    /// The daemon's pull.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pull_id: Option<String>,
    /// None while it is on its way.
    #[serde(flatten)]
    pub(super) result: Option<PulledModel>,
}

impl Way {
    /// The daemon at `url`, or the one that runs here, or no daemon.
    pub(super) async fn find(context: &Context, url: Option<&str>) -> Result<Self, ModelsError> {
        match Daemon::find(context, url) {
            Ok(daemon) => {
                // It may have been killed, and then its file is still there.
                match daemon
                    .ask::<serde_json::Value>(Method::GET, "/v2/catalog/pulls", NO_BODY)
                    .await
                {
                    Err(ClientError::Ask { source, .. })
                        if url.is_none() && source.is_connect() => {}
                    Err(error) => return Err(error.into()),
                    Ok(_) => {
                        let follower = Follower::new(context, daemon, url.is_none());
                        return Ok(Self::Daemon(Box::new(follower)));
                    }
                }
            }
            Err(ClientError::NoDaemon { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Self::Here(Box::new(Here::new(context)?)))
    }

    pub(super) async fn list(&self) -> Result<ModelsView, ModelsError> {
        match self {
            Self::Daemon(it) => Ok(it
                .daemon
                .ask(Method::GET, "/v2/catalog/models", NO_BODY)
                .await?),
            Self::Here(here) => here.list().await,
        }
    }

    pub(super) async fn show(&self, name: &str) -> Result<ModelView, ModelsError> {
        match self {
            Self::Daemon(it) => Ok(it.daemon.ask(Method::GET, &path_of(name), NO_BODY).await?),
            Self::Here(here) => here.show(name).await,
        }
    }

    pub(super) async fn remove(&self, name: &str) -> Result<RemovedView, ModelsError> {
        match self {
            Self::Daemon(it) => Ok(it
                .daemon
                .ask(Method::DELETE, &path_of(name), NO_BODY)
                .await?),
            Self::Here(here) => here.remove(name).await,
        }
    }

    pub(super) async fn verify(
        &self,
        name: &str,
        repair: bool,
    ) -> Result<VerifiedView, ModelsError> {
        match self {
            Self::Daemon(it) => {
                it.verify(&format!("{}/verify", path_of(name)), name, repair)
                    .await
            }
            Self::Here(here) => here.verify(name, repair).await,
        }
    }

    /// Stops the pull of a model, by what it was asked for as or by its id.
    pub(super) async fn cancel(&self, name: &str) -> Result<PullView, ModelsError> {
        let Self::Daemon(it) = self else {
            return Err(ModelsError::NothingToCancel);
        };
        let all: crate::api::catalog::pulls::PullsView = it
            .daemon
            .ask(Method::GET, "/v2/catalog/pulls", NO_BODY)
            .await?;
        // As the daemon shows it.
        let shown = shown_model(name.trim());
        let wanted = |pull: &PullView| {
            let is_open = matches!(pull.progress.state, WorkState::Queued | WorkState::Running);
            is_open && (pull.model == shown || pull.pull_id == name)
        };
        let Some(pull) = all.pulls.into_iter().find(wanted) else {
            return Err(ModelsError::NoPull { model: shown });
        };
        let path = format!("/v2/catalog/pulls/{}", encoded(&pull.pull_id));
        Ok(it.daemon.ask(Method::DELETE, &path, NO_BODY).await?)
    }

    /// What to say to somebody who pressed Ctrl-C.
    pub(super) fn after_interrupt(&self, references: &[String]) -> String {
        let shown: Vec<String> = references.iter().map(|it| shown_model(it)).collect();
        match self {
            Self::Daemon(it) => format!(
                "the daemon at {} goes on with it; `orchestratord models cancel {}` stops it",
                it.daemon.url(),
                shown.join(" ")
            ),
            Self::Here(_) => format!(
                "stopped; what has arrived is kept, and `orchestratord models pull {}` goes on with it",
                shown.join(" ")
            ),
        }
    }
}

/// The route of a model. An address goes as it is recorded, without what may be
/// secret: routes are logged.
fn path_of(name: &str) -> String {
    format!("/v2/catalog/models/{}", encoded(&shown_model(name)))
}
