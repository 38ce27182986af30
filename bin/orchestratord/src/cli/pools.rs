//! `orchestratord pools`: what a running daemon's pools do, and what they are to
//! do: load, stop, free their memory.

mod table;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use llama_orch_types::Hinted;
use reqwest::Method;

use super::client::{ClientError, Daemon, NO_BODY, encoded};
use super::{Context, report};
use crate::api::pools::requests::{DrainRequest, UnloadRequest};
use crate::api::pools::{PoolView, PoolsView};
use crate::services::event_log::Failure;
use crate::services::pool::Phase;

/// How often a pool is asked how far it is.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often a wait that shows nothing new is told of again.
const SAY_EVERY: Duration = Duration::from_secs(5);

const EXAMPLES: &str = "\
Examples:
  orchestratord pools list                 every pool, its state, queue and idle time
  orchestratord pools start coder          load its engine now, and wait until it serves
  orchestratord pools unload coder         free its memory; its next task loads it again
  orchestratord pools stop coder           finish what was admitted, then refuse tasks
  orchestratord pools list --json | jq     the same as GET /v2/pools";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct PoolsArgs {
    #[command(subcommand)]
    command: PoolsCommand,
    /// The daemon. Default: the one that uses the configured runtime
    /// directory.
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// Print what the daemon answers, as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum PoolsCommand {
    /// Every pool: what it serves, its state, its queue, how long it is idle.
    List,
    /// Load a pool's engine and take tasks; returns when it is ready.
    ///
    /// Starts a pool that is unloaded, stopped or failed, or waits for its next
    /// try, and takes a stop or an unload back that is under way. Ends with 1 if
    /// the engine cannot be had.
    Start {
        /// The pool's id, as in the configuration.
        pool: String,
        /// Return once it has begun.
        #[arg(long)]
        no_wait: bool,
    },
    /// Finish what was admitted, stop the engine, and refuse tasks until it is
    /// started.
    Stop {
        /// The pool's id, as in the configuration.
        pool: String,
        /// How long admitted tasks may go on, in seconds. Default: the
        /// configuration's `drain_seconds`.
        #[arg(long, value_name = "SECONDS")]
        deadline: Option<u32>,
        /// Return once it has begun.
        #[arg(long)]
        no_wait: bool,
    },
    /// Free the memory of a pool's engine; its next task loads it again.
    ///
    /// Refused while tasks run or wait, unless `--yield` is given.
    Unload {
        /// The pool's id, as in the configuration.
        pool: String,
        /// Also while it is busy: running tasks finish, no further one begins, and
        /// those that wait have the engine loaded again.
        #[arg(long)]
        r#yield: bool,
        /// Return once it has begun.
        #[arg(long)]
        no_wait: bool,
    },
}

#[derive(Debug, thiserror::Error)]
enum PoolsError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("pool {pool} has failed: {}", .failure.message)]
    Failed { pool: String, failure: Box<Failure> },
    #[error("pool {pool} is {} now: something else was asked of it meanwhile", .state.as_str())]
    Otherwise { pool: String, state: Phase },
}

impl Hinted for PoolsError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Client(error) => error.hint(),
            Self::Failed { failure, .. } => failure.hint.clone(),
            Self::Otherwise { pool, .. } => {
                Some(format!("GET /v2/pools/{pool} has its last transitions"))
            }
        }
    }
}

pub(super) async fn pools(context: &Context, args: &PoolsArgs) -> ExitCode {
    match try_pools(context, args).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::error(&error),
    }
}

async fn try_pools(context: &Context, args: &PoolsArgs) -> Result<(), PoolsError> {
    let daemon = Daemon::find(context, args.url.as_deref())?;
    let json = args.json;
    let (begun, goal) = match &args.command {
        PoolsCommand::List => return list(&daemon, json).await,
        PoolsCommand::Start { pool, no_wait } => {
            let begun = ask(&daemon, pool, "start", NO_BODY).await?;
            (begun, goal(*no_wait, Goal::Ready))
        }
        PoolsCommand::Stop {
            pool,
            deadline,
            no_wait,
        } => {
            let deadline_ms = deadline.map(|seconds| u64::from(seconds) * 1000);
            let request = DrainRequest { deadline_ms };
            let begun = ask(&daemon, pool, "stop", Some(&request)).await?;
            (begun, goal(*no_wait, Goal::Stopped))
        }
        PoolsCommand::Unload {
            pool,
            r#yield,
            no_wait,
        } => {
            let request = UnloadRequest { yields: *r#yield };
            let begun = ask(&daemon, pool, "unload", Some(&request)).await?;
            (begun, goal(*no_wait, Goal::Unloaded))
        }
    };
    let ended = match goal {
        Some(goal) => follow(&daemon, begun, goal).await?,
        None => begun,
    };
    if json {
        print_json(&ended);
    } else {
        report::line(table::in_a_line(&ended));
    }
    Ok(())
}

fn goal(no_wait: bool, goal: Goal) -> Option<Goal> {
    (!no_wait).then_some(goal)
}

async fn list(daemon: &Daemon, json: bool) -> Result<(), PoolsError> {
    let view: PoolsView = daemon.ask(Method::GET, "/v2/pools", NO_BODY).await?;
    if json {
        print_json(&view);
    } else {
        for line in table::table(&view.pools) {
            report::line(line);
        }
    }
    Ok(())
}

async fn ask(
    daemon: &Daemon,
    pool: &str,
    what: &str,
    body: Option<&impl serde::Serialize>,
) -> Result<PoolView, ClientError> {
    let path = format!("{}/{what}", path_of(pool));
    daemon.ask(Method::POST, &path, body).await
}

fn path_of(pool: &str) -> String {
    format!("/v2/pools/{}", encoded(pool))
}

fn print_json(value: &impl serde::Serialize) {
    // Plain data, which JSON always holds.
    report::line(serde_json::to_string_pretty(value).unwrap_or_default());
}

/// What a pool is waited for to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Goal {
    Ready,
    Stopped,
    Unloaded,
}

/// How far a pool is on its way there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    There,
    Going,
    /// It will not come there.
    Lost,
}

impl Goal {
    fn way(self, phase: Phase) -> Way {
        match (self, phase) {
            (Self::Ready, Phase::Ready) | (Self::Stopped, Phase::Stopped) => Way::There,
            (Self::Ready, Phase::Failed | Phase::Stopped | Phase::Unloaded) => Way::Lost,
            (Self::Stopped | Self::Unloaded, Phase::Draining | Phase::Stopping)
            | (Self::Ready, _) => Way::Going,
            (Self::Unloaded, Phase::Failed | Phase::Stopped) | (Self::Stopped, _) => Way::Lost,
            // It may be loaded again, if tasks waited, or have had no engine.
            (Self::Unloaded, _) => Way::There,
        }
    }
}

/// Waits until the pool is where it is to be, and says what it waits for. The
/// daemon bounds what it does; Ctrl-C ends the waiting alone.
async fn follow(daemon: &Daemon, begun: PoolView, goal: Goal) -> Result<PoolView, PoolsError> {
    let path = path_of(&begun.pool_id);
    let mut view = begun;
    let mut said: Option<(String, Instant)> = None;
    loop {
        match goal.way(view.state) {
            Way::There => return Ok(view),
            Way::Lost => return Err(lost(view)),
            Way::Going => {}
        }
        let (key, text) = (table::stage(&view), table::waiting(&view));
        let new = said
            .as_ref()
            .is_none_or(|(last, at)| *last != key || at.elapsed() >= SAY_EVERY);
        if new {
            report::aside(text);
            said = Some((key, Instant::now()));
        }
        tokio::time::sleep(LOOK_EVERY).await;
        view = daemon.ask(Method::GET, &path, NO_BODY).await?;
    }
}

fn lost(view: PoolView) -> PoolsError {
    match (view.state, view.last_error) {
        (Phase::Failed, Some(failure)) => PoolsError::Failed {
            pool: view.pool_id,
            failure: Box::new(failure),
        },
        (state, _) => PoolsError::Otherwise {
            pool: view.pool_id,
            state,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_reaches_another_route() {
        assert_eq!(path_of("coder-1_a"), "/v2/pools/coder-1_a");
        assert_eq!(path_of("../x?y"), "/v2/pools/%2E%2E%2Fx%3Fy");
    }

    #[test]
    fn a_wait_ends_where_it_is_met_or_cannot_be() {
        assert_eq!(Goal::Ready.way(Phase::Backoff), Way::Going);
        assert_eq!(Goal::Ready.way(Phase::Draining), Way::Going);
        assert_eq!(Goal::Ready.way(Phase::Failed), Way::Lost);
        assert_eq!(Goal::Stopped.way(Phase::Ready), Way::Lost);
        assert_eq!(Goal::Unloaded.way(Phase::Stopping), Way::Going);
        assert_eq!(
            Goal::Unloaded.way(Phase::Provisioning),
            Way::There,
            "tasks waited for it"
        );
    }
}
