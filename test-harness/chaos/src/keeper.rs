//! Keeps the daemon's process: starts it, ends it in the ways that faults
//! want, and knows which of its ends were wanted.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tokio::sync::watch;

use crate::procs::{self, Process};
use crate::setup::Setup;

const LISTEN_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// A daemon that listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Up {
    /// Counts starts.
    pub generation: u64,
    pub url: String,
    pub pid: u32,
    pub since: Instant,
}

/// What the harness means to do with one start of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It must live and answer.
    Serving,
    /// It was asked to end in order.
    Stopping,
    /// It is killed, or gone.
    Killed,
}

#[derive(Debug)]
pub struct Keeper {
    setup: Arc<Setup>,
    child: tokio::sync::Mutex<Option<Child>>,
    up: watch::Sender<Option<Up>>,
    fates: Mutex<Vec<Fate>>,
    ports: Mutex<BTreeSet<u16>>,
}

impl Keeper {
    pub fn new(setup: Arc<Setup>) -> Self {
        Self {
            setup,
            child: tokio::sync::Mutex::new(None),
            up: watch::Sender::new(None),
            fates: Mutex::default(),
            ports: Mutex::default(),
        }
    }

    /// The daemon, if one is meant to serve.
    pub fn up(&self) -> Option<Up> {
        self.up.borrow().clone()
    }

    /// Waits until a daemon serves; `None` after `limit`.
    pub async fn until_up(&self, limit: Duration) -> Option<Up> {
        let mut up = self.up.subscribe();
        let found = tokio::time::timeout(limit, up.wait_for(Option::is_some)).await;
        found.ok()?.ok()?.clone()
    }

    pub fn fate(&self, generation: u64) -> Fate {
        let fates = self.fates.lock().unwrap_or_else(PoisonError::into_inner);
        fates
            .get(generation as usize)
            .copied()
            .unwrap_or(Fate::Killed)
    }

    fn set_fate(&self, fate: Fate) {
        if let Some(last) = self
            .fates
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last_mut()
        {
            *last = fate;
        }
    }

    /// The port of the daemon that served last. Those of earlier ones may belong
    /// to strangers by now.
    pub fn ports(&self) -> BTreeSet<u16> {
        self.ports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    pub async fn start(&self) -> Result<Up, String> {
        let config = self.setup.config_file();
        let config = config.to_string_lossy();
        self.start_as(self.setup.command(&["serve", "--config", &config]))
            .await
    }

    /// Starts a daemon whose files may not grow beyond so many KiB: to the
    /// daemon a disk that is full.
    pub async fn start_with_little_disk(&self, kib: u64) -> Result<Up, String> {
        let mut command = Command::new("bash");
        self.setup.environment(&mut command);
        command.args([
            "-c",
            "trap '' XFSZ; ulimit -f \"$1\"; shift; exec \"$@\"",
            "bash",
        ]);
        command.arg(kib.to_string()).arg(&self.setup.daemon);
        command
            .arg("serve")
            .arg("--config")
            .arg(self.setup.config_file());
        self.start_as(command).await
    }

    async fn start_as(&self, mut command: Command) -> Result<Up, String> {
        let mut child = self.child.lock().await;
        if child.is_some() {
            return Err("a daemon is there already".to_owned());
        }
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.setup.dir.join("daemon.log"))
            .map_err(|error| format!("no log for the daemon: {error}"))?;
        let spawned = command.stdout(Stdio::null()).stderr(log).spawn();
        let mut started = spawned.map_err(|error| format!("cannot be run: {error}"))?;
        let generation = {
            let mut fates = self.fates.lock().unwrap_or_else(PoisonError::into_inner);
            fates.push(Fate::Serving);
            fates.len() as u64 - 1
        };
        match self.announced(&mut started).await {
            Ok(url) => {
                let port = url
                    .rsplit(':')
                    .next()
                    .and_then(|port| port.parse::<u16>().ok());
                *self.ports.lock().unwrap_or_else(PoisonError::into_inner) =
                    port.into_iter().collect();
                let up = Up {
                    generation,
                    url,
                    pid: started.id(),
                    since: Instant::now(),
                };
                *child = Some(started);
                self.up.send_replace(Some(up.clone()));
                Ok(up)
            }
            Err(error) => {
                self.set_fate(Fate::Killed);
                // Gone already, or to be gone.
                let _ = started.kill();
                let _ = started.wait();
                Err(error)
            }
        }
    }

    async fn announced(&self, child: &mut Child) -> Result<String, String> {
        let begun = Instant::now();
        loop {
            if let Ok(text) = std::fs::read_to_string(self.setup.announcement())
                && let Ok(said) = serde_json::from_str::<Value>(&text)
                && said["pid"] == child.id()
                && let Some(url) = said["url"].as_str()
            {
                return Ok(url.to_owned());
            }
            if let Ok(Some(status)) = child.try_wait() {
                return Err(format!("the daemon ended before it listened: {status}"));
            }
            if begun.elapsed() > LISTEN_LIMIT {
                return Err(format!("the daemon did not listen within {LISTEN_LIMIT:?}"));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Kills the daemon, and says who descended from it at that moment.
    pub async fn kill9(&self) -> Vec<Process> {
        let mut child = self.child.lock().await;
        self.set_fate(Fate::Killed);
        self.up.send_replace(None);
        let Some(mut child) = child.take() else {
            return Vec::new();
        };
        let below = procs::descendants(child.id());
        // Fails only if it has ended already.
        let _ = child.kill();
        let _ = child.wait();
        below
    }

    /// Asks the daemon to end; `None` if it has not within `limit`, and was killed.
    pub async fn stop(&self, limit: Duration) -> Option<ExitStatus> {
        let mut slot = self.child.lock().await;
        self.set_fate(Fate::Stopping);
        self.up.send_replace(None);
        let mut child = slot.take()?;
        signal(child.id(), Signal::SIGTERM);
        let begun = Instant::now();
        while begun.elapsed() < limit {
            if let Ok(Some(status)) = child.try_wait() {
                self.set_fate(Fate::Killed);
                return Some(status);
            }
            tokio::time::sleep(POLL).await;
        }
        self.set_fate(Fate::Killed);
        let _ = child.kill();
        let _ = child.wait();
        None
    }

    /// How the daemon ended, if it did so without being asked to.
    pub async fn unasked_end(&self) -> Option<ExitStatus> {
        let mut slot = self.child.lock().await;
        let status = slot.as_mut()?.try_wait().ok()??;
        *slot = None;
        self.set_fate(Fate::Killed);
        self.up.send_replace(None);
        Some(status)
    }
}

/// A run that is given up leaves no daemon behind.
impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(child) = self.child.get_mut() {
            // An error only says that it has ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Sends a signal. An error says that the process is gone, which whoever cares
/// sees elsewhere.
pub fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}
