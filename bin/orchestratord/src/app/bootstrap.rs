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
use std::time::{Duration, Instant};

use adapter_host::{AdapterHost, HostSettings};
use llama_orch_types::{EngineKind, Hinted, PoolId};
use provision_kit::dirs::{CacheDirs, NoCacheDir, RuntimeDirs};
use provision_kit::process::all_ended;
use provision_kit::progress::Reporter;
#[cfg(feature = "provisioning")]
use provision_kit::progress::Silent;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::config::{Config, Loaded, PoolConfig, SetupError, Token};
use super::env;
use super::router::router;
use super::shutdown::Shutdown;
use super::state::AppState;
use crate::services::pool::{PoolHandle, PoolSettings};
use crate::services::preparation::PreparationBoard;
use crate::services::tasks::{Retention, TaskRegistry};
use crate::telemetry_recorder;

/// How long supervisors may take to stop their engines, over and above the
/// engines' own grace.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// How long open connections may take to notice that their streams ended.
const CONNECTION_LIMIT: Duration = Duration::from_secs(5);

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
    supervisors: TaskTracker,
    stop: CancellationToken,
    drain: Duration,
}

impl Plan {
    /// Reads what the environment says and checks everything together.
    pub fn new(loaded: Loaded, reporter: Arc<dyn Reporter>) -> Result<Self, StartError> {
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

/// Starts every pool's owner and supervisor.
pub fn start(plan: Plan) -> Result<App, StartError> {
    let config = plan.loaded.config;
    let dirs = directories(&config)?;
    let host = AdapterHost::new(HostSettings {
        first_token_timeout: Duration::from_secs(config.tasks.first_token_seconds),
        next_token_timeout: Duration::from_secs(config.tasks.next_token_seconds),
        ..HostSettings::default()
    });
    let pools: BTreeMap<PoolId, PoolHandle> = config
        .pools
        .iter()
        .map(|(id, pool)| {
            let handle = start_pool(id, pool, config.drain(), &host, &plan.reporter);
            (id.clone(), handle)
        })
        .collect();
    let state = Arc::new(AppState {
        tasks: TaskRegistry::new(Retention {
            keep_for: Duration::from_secs(config.tasks.keep_seconds),
            at_most: usize::try_from(config.tasks.keep_at_most).unwrap_or(usize::MAX),
        }),
        host,
        metrics: telemetry_recorder(),
        token: plan.token,
        max_body_bytes: usize::try_from(config.tasks.max_body_bytes).unwrap_or(usize::MAX),
        real_only: plan.real_only,
        started: Instant::now(),
        #[cfg(feature = "provisioning")]
        models: Arc::new(model_provisioner(&config, &dirs, Arc::new(Silent))?),
        pools,
    });
    let app = App {
        state,
        supervisors: TaskTracker::new(),
        stop: CancellationToken::new(),
        drain: config.drain(),
    };
    app.supervisors
        .spawn(sweep(Arc::clone(&app.state), app.stop.clone()));
    for (id, pool) in &config.pools {
        app.supervise(id, pool, &config, &dirs)?;
    }
    app.supervisors.close();
    Ok(app)
}

/// A provisioner of models that reports to `reporter`.
#[cfg(feature = "provisioning")]
fn model_provisioner(
    config: &Config,
    (cache, runtime): &(CacheDirs, RuntimeDirs),
    reporter: Arc<dyn Reporter>,
) -> Result<provisioners_model_provisioner::ModelProvisioner, StartError> {
    provisioners_model_provisioner::ModelProvisioner::new(
        config.models.clone(),
        cache,
        runtime,
        reporter,
    )
    .map_err(StartError::Models)
}

fn start_pool(
    id: &PoolId,
    config: &PoolConfig,
    drain: Duration,
    host: &AdapterHost,
    reporter: &Arc<dyn Reporter>,
) -> PoolHandle {
    let settings = PoolSettings::new(id.clone(), Arc::new(config.clone()), drain);
    PoolHandle::start(
        settings,
        host.clone(),
        PreparationBoard::new(Arc::clone(reporter)),
    )
}

impl App {
    /// Starts the supervisor that a pool needs.
    #[cfg_attr(not(feature = "provisioning"), allow(clippy::unnecessary_wraps))]
    fn supervise(
        &self,
        id: &PoolId,
        pool: &PoolConfig,
        config: &Config,
        dirs: &(CacheDirs, RuntimeDirs),
    ) -> Result<(), StartError> {
        let handle = self.state.pools[id].clone();
        let (host, stop) = (self.state.host.clone(), self.stop.clone());
        #[cfg(feature = "env-shim")]
        if let Some(target) = crate::env_shim::target_for(id) {
            self.supervisors
                .spawn(crate::env_shim::supervise(target, handle, host, stop));
            return Ok(());
        }
        #[cfg(feature = "mock-adapter")]
        if pool.engine == EngineKind::Mock {
            self.supervisors
                .spawn(crate::mock_pool::supervise(handle, host, pool.slots, stop));
            return Ok(());
        }
        // Refused by the configuration's check in builds without it.
        debug_assert!(pool.engine == EngineKind::Llamacpp);
        #[cfg(feature = "provisioning")]
        {
            // The pool's own board takes the progress, so that it shows where it belongs.
            let models = model_provisioner(config, dirs, handle.board().clone())?;
            let supervisor = crate::provisioning::Supervisor::new(handle, host, models, dirs, stop);
            self.supervisors.spawn(supervisor.run());
        }
        #[cfg(not(feature = "provisioning"))]
        {
            let _ = (config, dirs, host);
            self.supervisors.spawn(no_engine(handle, stop));
        }
        Ok(())
    }

    /// Lets running tasks finish, within the configured time unless somebody
    /// is in a hurry, then stops the engines.
    pub async fn shut_down(self, hurried: &CancellationToken) {
        let drains = self.state.pools.values().map(|pool| pool.drain(self.drain));
        tokio::select! {
            _ = futures::future::join_all(drains) => {}
            () = hurried.cancelled() => {}
        }
        self.stop.cancel();
        if tokio::time::timeout(STOP_LIMIT, self.supervisors.wait())
            .await
            .is_err()
        {
            tracing::error!(
                "an engine did not stop within {} s; it is killed with the daemon",
                STOP_LIMIT.as_secs()
            );
        }
        // A build that was given up ends its compilers before we end.
        if tokio::time::timeout(STOP_LIMIT, all_ended()).await.is_err() {
            tracing::error!("a build did not end within {} s", STOP_LIMIT.as_secs());
        }
    }
}

/// Serves until somebody asks for the end, then shuts everything down.
pub async fn serve(app: App, listener: TcpListener, shutdown: Shutdown) -> Result<(), StartError> {
    let closing = CancellationToken::new();
    let server = {
        let closing = closing.clone();
        // Tokens are small and must not wait for each other.
        let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
            let _ = stream.set_nodelay(true);
        });
        let serve = axum::serve(listener, router(Arc::clone(&app.state)))
            .with_graceful_shutdown(closing.cancelled_owned());
        tokio::spawn(serve.into_future())
    };
    let mut server = std::pin::pin!(server);
    tokio::select! {
        ended = &mut server => {
            let ended = ended.unwrap_or_else(|broken| Err(std::io::Error::other(broken)));
            return ended.map_err(StartError::Serve);
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
                state.metrics.run_upkeep();
            }
            () = stop.cancelled() => return,
        }
    }
}

/// A build without provisioning has no engine to offer, and says so.
#[cfg(not(feature = "provisioning"))]
async fn no_engine(pool: PoolHandle, stop: CancellationToken) {
    use crate::services::event_log::Failure;
    use crate::services::pool::{Change, Wanted};
    let failure = Failure::new(
        llama_orch_types::ErrorCode::PoolUnavailable,
        "this build of orchestratord provisions no engine",
    )
    .with_hint("use a build with the feature `provisioning`, which is on by default");
    let mut orders = pool.orders();
    loop {
        let wanted = orders.borrow_and_update().wanted.clone();
        let change = match wanted {
            Wanted::Start { .. } => Change::NotStarted {
                failure: failure.clone(),
                log: Vec::new(),
            },
            _ => Change::Stopped,
        };
        pool.change(change).await;
        tokio::select! {
            changed = orders.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}
