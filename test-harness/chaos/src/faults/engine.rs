//! Faults of the engine's process, from outside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::error::{Failing, Verdict};
use crate::keeper::signal;
use crate::procs::Process;
use crate::rng::Rng;
use crate::world::World;

/// How long a hung engine may go on: the longest wait for a token, what ending
/// it takes, and room for a busy machine.
const HANG_LIMIT: Duration = Duration::from_mins(1);

pub(super) async fn kill_idle(world: Arc<World>, _: Rng) -> Verdict {
    let quiet = world.quiet().await?;
    let engine = world.serving_engine().await?;
    signal(engine.pid, Signal::SIGKILL);
    drop(quiet);
    gone(&engine, Duration::from_secs(10)).await
}

pub(super) async fn kill_streaming(world: Arc<World>, mut rng: Rng) -> Verdict {
    let task = {
        let tokens = rng.between(1, 10);
        world.streaming(&mut rng, tokens, 120).await?
    };
    let engine = world.serving_engine().await?;
    signal(engine.pid, Signal::SIGKILL);
    gone(&engine, Duration::from_secs(10)).await?;
    let _ = task;
    Ok(String::new())
}

pub(super) async fn kill_loading(world: Arc<World>, mut rng: Rng) -> Verdict {
    if world.is_scripted() {
        world.script(&test_harness_fake_engine::Script {
            load_ms: 400,
            ..crate::setup::healthy()
        });
    }
    let first = world.serving_engine().await?;
    signal(first.pid, Signal::SIGKILL);
    let second = new_engine(&world, &first).await;
    world.script(&crate::setup::healthy());
    let second = second?;
    tokio::time::sleep(rng.millis(0, 150)).await;
    signal(second.pid, Signal::SIGKILL);
    gone(&second, Duration::from_secs(10)).await
}

/// The engine that is started after another one.
pub(super) async fn new_engine(world: &World, before: &Process) -> Result<Process, Failing> {
    let limit = Instant::now() + world.patience();
    while Instant::now() < limit {
        let found = world.engines().into_iter().find(|engine| engine != before);
        if let Some(engine) = found {
            return Ok(engine);
        }
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    Err(Failing::broken(
        "a lost engine is replaced",
        format!("none after {before:?}"),
    ))
}

pub(super) async fn term(world: Arc<World>, mut rng: Rng) -> Verdict {
    let engine = world.serving_engine().await?;
    tokio::time::sleep(rng.millis(0, 100)).await;
    signal(engine.pid, Signal::SIGTERM);
    gone(&engine, Duration::from_secs(20)).await
}

pub(super) async fn stop_for_good(world: Arc<World>, mut rng: Rng) -> Verdict {
    if rng.percent(60) {
        let tokens = rng.between(1, 5);
        world.streaming(&mut rng, tokens, 100).await?;
    }
    let engine = world.serving_engine().await?;
    signal(engine.pid, Signal::SIGSTOP);
    let begun = Instant::now();
    let verdict = gone(&engine, HANG_LIMIT).await;
    // Not to be left behind by us, whatever the daemon did.
    signal(engine.pid, Signal::SIGKILL);
    verdict?;
    Ok(format!(
        "replaced after {:.1} s",
        begun.elapsed().as_secs_f64()
    ))
}

pub(super) async fn pause(world: Arc<World>, mut rng: Rng) -> Verdict {
    let engine = world.serving_engine().await?;
    signal(engine.pid, Signal::SIGSTOP);
    tokio::time::sleep(rng.millis(100, 500)).await;
    signal(engine.pid, Signal::SIGCONT);
    world.settle().await?;
    let now = world.serving_engine().await?;
    if now == engine {
        return Ok(String::new());
    }
    let detail = format!("{engine:?} before, {now:?} after");
    Err(Failing::broken("a short pause costs no engine", detail))
}

/// Waits until a process is gone.
pub(super) async fn gone(process: &Process, limit: Duration) -> Verdict {
    let begun = Instant::now();
    while process.lives() {
        if begun.elapsed() > limit {
            return Err(Failing::broken(
                "a lost engine does not stay behind",
                format!("{process:?} lives {limit:?} later"),
            ));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(String::new())
}
