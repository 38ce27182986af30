//! A daemon with several pools, and the engines it has running.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use provision_kit::dirs::CacheDirs;
use provision_kit::lock::FileLock;
use serde_json::{Value, json};
use test_harness_e2e_haiku::client::Api;
use test_harness_e2e_haiku::daemon::{Daemon, remove_traces};
use test_harness_e2e_haiku::engine::is_gone;
use test_harness_e2e_haiku::settings::Settings;
use test_harness_e2e_haiku::wait_for;
use tokio::sync::{Mutex, MutexGuard};

/// How long engines may outlive their daemon: they do not.
const GONE_LIMIT: Duration = Duration::from_secs(2);

/// One daemon at a time: its engines would slow another's down.
pub async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// A pool's name, which no other process uses.
pub fn pool(name: &str) -> String {
    format!("clients-{name}-{}", std::process::id())
}

/// A running daemon with pools of several models.
#[derive(Debug)]
pub struct Server {
    daemon: Daemon,
    pools: Vec<String>,
}

impl Server {
    /// Starts a daemon, and waits until it listens. `first` is what its first
    /// pool, [`Server::first`], has beyond what all have; `more` is the rest of
    /// the configuration, with further pools.
    pub async fn start(name: &'static str, first: Value, more: Value) -> Self {
        Self::with(&Settings {
            pool: first,
            more,
            ..Settings::real(name)
        })
        .await
    }

    /// Starts a daemon whose only pool, called `model` there, is at these places.
    pub async fn in_front_of(name: &'static str, model: &str, endpoints: Value) -> Self {
        Self::with(&Settings {
            pool: json!({
                "engine": "openai", "model": model, "endpoints": endpoints,
                // What all other pools have says nothing about engines elsewhere.
                "profile": null, "threads": null,
            }),
            // These are refused where only provisioned engines may answer.
            variables: vec![],
            ..Settings::real(name)
        })
        .await
    }

    async fn with(settings: &Settings) -> Self {
        remove_stale_traces();
        let mut pools = vec![];
        if let Some(further) = settings.more["pools"].as_object() {
            pools.extend(further.keys().cloned());
        }
        let daemon = Daemon::launch(settings).await;
        pools.insert(0, daemon.pool.clone());
        Self { daemon, pools }
    }

    /// The name of the first pool.
    pub fn first(&self) -> &str {
        &self.daemon.pool
    }

    pub fn pools(&self) -> &[String] {
        &self.pools
    }

    pub fn api(&self) -> &Api {
        &self.daemon.api
    }

    pub fn url(&self) -> &str {
        self.daemon.api.url()
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// What the daemon wrote to its standard error so far.
    pub fn log_text(&self) -> String {
        self.daemon.log_text()
    }

    /// Asks the daemon to end, and checks that none of its engines is left.
    pub async fn stop(mut self) {
        let engines = engines_of(self.pid());
        self.daemon.end().await;
        for engine in engines {
            wait_for("the engine's end", GONE_LIMIT, async || {
                is_gone(engine).then_some(())
            })
            .await;
        }
        let cache = CacheDirs::default_root().expect("the cache directory has a name");
        for pool in &self.pools {
            let left = processes_named_for(pool);
            assert!(left.is_empty(), "{pool} has left processes: {left:?}");
            remove_traces(
                &cache.join("run").join(format!("llamacpp-{pool}.log")),
                pool,
            );
        }
    }
}

/// Removes the locks and logs in the machine's cache that tests left behind which
/// failed or were ended: those with a name of theirs and the id of a process that is
/// gone.
fn remove_stale_traces() {
    let cache = CacheDirs::default_root().expect("the cache directory has a name");
    let run = cache.join("run");
    for entry in fs::read_dir(&run).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pool) = name.to_str().and_then(|name| name.strip_suffix(".lock")) else {
            continue;
        };
        let stale = process_in(pool).is_some_and(is_gone);
        // One that is held belongs to somebody, whoever has the id now.
        if stale && matches!(FileLock::try_acquire(&entry.path()), Ok(Some(_))) {
            remove_traces(&run.join(format!("llamacpp-{pool}.log")), pool);
        }
    }
}

/// The id of the process that gave a pool its name, if a test did.
fn process_in(pool: &str) -> Option<u32> {
    let rest = pool
        .strip_prefix("clients-")
        .or(pool.strip_prefix("e2e-"))?;
    rest.rsplit_once('-')?.1.parse().ok()
}

/// What all pools here have in common: one thread, as two starve each other as
/// soon as anything else runs on a machine with two cores.
pub fn pool_with(settings: &Value) -> Value {
    let mut pool = json!({ "model": "haiku", "threads": 1, "load": "on_demand" });
    if let (Some(pool), Some(more)) = (pool.as_object_mut(), settings.as_object()) {
        pool.extend(more.clone());
    }
    pool
}

/// The engine processes that a daemon has running.
pub fn engines_of(daemon: u32) -> Vec<u32> {
    processes(|process| {
        is_engine(process) && parent(process) == Some(daemon) && !is_gone(process.0)
    })
}

/// Engines whose command line holds a pool's name.
fn processes_named_for(pool: &str) -> Vec<u32> {
    processes(|process| {
        is_engine(process)
            && fs::read(process.1.join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(pool))
    })
}

type Process = (u32, PathBuf);

fn processes(wanted: impl Fn(&Process) -> bool) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("this test needs /proc");
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            Some((pid, entry.path()))
        })
        .filter(wanted)
        .map(|(pid, _)| pid)
        .collect()
}

/// A process that ends meanwhile is none.
fn is_engine((_, directory): &Process) -> bool {
    fs::read_to_string(directory.join("comm")).is_ok_and(|name| name.trim() == "llama-server")
}

fn parent((_, directory): &Process) -> Option<u32> {
    let status = fs::read_to_string(directory.join("status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_tests_pools_name_a_process() {
        assert_eq!(process_in(&pool("twin")), Some(std::process::id()));
        assert_eq!(process_in("e2e-swap-16901"), Some(16901));
        for other in [
            "default",
            "run-1",
            "clients-7",
            "e2e-none",
            "my-clients-a-7",
        ] {
            assert_eq!(process_in(other), None, "{other}");
        }
    }
}
