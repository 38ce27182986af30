//! `orchestratord reload`: has a running daemon read its configuration again,
//! and tells what comes of it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use llama_orch_types::Hinted;
use reqwest::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::serve::Listening;
use super::{Context, report};
use crate::api::admin::AdminReload;
use crate::api::error::ErrorBody;
use crate::app::bootstrap::StartError;
use crate::app::config::Config;
use crate::app::env;
use crate::app::reload::{PoolProgress, PoolReport, ReloadReport, ReloadStage};
use crate::services::event_log::Failure;

/// How long the daemon may take for one answer: it reads the file meanwhile.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// How often it is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct ReloadArgs {
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
    /// Return once it has begun.
    #[arg(long, conflicts_with = "dry_run")]
    no_wait: bool,
    /// The daemon. Default: the one that uses the configured runtime
    /// directory.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

/// Why there is nothing to tell.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error("nothing is changed")]
    Setup(#[source] StartError),
    #[error("no daemon runs here: there is no {}", .path.display())]
    NoDaemon { path: std::path::PathBuf },
    #[error("{} does not say where the daemon is", .path.display())]
    Presence {
        path: std::path::PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the daemon at {url} did not answer")]
    Ask {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the daemon at {url} wants another token")]
    Refused { url: String },
    #[error("the daemon at {url} answered with {status} and not as this version does")]
    Unknown { url: String, status: StatusCode },
    #[error("reload {id} began meanwhile, and tells how it goes on")]
    Overtaken { id: u64 },
    #[error("{}", .0.message)]
    Failure(Box<Failure>),
}

impl Hinted for ReloadError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::NoDaemon { .. } | Self::Presence { .. } => Some(
                "run this where the daemon was started, give it the same --config or --runtime-dir, or name it with --url"
                    .to_owned(),
            ),
            Self::Ask { .. } => Some("see whether it runs, or name it with --url".to_owned()),
            Self::Refused { .. } => Some(format!(
                "set {} to the token that is in force, or send the daemon SIGHUP",
                env::TOKEN
            )),
            Self::Unknown { .. } => None,
            Self::Overtaken { .. } => Some("GET /v2/admin/reload has its report".to_owned()),
            Self::Failure(failure) => failure.hint.clone(),
        }
    }
}

pub(super) async fn reload(context: &Context, args: &ReloadArgs) -> ExitCode {
    match try_reload(context, args).await {
        Ok(report) if report.state == ReloadStage::Failed => ExitCode::FAILURE,
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => report::error(&error),
    }
}

async fn try_reload(context: &Context, args: &ReloadArgs) -> Result<ReloadReport, ReloadError> {
    let daemon = Daemon::find(context, args)?;
    let request = AdminReload {
        dry_run: args.dry_run,
    };
    let begun: ReloadReport = daemon.ask(Method::POST, Some(&request)).await?;
    if begun.state == ReloadStage::Planned {
        report::aside("This would be done:");
    }
    for warning in begun.warnings() {
        report::aside(format!("warning: {warning}"));
    }
    let ended = if args.no_wait || args.dry_run {
        begun
    } else {
        daemon.follow(begun).await?
    };
    for line in ended.lines() {
        report::line(line);
    }
    Ok(ended)
}

/// The daemon to be asked.
struct Daemon {
    url: String,
    client: reqwest::Client,
    /// The tokens that may be the right one: a reload can change it.
    tokens: Vec<String>,
}

impl Daemon {
    fn find(context: &Context, args: &ReloadArgs) -> Result<Self, ReloadError> {
        let loaded = context.source.load();
        let (url, config) = match (&args.url, loaded) {
            (Some(url), loaded) => {
                let url = url.trim_end_matches('/').to_owned();
                (url, loaded.map(|loaded| loaded.config).unwrap_or_default())
            }
            (None, Ok(loaded)) => (listening(&loaded.config)?, loaded.config),
            // A wrong file ends here: it says where the daemon is.
            (None, Err(error)) => return Err(ReloadError::Setup(StartError::Setup(error))),
        };
        let from_env = std::env::var(env::TOKEN).ok();
        // One that cannot be read is left to the daemon to complain about.
        let from_file = config.token(None).ok().flatten();
        let from_file = from_file.map(|token| token.reveal().to_owned());
        // Without a proxy: the daemon is on this machine or named.
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(ANSWER_LIMIT)
            .build()
            .map_err(|source| ReloadError::Ask {
                url: url.clone(),
                source,
            })?;
        Ok(Self {
            url,
            client,
            tokens: from_env.into_iter().chain(from_file).collect(),
        })
    }

    /// Asks with each token until one is right.
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        body: Option<&AdminReload>,
    ) -> Result<T, ReloadError> {
        let tokens = self.tokens.iter().map(Some);
        let none = self.tokens.is_empty().then_some(None);
        for token in tokens.chain(none) {
            let url = format!("{}/v2/admin/reload", self.url);
            let mut request = self.client.request(method.clone(), url);
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            if let Some(body) = body {
                request = request.json(body);
            }
            let failed = |source| ReloadError::Ask {
                url: self.url.clone(),
                source,
            };
            let response = request.send().await.map_err(failed)?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED {
                continue;
            }
            let bytes = response.bytes().await.map_err(failed)?;
            let unknown = |_| ReloadError::Unknown {
                url: self.url.clone(),
                status,
            };
            return if status.is_success() {
                serde_json::from_slice(&bytes).map_err(unknown)
            } else {
                let body: ErrorBody = serde_json::from_slice(&bytes).map_err(unknown)?;
                Err(ReloadError::Failure(Box::new(body.error)))
            };
        }
        Err(ReloadError::Refused {
            url: self.url.clone(),
        })
    }

    /// Waits until the reload is over, and says how far it is. The daemon
    /// bounds what it does; Ctrl-C ends the waiting alone.
    async fn follow(&self, begun: ReloadReport) -> Result<ReloadReport, ReloadError> {
        let id = begun.id;
        let mut last = begun;
        let mut said = None;
        while last.state == ReloadStage::Running {
            let waiting = waiting_for(&last);
            if waiting != said {
                if let Some(waiting) = &waiting {
                    report::aside(waiting);
                }
                said = waiting;
            }
            tokio::time::sleep(LOOK_EVERY).await;
            let now: ReloadReport = self.ask(Method::GET, None).await?;
            if now.id != id {
                return Err(ReloadError::Overtaken { id: now.id });
            }
            last = now;
        }
        Ok(last)
    }
}

/// For people; `None` while no pool is on its way.
fn waiting_for(report: &ReloadReport) -> Option<String> {
    let unfinished =
        |pool: &&PoolReport| matches!(pool.state, PoolProgress::Planned | PoolProgress::Working);
    let pools = report.pools.iter().filter(unfinished);
    let names: Vec<&str> = pools.map(|pool| pool.pool_id.as_str()).collect();
    (!names.is_empty()).then(|| format!("waiting for: {}", names.join(", ")))
}

/// Where the daemon listens that uses the configured runtime directory.
fn listening(config: &Config) -> Result<String, ReloadError> {
    let path = Listening::path(config).map_err(ReloadError::Setup)?;
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Err(ReloadError::NoDaemon { path });
    };
    let listening: Listening =
        serde_json::from_str(&text).map_err(|source| ReloadError::Presence { path, source })?;
    Ok(reachable(&listening.url))
}

/// A daemon that listens on every address is reached on the loopback one.
fn reachable(url: &str) -> String {
    url.replace("//0.0.0.0:", "//127.0.0.1:")
        .replace("//[::]:", "//[::1]:")
}
