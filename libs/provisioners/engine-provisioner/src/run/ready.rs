//! Waiting for an engine to be ready, and asking it what it runs.

use std::path::Path;
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;
use provision_kit::blocking::blocking;
use provision_kit::process::ChildGroup;
use reqwest::{Client, StatusCode};
use serde::Deserialize;

use super::load_watch::{LoadWatch, Sample};
use super::log::LogPump;
use super::pace::{self, MAX_PAUSE};
use super::port::{self, Listener};
use super::usage;
use crate::error::EngineError;

/// Between two questions for what a ready engine runs.
const PROPS_POLL: Duration = Duration::from_millis(50);
/// Longest that one answer may take.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// How long a ready engine may take to describe itself.
const PROPS_LIMIT: Duration = Duration::from_secs(10);

/// How the wait for readiness ended.
#[derive(Debug)]
pub(super) enum Readiness {
    Ready(Listener),
    /// The engine ended.
    Ended(std::process::ExitStatus),
    /// It made no progress for as long as it may.
    TimedOut {
        /// How long it was waited for in all.
        after: Duration,
        /// Somebody who is not the engine answers on its port.
        stranger: bool,
    },
}

/// What `/props` says.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct Props {
    default_generation_settings: GenerationSettings,
    /// How many tasks the engine decodes side by side.
    pub total_slots: u32,
    #[serde(default)]
    pub model_path: Option<String>,
    #[serde(default)]
    pub build_info: Option<String>,
}

#[derive(Debug, Clone, Deserialize)]
struct GenerationSettings {
    n_ctx: u32,
}

impl Props {
    /// Context length of one slot, in tokens.
    pub(super) fn ctx_per_slot(&self) -> u32 {
        self.default_generation_settings.n_ctx
    }

    fn serves(&self, model: &Path) -> bool {
        self.model_path
            .as_deref()
            .is_some_and(|path| Path::new(path) == model)
    }
}

/// A client for an engine on this machine.
pub(super) fn loopback_client() -> Result<Client, EngineError> {
    Client::builder()
        // A proxy of the user's environment has no business between us and the loopback address.
        .no_proxy()
        // What is said in plain HTTP needs no certificates, and a machine without any must do.
        .tls_certs_only([])
        .connect_timeout(ANSWER_LIMIT)
        .timeout(ANSWER_LIMIT)
        .build()
        .map_err(EngineError::HttpClient)
}

/// Looks at `/health` until it is 200 and it is our engine that says so: at once when the engine
/// writes a line, and else as [`pace`] says.
pub(super) async fn wait_ready(
    client: &Client,
    group: &mut ChildGroup,
    log: &LogPump,
    engine: &Waited<'_>,
) -> Result<Readiness, EngineError> {
    let begin = Instant::now();
    let mut watch = LoadWatch::new(engine.load_timeout);
    let health = format!("{}/health", engine.url);
    // What the engine uses is looked at more seldom than it is asked: that reads all of `/proc`.
    let look_every = (engine.load_timeout / 10).min(MAX_PAUSE / 2);
    let mut looked_at = Duration::ZERO;
    loop {
        let answer = client.get(&health).send();
        let stranger = tokio::select! {
            // An engine that has died is told from a slow one at once.
            biased;
            status = group.wait() => return Ok(Readiness::Ended(status.map_err(|source| engine.process_error(source))?)),
            answer = answer => {
                let ready = answer.is_ok_and(|answer| answer.status() == StatusCode::OK);
                if ready && let Some(listener) = our_listener(client, group, engine).await {
                    return Ok(Readiness::Ready(listener));
                }
                ready
            }
        };
        let after = begin.elapsed();
        if after.saturating_sub(looked_at) >= look_every {
            looked_at = after;
            let sample = look_at(group.pid(), log).await;
            if watch.is_stuck(after, sample) {
                return Ok(Readiness::TimedOut { after, stranger });
            }
        }
        tokio::select! {
            biased;
            status = group.wait() => return Ok(Readiness::Ended(status.map_err(|source| engine.process_error(source))?)),
            () = pace::until_next(after, log.said()) => {}
        }
    }
}

/// What can be seen of the engine and its children.
async fn look_at(group: u32, log: &LogPump) -> Sample {
    let usage = blocking(move || usage::of_group(group)).await;
    Sample {
        log_lines: log.lines_read(),
        ..usage
    }
}

/// The engine that is waited for.
#[derive(Debug)]
pub(super) struct Waited<'a> {
    pub pool: &'a PoolId,
    pub url: &'a str,
    pub port: u16,
    pub model: &'a Path,
    /// Longest time without progress.
    pub load_timeout: Duration,
}

impl Waited<'_> {
    fn process_error(&self, source: provision_kit::process::ProcessError) -> EngineError {
        EngineError::Process {
            pool: self.pool.clone(),
            source,
        }
    }
}

/// Who of our engine listens on the port; `None` if it is a stranger who took it before our engine
/// could: the kernel knows, and where it does not say, the answer's model path does.
async fn our_listener(
    client: &Client,
    group: &ChildGroup,
    engine: &Waited<'_>,
) -> Option<Listener> {
    let (pid, number) = (group.pid(), engine.port);
    let listener = blocking(move || port::listener(pid, number)).await;
    let ours = match listener {
        Listener::Member(_) => true,
        Listener::NotOurs => false,
        Listener::Unknown => props(client, engine.url)
            .await
            .is_ok_and(|props| props.serves(engine.model)),
    };
    if !ours {
        tracing::debug!(
            port = engine.port,
            "a stranger answers on the engine's port"
        );
    }
    ours.then_some(listener)
}

/// Asks a ready engine what it runs.
pub(super) async fn ask_props(client: &Client, engine: &Waited<'_>) -> Result<Props, EngineError> {
    let deadline = Instant::now() + PROPS_LIMIT;
    loop {
        let reason = match props(client, engine.url).await {
            Ok(props) => return Ok(props),
            Err(error) => crate::error::chain(&error.without_url()),
        };
        if Instant::now() >= deadline {
            return Err(EngineError::Props {
                pool: engine.pool.clone(),
                reason,
            });
        }
        tokio::time::sleep(PROPS_POLL).await;
    }
}

async fn props(client: &Client, url: &str) -> Result<Props, reqwest::Error> {
    let answer = client.get(format!("{url}/props")).send().await?;
    answer.error_for_status()?.json().await
}

/// Looks whether the engine counts. It serves without, so this is a warning.
pub(super) async fn probe_metrics(client: &Client, engine: &Waited<'_>) -> Option<String> {
    let answer = client.get(format!("{}/metrics", engine.url)).send().await;
    match answer.and_then(reqwest::Response::error_for_status) {
        Ok(_) => None,
        Err(error) => {
            let reason = crate::error::chain(&error.without_url());
            tracing::warn!(pool = %engine.pool, reason, "the engine's /metrics cannot be read");
            Some(format!("the engine's /metrics cannot be read: {reason}"))
        }
    }
}
