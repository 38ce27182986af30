//! What happens at start, in order.
//!
//! 1. The configuration is read and checked (by the caller, before any port
//!    is bound).
//! 2. Every pool gets its owner, in phase `Provisioning`.
//! 3. Every pool gets its supervisor: model and engine side by side, start,
//!    readiness, `ProvisionedContext`, bind, Ready. The env shim and scripted
//!    engines have supervisors of their own, in builds that hold them.
//! 4. The HTTP server listens at once: what is being prepared can be seen, and
//!    tasks are queued.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use adapter_host::{AdapterHost, HostSettings};
use llama_orch_types::Hinted;
use provision_kit::dirs::{CacheDirs, NoCacheDir, RuntimeDirs};
use provision_kit::fs::{create_dir_all, remove_file_if_there, write_unflushed};
use provision_kit::process::all_ended;
use provision_kit::progress::Reporter;
#[cfg(feature = "provisioning")]
use provision_kit::progress::Silent;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};

use super::config::{Config, Loaded, SetupError, Source, Token};
use super::current::Current;
use super::env;
use super::launch::Launcher;
#[cfg(feature = "provisioning")]
use super::launch::model_provisioner;
use super::reload::{self, Reloader, RunningReloader};
use super::router::router;
use super::server;
use super::shutdown::Shutdown;
use super::state::AppState;
use crate::api::repeats::Repeats;
use crate::runtimes::blocking;
use crate::services::pool::Leaving;
use crate::services::pulls::{Fetch, Pulls};
use crate::services::residency::Residency;
use crate::services::tasks::{Retention, TaskRegistry};
use crate::telemetry_recorder;

/// How long supervisors may take to stop their engines, over and above the
/// engines' own grace.
pub(super) const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long open connections may take to notice that their streams ended.
const CONNECTION_LIMIT: Duration = Duration::from_secs(5);

/// How many models may be read whole at a time: it is the disk's work.
const VERIFYING_AT_ONCE: usize = 2;

const SWEEP_EVERY: Duration = Duration::from_secs(5);

/// Why the daemon did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("the configuration cannot be used")]
    Setup(#[source] SetupError),
    #[error("no cache directory can be chosen")]
    Dirs(#[source] NoCacheDir),
    #[error("could not listen on {address}")]
    Listen {
        address: std::net::SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(
        "{} names an engine, and {} allows only provisioned ones",
        env::SHIM_URL,
        env::REQUIRE_REAL_LLAMA
    )]
    ShimRefused,
    #[cfg(feature = "provisioning")]
    #[error("the models cannot be set up")]
    Models(#[source] provisioners_model_provisioner::ModelError),
    #[error("the server broke off")]
    Serve(#[source] std::io::Error),
    #[error("signals cannot be listened to")]
    Signals(#[source] std::io::Error),
    #[error("another orchestratord ({holder}) uses the runtime directory {}", .dir.display())]
    RuntimeDirTaken {
        dir: std::path::PathBuf,
        holder: String,
    },
    #[error("could not use the runtime directory {}", .dir.display())]
    RuntimeDir {
        dir: std::path::PathBuf,
        #[source]
        source: provision_kit::lock::LockError,
    },
    #[error("{name} is set and cannot be used: {problem}")]
    Variable {
        name: &'static str,
        problem: &'static str,
    },
    #[error("`{key}`: nothing can be written to {}", .dir.display())]
    Directory {
        key: &'static str,
        dir: std::path::PathBuf,
        #[source]
        source: provision_kit::fs::FsError,
    },
    #[error("could not write {what}")]
    Write {
        what: String,
        #[source]
        source: provision_kit::fs::FsError,
    },
}

impl Hinted for StartError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::Dirs(_) => {
                Some("set HOME or XDG_CACHE_HOME, or `cache_dir` in the configuration".to_owned())
            }
            Self::Listen { .. } => {
                Some("choose another address with --listen; port 0 takes any free one".to_owned())
            }
            Self::ShimRefused => Some(format!(
                "unset one of {} and {}",
                env::SHIM_URL,
                env::REQUIRE_REAL_LLAMA
            )),
            Self::Write { source, .. } => source.hint(),
            Self::Directory { key, dir, .. } => Some(format!(
                "make {} writable for this user, or choose another place with --{}{}",
                dir.display(),
                key.replace('_', "-"),
                if *key == "cache_dir" { "; the rest of a cache that holds everything may be read-only" } else { "" }
            )),
            Self::RuntimeDirTaken { .. } => Some(
                "stop it first, or start this one with another --runtime-dir (and another pool or --cache-dir)".to_owned(),
            ),
            Self::RuntimeDir { source, .. } => source.hint(),
            Self::Variable { name, .. } => Some(format!("give {name} a value, or unset it")),
            #[cfg(feature = "provisioning")]
            Self::Models(error) => error.hint(),
            Self::Serve(_) | Self::Signals(_) => None,
        }
    }
}

/// What the start needs to know.
#[derive(Debug)]
pub struct Plan {
    /// Where the configuration comes from, to read it again.
    pub source: Source,
    pub loaded: Loaded,
    pub token: Option<Token>,
    pub real_only: bool,
    /// Where progress is shown.
    pub reporter: Arc<dyn Reporter>,
}

/// The running daemon, apart from its HTTP server.
#[derive(Debug)]
pub struct App {
    pub state: Arc<AppState>,
    reloader: RunningReloader,
    /// The supervisors and the sweeper.
    background: TaskTracker,
    stop: CancellationToken,
}

impl Plan {
    /// Reads the configuration and what the environment says, and checks
    /// everything together.
    pub fn read(source: Source, reporter: Arc<dyn Reporter>) -> Result<Self, StartError> {
        let loaded = source.load().map_err(StartError::Setup)?;
        Self::new(source, loaded, reporter)
    }

    /// The same, of a configuration that has been read.
    pub fn new(
        source: Source,
        loaded: Loaded,
        reporter: Arc<dyn Reporter>,
    ) -> Result<Self, StartError> {
        let real_only = env::real_engines_only(variable(env::REQUIRE_REAL_LLAMA)?.as_deref());
        if real_only && std::env::var_os(env::SHIM_URL).is_some_and(|url| !url.is_empty()) {
            return Err(StartError::ShimRefused);
        }
        let from_env = variable(env::TOKEN)?;
        if from_env.as_deref() == Some("") {
            // A secret that did not arrive must not open the door.
            return Err(StartError::Variable {
                name: env::TOKEN,
                problem: "it is empty",
            });
        }
        let token = loaded.config.token(from_env).map_err(StartError::Setup)?;
        loaded
            .check(token.is_some(), real_only)
            .map_err(StartError::Setup)?;
        Ok(Self {
            source,
            loaded,
            token,
            real_only,
            reporter,
        })
    }
}

/// A variable of ours, if it is set. One that is no text was meant to say
/// something, and is not passed over.
fn variable(name: &'static str) -> Result<Option<String>, StartError> {
    match std::env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(std::env::VarError::NotPresent) => Ok(None),
        Err(std::env::VarError::NotUnicode(_)) => Err(StartError::Variable {
            name,
            problem: "it is not UTF-8",
        }),
    }
}

/// The directories in force.
pub fn directories(config: &Config) -> Result<(CacheDirs, RuntimeDirs), StartError> {
    let cache = match &config.cache_dir {
        Some(dir) => dir.clone(),
        None => CacheDirs::default_root().map_err(StartError::Dirs)?,
    };
    let runtime = config
        .runtime_dir
        .clone()
        .unwrap_or_else(|| ".runtime".into());
    Ok((CacheDirs::new(cache), RuntimeDirs::new(runtime)))
}

/// Sees whether files can be written where every start writes some, before any
/// port is bound. The rest of the cache may be read-only: then it must hold
/// what the pools need.
pub fn check_directories(config: &Config) -> Result<(), StartError> {
    let (cache, runtime) = directories(config)?;
    for (key, dir) in [
        ("runtime_dir", runtime.root().to_owned()),
        ("cache_dir", cache.run()),
    ] {
        let probe = dir.join(format!(".probe-{}", std::process::id()));
        let usable = create_dir_all(&dir)
            .and_then(|()| write_unflushed(&probe, b""))
            .and_then(|()| remove_file_if_there(&probe));
        usable.map_err(|source| StartError::Directory { key, dir, source })?;
    }
    Ok(())
}

/// Starts every pool's owner and supervisor, and the reloader, which owns them.
pub fn start(plan: Plan) -> Result<App, StartError> {
    let config = plan.loaded.config.clone();
    let dirs = directories(&config)?;
    let host = AdapterHost::new(HostSettings {
        first_token_timeout: Duration::from_secs(config.tasks.first_token_seconds),
        next_token_timeout: Duration::from_secs(config.tasks.next_token_seconds),
        ..HostSettings::default()
    });
    let residency = Residency::start(
        super::config::rules(&config.memory),
        budget(config.memory.clone()),
    );
    let (reloads, commands) = reload::channel();
    let stop = CancellationToken::new();
    let background = TaskTracker::new();
    #[cfg(feature = "provisioning")]
    let models = Arc::new(model_provisioner(&config.models, &dirs, Arc::new(Silent))?);
    #[cfg(feature = "provisioning")]
    let fetch: Arc<dyn Fetch> = models.clone();
    #[cfg(not(feature = "provisioning"))]
    let fetch: Arc<dyn Fetch> = Arc::new(crate::services::pulls::NoModels);
    let pulls = Pulls::start(
        fetch,
        dirs.1.root().join("pulls.json"),
        Arc::clone(&plan.reporter),
        &background,
        stop.clone(),
    );
    let state = Arc::new(AppState {
        tasks: TaskRegistry::new(Retention {
            keep_for: Duration::from_secs(config.tasks.keep_seconds),
            at_most: usize::try_from(config.tasks.keep_at_most).unwrap_or(usize::MAX),
            bytes: usize::try_from(config.tasks.keep_bytes).unwrap_or(usize::MAX),
        }),
        host: host.clone(),
        residency: residency.clone(),
        metrics: telemetry_recorder(),
        token: Current::new(plan.token.clone()),
        max_body_bytes: usize::try_from(config.tasks.max_body_bytes).unwrap_or(usize::MAX),
        limits: config.limits.clone(),
        real_only: plan.real_only,
        started: Instant::now(),
        started_at: SystemTime::now(),
        repeats: Repeats::default(),
        pulls,
        verifying: Arc::new(Semaphore::new(VERIFYING_AT_ONCE)),
        #[cfg(feature = "provisioning")]
        models,
        #[cfg(feature = "provisioning")]
        model_settings: config.models.clone(),
        pools: Current::new(BTreeMap::new()),
        reloads,
    });
    background.spawn(sweep(Arc::clone(&state), stop.clone()));
    let launcher = Launcher {
        #[cfg(feature = "provisioning")]
        models: config.models.clone(),
        #[cfg(feature = "provisioning")]
        dirs,
        host,
        #[cfg(feature = "provisioning")]
        residency,
        reporter: Arc::clone(&plan.reporter),
        supervisors: background.clone(),
        stop: stop.clone(),
    };
    let reloader = Reloader::start(plan, launcher, Arc::clone(&state), commands)?;
    Ok(App {
        state,
        reloader,
        background,
        stop,
    })
}

#[cfg(feature = "provisioning")]
use crate::provisioning::machine::budget;

/// A build that starts no engines promises no memory.
#[cfg(not(feature = "provisioning"))]
async fn budget(_: super::config::MemoryConfig) -> crate::services::residency::Budget {
    crate::services::residency::Budget::default()
}

impl App {
    /// Lets running tasks finish, within the configured time unless somebody
    /// is in a hurry, then stops the engines.
    pub async fn shut_down(self, hurried: &CancellationToken) {
        // First, so that nothing is started any more.
        let drain = self.reloader.end().await;
        let pools = self.state.pools.get();
        let drains = pools
            .values()
            .map(|pool| pool.end(Leaving::DaemonEnds, drain));
        tokio::select! {
            _ = futures::future::join_all(drains) => {}
            () = hurried.cancelled() => {}
        }
        self.stop.cancel();
        self.background.close();
        if tokio::time::timeout(STOP_LIMIT, self.background.wait())
            .await
            .is_err()
        {
            tracing::error!(
                "an engine did not stop within {} s; it is killed with the daemon",
                STOP_LIMIT.as_secs()
            );
        }
        // What was given up lets go of its files, locks and children before we end.
        let nothing_apart = crate::runtimes::nothing_apart();
        if tokio::time::timeout(STOP_LIMIT, nothing_apart)
            .await
            .is_err()
        {
            tracing::error!(
                "what was given up did not end within {} s",
                STOP_LIMIT.as_secs()
            );
        }
        // A build that was given up ends its compilers before we end.
        if tokio::time::timeout(STOP_LIMIT, all_ended()).await.is_err() {
            tracing::error!("a build did not end within {} s", STOP_LIMIT.as_secs());
        }
    }
}

/// Serves until somebody asks for the end, then shuts everything down. Pulls
/// that an earlier daemon did not finish go on.
pub async fn serve(app: App, listener: TcpListener, shutdown: Shutdown) -> Result<(), StartError> {
    if let Err(failure) = app.state.pulls.go_on().await {
        tracing::warn!(failure = failure.message, "interrupted pulls do not go on");
    }
    let closing = CancellationToken::new();
    let server = {
        // Routes and their descriptions take milliseconds, in which the pools begin.
        let (state, limits) = (Arc::clone(&app.state), app.state.limits.clone());
        let router = blocking(move || router(state)).await;
        let serving = server::serve(listener, router, limits, closing.clone());
        AbortOnDropHandle::new(tokio::spawn(serving))
    };
    let mut server = std::pin::pin!(server);
    tokio::select! {
        ended = &mut server => {
            // It ends by itself only by a fault of ours.
            let fault = ended.err().map_or_else(|| "the server ended".to_owned(), |broken| broken.to_string());
            return Err(StartError::Serve(std::io::Error::other(fault)));
        }
        () = shutdown.asked.cancelled() => {}
    }
    // Reads go on while tasks finish; their streams end with their logs.
    app.shut_down(&shutdown.hurried).await;
    closing.cancel();
    tokio::select! {
        _ = tokio::time::timeout(CONNECTION_LIMIT, &mut server) => {}
        () = shutdown.hurried.cancelled() => {}
    }
    Ok(())
}

async fn sweep(state: Arc<AppState>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(SWEEP_EVERY);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                state.tasks.sweep(Instant::now());
                let metrics = state.metrics.clone();
                blocking(move || metrics.run_upkeep()).await;
            }
            () = stop.cancelled() => return,
        }
    }
}
