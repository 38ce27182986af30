//! `orchestratord serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use provision_kit::fs::write_unflushed;
use provision_kit::lock::FileLock;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpSocket};

use super::{Context, report};
use crate::app::bootstrap::{self, Plan, StartError};
use crate::app::config::Config;
use crate::app::shutdown::Signals;
use crate::services::pool::{Phase, PoolHandle};
use crate::ui::progress_reporter;

pub(super) async fn serve(context: Context) -> ExitCode {
    match try_serve(context).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => report::error(&error),
    }
}

async fn try_serve(context: Context) -> Result<(), StartError> {
    let reporter = progress_reporter(context.log_format, &context.bars);
    let plan = Plan::read(context.source.clone(), reporter)?;
    let config = plan.loaded.config.clone();
    let signals = Signals::listen().map_err(StartError::Signals)?;
    bootstrap::check_directories(&config)?;
    let _only_one = lock_runtime_dir(&config)?;
    let listener = bind(config.listen)?;
    let address = listener.local_addr().unwrap_or(config.listen);
    let app = bootstrap::start(plan)?;
    let shutdown = signals.heed(config.drain(), Some(app.state.reloads.clone()));
    tracing::info!("listening on http://{address}");
    let presence = Presence::announce(&config, address)?;
    for pool in app.state.pools.get().values() {
        // Ends when the pool is ready, or with it.
        tokio::spawn(say_when_ready(pool.clone(), address));
    }
    let served = bootstrap::serve(app, listener, shutdown).await;
    drop(presence);
    tracing::info!("stopped");
    served
}

/// Handoff files tell others what runs here, so two daemons cannot share their
/// directory.
fn lock_runtime_dir(config: &Config) -> Result<FileLock, StartError> {
    let (_, runtime) = bootstrap::directories(config)?;
    let path = runtime.root().join("orchestratord.lock");
    match FileLock::try_acquire(&path) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(StartError::RuntimeDirTaken {
            dir: runtime.root().to_owned(),
            holder: std::fs::read_to_string(&path)
                .unwrap_or_default()
                .trim()
                .to_owned(),
        }),
        Err(source) => Err(StartError::RuntimeDir {
            dir: runtime.root().to_owned(),
            source,
        }),
    }
}

/// The line that somebody at a terminal waits for.
async fn say_when_ready(pool: PoolHandle, address: SocketAddr) {
    if pool.snapshot().phase == Phase::Unloaded {
        let settings = pool.settings();
        tracing::info!(
            "on demand: http://{address} serves {} in pool {}, loaded by the first task",
            settings.model,
            settings.id
        );
    }
    if pool
        .wait_for(|snapshot| snapshot.phase == Phase::Ready)
        .await
        .is_some()
    {
        let settings = pool.settings();
        tracing::info!(
            "ready: http://{address} serves {} in pool {}",
            settings.model,
            settings.id
        );
    }
}

/// How many clients may wait to be accepted. Those who come at once beyond it try
/// again after a second, whatever the daemon could do for them.
const BACKLOG: u32 = 4096;

fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = match address {
            SocketAddr::V4(_) => TcpSocket::new_v4(),
            SocketAddr::V6(_) => TcpSocket::new_v6(),
        }?;
        // The port of a daemon that has just ended is free again.
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|source| StartError::Listen { address, source })
}

/// The file that tells other programs where this daemon listens; removed when
/// it stops.
struct Presence(PathBuf);

/// What that file holds.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listening {
    pub(super) pid: u32,
    pub(super) url: String,
    pub(super) version: String,
}

impl Listening {
    /// Where the file is.
    pub(super) fn path(config: &Config) -> Result<PathBuf, StartError> {
        let (_, runtime) = bootstrap::directories(config)?;
        Ok(runtime.root().join("orchestratord.json"))
    }
}

impl Presence {
    fn announce(config: &Config, address: SocketAddr) -> Result<Self, StartError> {
        let path = Listening::path(config)?;
        let listening = Listening {
            pid: std::process::id(),
            url: format!("http://{address}"),
            version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        // Numbers and strings only, which JSON always holds.
        let mut text = serde_json::to_vec_pretty(&listening).unwrap_or_default();
        text.push(b'\n');
        write_unflushed(&path, &text).map_err(|source| StartError::Write {
            what: format!("{}", path.display()),
            source,
        })?;
        Ok(Self(path))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        // Left behind it would only name a process that is gone.
        let _ = std::fs::remove_file(&self.0);
    }
}
