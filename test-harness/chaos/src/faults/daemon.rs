//! The daemon's own death, at every moment, and its orderly end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use test_harness_fake_engine::Script;

use crate::error::{Failing, Verdict};
use crate::keeper::{Up, signal};
use crate::procs;
use crate::rng::Rng;
use crate::setup::{POOL, healthy};
use crate::source::Mischief;
use crate::world::{DEATH_LIMIT, World};

pub(super) async fn kill_ready(world: Arc<World>, _: Rng) -> Verdict {
    let quiet = world.quiet().await?;
    world.serving_engine().await?;
    drop(quiet);
    kill_and_start(&world).await
}

pub(super) async fn kill_loading(world: Arc<World>, mut rng: Rng) -> Verdict {
    let script = Script {
        load_ms: 400,
        grandchild: rng.percent(50),
        ..healthy()
    };
    super::engine::started_anew(&world, &script).await?;
    tokio::time::sleep(rng.millis(0, 200)).await;
    kill_and_start(&world).await
}

pub(super) async fn kill_streaming(world: Arc<World>, mut rng: Rng) -> Verdict {
    let tokens = rng.between(1, 10);
    world.streaming(&mut rng, tokens, 100).await?;
    kill_and_start(&world).await
}

pub(super) async fn kill_fetching(world: Arc<World>, mut rng: Rng) -> Verdict {
    world.stop().await?;
    super::model::forget(&world)?;
    world.source.misbehave(Mischief::Slow, 1);
    world.start().await?;
    tokio::time::sleep(rng.millis(5, 350)).await;
    let verdict = kill_and_start(&world).await;
    world.source.behave();
    verdict
}

pub(super) async fn kill_in_reload(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().reload, "POST /v2/pools/{id}/reload")?;
    let path = format!("/v2/pools/{POOL}/reload");
    let flags = json!({ "flags": super::pool::other_flags(&mut rng) });
    world.ask(&up, "POST", &path, Some(&flags)).await;
    tokio::time::sleep(rng.millis(0, 250)).await;
    kill_and_start(&world).await
}

pub(super) async fn kill_in_drain(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().drain, "POST /v2/pools/{id}/drain")?;
    let path = format!("/v2/pools/{POOL}/drain");
    world
        .ask(&up, "POST", &path, Some(&json!({ "deadline_ms": 1000 })))
        .await;
    tokio::time::sleep(rng.millis(0, 250)).await;
    kill_and_start(&world).await
}

/// The daemon that serves now, if it has what a fault needs.
pub(super) fn offering(world: &World, offered: bool, what: &'static str) -> Result<Up, Failing> {
    if !offered {
        return Err(Failing::Missing(what));
    }
    let up = world.keeper.up();
    up.ok_or_else(|| Failing::broken("the daemon is up", "a fault began without one"))
}

/// Kills the daemon; looks that nothing is left; starts another.
async fn kill_and_start(world: &World) -> Verdict {
    let begun = Instant::now();
    let below = world.keeper.kill9().await;
    let left = world.nothing_lives(&below, DEATH_LIMIT).await;
    let clean_after = begun.elapsed();
    let stale = world.setup.pid_file().exists();
    world.start().await?;
    left?;
    world.settle().await?;
    check_handoff(world).await?;
    Ok(format!(
        "nothing left after {} ms{}",
        clean_after.as_millis(),
        if stale {
            ", a stale PID file cleared"
        } else {
            ""
        }
    ))
}

/// After a start the PID file and the handoff name the engine that serves.
pub(super) async fn check_handoff(world: &World) -> Verdict {
    let engine = world.serving_engine().await?;
    for path in [world.setup.pid_file(), world.setup.handoff()] {
        let text = std::fs::read_to_string(&path).unwrap_or_default();
        if !text.contains(&engine.pid.to_string()) {
            let detail = format!("{} does not name {engine:?}: {text}", path.display());
            return Err(Failing::broken("files name the engine that serves", detail));
        }
    }
    Ok(String::new())
}

pub(super) async fn term(world: Arc<World>, mut rng: Rng) -> Verdict {
    let tokens = rng.between(0, 5);
    world.streaming(&mut rng, tokens, 60).await?;
    let begun = Instant::now();
    world.stop().await?;
    let took = begun.elapsed();
    let left = leftovers(&world);
    world.start().await?;
    if !left.is_empty() {
        return Err(Failing::broken(
            "no file is left after a stop",
            left.join(", "),
        ));
    }
    Ok(format!("stopped in {:.1} s", took.as_secs_f64()))
}

pub(super) async fn freeze(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, true, "")?;
    signal(up.pid, Signal::SIGSTOP);
    tokio::time::sleep(rng.millis(100, 600)).await;
    signal(up.pid, Signal::SIGCONT);
    Ok(String::new())
}

/// Files that a stopped daemon must not leave: all but logs, locks, records of
/// what was provided, the store, and temporary files that a kill in the midst
/// of a write left, which later starts clear once they are old.
pub(crate) fn leftovers(world: &World) -> Vec<String> {
    let known = |path: &str| {
        let ending = path.rsplit('.').next();
        matches!(ending, Some("lock" | "jsonl"))
            || path.contains(".staged-")
            || (path.starts_with("run/llamacpp-") && path.contains(".log"))
            || path.starts_with("models/")
            || path.starts_with("known/")
            || path.starts_with("locks/")
    };
    let mut left = Vec::new();
    for root in [world.setup.cache(), world.setup.runtime()] {
        for path in procs::files_below(&root) {
            let path = path.to_string_lossy().into_owned();
            if !known(&path) {
                left.push(path);
            }
        }
    }
    left
}

/// How long a fault waits for something that the daemon does at once.
pub(super) const SOON: Duration = Duration::from_secs(15);
