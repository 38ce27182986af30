//! `orchestratord run "PROMPT"`: one answer on the terminal.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use llama_orch_types::PoolId;
use provision_kit::dirs::CacheDirs;
use provision_kit::lock::FileLock;
use worker_adapters_adapter_api::{ChatMessage, FinishReason};

use super::{Context, report};
use crate::api::submission::submit_to;
use crate::api::task_request::TaskRequest;
use crate::app::bootstrap::{self, App, Plan, StartError};
use crate::app::config::{Config, LoadPolicy, PoolConfig, SetupError};
use crate::app::shutdown::{Shutdown, Signals};
use crate::services::admission::Client;
use crate::services::event_log::{Cursor, End, Failure, TaskEvent};
use crate::services::pool::{Phase, PoolHandle};
use crate::ui::progress_reporter;

/// How many `run`s may go on at once.
const MAX_RUNS: u32 = 64;

/// How long an interrupted `run` waits for its engine to let go of the task.
const CANCEL_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// What to ask.
    prompt: String,
    /// The model: a profile or a model reference. Default: the pool's.
    #[arg(long, short)]
    model: Option<String>,
    /// The configured pool whose settings are used. Default: `default`, else
    /// the only one.
    #[arg(long)]
    pool: Option<String>,
    /// A system message to go before the prompt.
    #[arg(long)]
    system: Option<String>,
    /// Continue the text as it is, without the model's chat template.
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// The most tokens to generate.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: Option<u32>,
    /// 0 always takes the likeliest token.
    #[arg(long)]
    temperature: Option<f64>,
    /// The same seed gives the same answer.
    #[arg(long)]
    seed: Option<u32>,
}

impl RunArgs {
    fn request(&self) -> TaskRequest {
        let message = |role: &str, content: &str| ChatMessage {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        let (prompt, messages) = if self.raw {
            (Some(self.prompt.clone()), None)
        } else {
            let system = self.system.iter().map(|text| message("system", text));
            (
                None,
                Some(system.chain([message("user", &self.prompt)]).collect()),
            )
        };
        TaskRequest {
            prompt,
            messages,
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            seed: self.seed,
            ..TaskRequest::default()
        }
    }
}

pub(super) async fn run(context: Context, args: RunArgs) -> ExitCode {
    match start(&context, &args) {
        Ok((app, shutdown)) => {
            let code = answer(&app, &args, &shutdown).await;
            app.shut_down(&shutdown.hurried).await;
            code
        }
        Err(error) => report::error(&error),
    }
}

fn start(context: &Context, args: &RunArgs) -> Result<(App, Shutdown), StartError> {
    let source = context.source.clone();
    let mut loaded = source.load().map_err(StartError::Setup)?;
    // A pool of its own, so that a daemon on this machine is not disturbed.
    let mut pool = choose_pool(&loaded.config, args).map_err(StartError::Setup)?;
    // Its one task is known.
    pool.load = LoadPolicy::Eager;
    pool.idle_ttl_seconds = None;
    let (cache, _) = bootstrap::directories(&loaded.config)?;
    loaded.config.pools = BTreeMap::from([(own_pool_id(&cache), pool)]);
    let reporter = progress_reporter(context.log_format, &context.bars);
    let plan = Plan::new(source, loaded, reporter)?;
    let signals = Signals::listen().map_err(StartError::Signals)?;
    bootstrap::check_directories(&plan.loaded.config)?;
    let shutdown = signals.heed(Duration::ZERO, None);
    Ok((bootstrap::start(plan)?, shutdown))
}

/// A pool that nobody runs: `run-1`, or the next free one beside other `run`s.
/// Names are used again, so that logs do not pile up.
fn own_pool_id(cache: &CacheDirs) -> PoolId {
    let free = |id: &PoolId| {
        let lock = cache.run().join(format!("{id}.lock"));
        matches!(FileLock::try_acquire(&lock), Ok(Some(_)))
    };
    let mut names = (1..=MAX_RUNS).filter_map(|number| format!("run-{number}").parse().ok());
    // With that many at once the start itself says who has the pool.
    names.find(free).unwrap_or_else(PoolId::default_pool)
}

fn choose_pool(config: &Config, args: &RunArgs) -> Result<PoolConfig, SetupError> {
    let pools = &config.pools;
    let wanted = match &args.pool {
        Some(name) => pools.iter().find(|(id, _)| id.as_str() == name),
        None => pools
            .get_key_value(&PoolId::default_pool())
            .or_else(|| pools.iter().next().filter(|_| pools.len() == 1)),
    };
    let Some((_, pool)) = wanted else {
        let names: Vec<_> = pools.keys().map(PoolId::as_str).collect();
        return Err(SetupError::NoPool {
            named: args.pool.clone(),
            known: names.join(", "),
        });
    };
    let mut pool = pool.clone();
    if let Some(model) = &args.model {
        pool.model.clone_from(model);
    }
    Ok(pool)
}

async fn answer(app: &App, args: &RunArgs, shutdown: &Shutdown) -> ExitCode {
    // There is exactly one pool: `start` has put it there.
    let pools = app.state.pools.get();
    let Some(pool) = pools.values().next() else {
        return ExitCode::FAILURE;
    };
    let asked = OnceCell::new();
    let work = async {
        until_ready(pool).await?;
        let begun = Instant::now();
        let (record, _) =
            submit_to(&app.state, pool, &args.request(), "run", Client::Unnamed).await?;
        // Set once: this future runs once.
        let _ = asked.set(record.id);
        let end = print(record.log.cursor(0)).await?;
        if let Some(end) = &end {
            report::aside(summary(end, begun));
        }
        Ok::<_, Failure>(end)
    };
    let done = tokio::select! {
        done = work => Some(done),
        () = shutdown.asked.cancelled() => None,
    };
    match done {
        Some(Ok(Some(end))) if end.finish_reason != FinishReason::Cancelled => ExitCode::SUCCESS,
        Some(Err(failure)) => report::failure(&failure),
        // Somebody pressed Ctrl-C, or nobody reads the rest of the answer.
        interrupted => {
            if let Some(id) = asked.get() {
                // The engine ends the sooner for having nothing to do; bounded,
                // and without a message if it fails.
                let _ = tokio::time::timeout(CANCEL_LIMIT, pool.cancel(*id)).await;
            }
            shutdown.hurried.cancel();
            match interrupted {
                None => {
                    report::aside("stopped");
                    ExitCode::from(130)
                }
                Some(_) => ExitCode::SUCCESS,
            }
        }
    }
}

async fn until_ready(pool: &PoolHandle) -> Result<(), Failure> {
    let settled = |phase| matches!(phase, Phase::Ready | Phase::Failed | Phase::Stopped);
    let snapshot = pool.wait_for(|snapshot| settled(snapshot.phase)).await;
    match snapshot {
        Some(snapshot) if snapshot.phase == Phase::Ready => Ok(()),
        Some(snapshot) => Err(snapshot
            .last_error
            .unwrap_or_else(|| Failure::internal("the pool stopped"))),
        None => Err(Failure::internal("the pool stopped")),
    }
}

/// Writes the answer as it comes; `None` if its reader has gone away.
async fn print(mut cursor: Cursor) -> Result<Option<End>, Failure> {
    while let Some(batch) = cursor.read().await {
        for (_, event) in batch {
            if event.token().is_some_and(|token| write(token.t).is_err()) {
                return Ok(None);
            }
            match event {
                TaskEvent::End(end) => {
                    let _ = write("\n");
                    return Ok(Some(*end));
                }
                TaskEvent::Error(failure) => {
                    let _ = write("\n");
                    return Err(*failure);
                }
                _ => {}
            }
        }
    }
    Err(Failure::internal("the answer broke off"))
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn summary(end: &End, begun: Instant) -> String {
    let seconds = end.decode_time_ms / 1000.0;
    let pace = if seconds > 0.0 {
        end.tokens_out as f64 / seconds
    } else {
        0.0
    };
    let (engine, model) = end.receipt.as_ref().map_or(("", ""), |receipt| {
        (
            receipt.engine_version.as_str(),
            receipt.model.as_deref().unwrap_or(""),
        )
    });
    format!(
        "[{} tokens in {:.1} s, {pace:.0} tokens/s, {model} on llama.cpp {engine}]",
        end.tokens_out,
        begun.elapsed().as_secs_f64()
    )
}
