//! `orchestratord reload`: has a running daemon read its configuration again,
//! and tells what comes of it.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use llama_orch_types::Hinted;
use reqwest::Method;

use super::client::{ClientError, Daemon, NO_BODY};
use super::{Context, report};
use crate::api::admin::AdminReload;
use crate::app::reload::{PoolProgress, PoolReport, ReloadReport, ReloadStage};

const ROUTE: &str = "/v2/admin/reload";

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
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("reload {id} began meanwhile, and tells how it goes on")]
    Overtaken { id: u64 },
}

impl Hinted for ReloadError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Client(error) => error.hint(),
            Self::Overtaken { .. } => Some("GET /v2/admin/reload has its report".to_owned()),
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
    let daemon = Daemon::find(context, args.url.as_deref())?;
    let request = AdminReload {
        dry_run: args.dry_run,
    };
    let begun: ReloadReport = daemon.ask(Method::POST, ROUTE, Some(&request)).await?;
    if begun.state == ReloadStage::Planned {
        report::aside("This would be done:");
    }
    for warning in begun.warnings() {
        report::aside(format!("warning: {warning}"));
    }
    let ended = if args.no_wait || args.dry_run {
        begun
    } else {
        follow(&daemon, begun).await?
    };
    for line in ended.lines() {
        report::line(line);
    }
    Ok(ended)
}

/// Waits until the reload is over, and says how far it is. The daemon
/// bounds what it does; Ctrl-C ends the waiting alone.
async fn follow(daemon: &Daemon, begun: ReloadReport) -> Result<ReloadReport, ReloadError> {
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
        let now: ReloadReport = daemon.ask(Method::GET, ROUTE, NO_BODY).await?;
        if now.id != id {
            return Err(ReloadError::Overtaken { id: now.id });
        }
        last = now;
    }
    Ok(last)
}

/// For people; `None` while no pool is on its way.
fn waiting_for(report: &ReloadReport) -> Option<String> {
    let unfinished =
        |pool: &&PoolReport| matches!(pool.state, PoolProgress::Planned | PoolProgress::Working);
    let pools = report.pools.iter().filter(unfinished);
    let names: Vec<&str> = pools.map(|pool| pool.pool_id.as_str()).collect();
    (!names.is_empty()).then(|| format!("waiting for: {}", names.join(", ")))
}
