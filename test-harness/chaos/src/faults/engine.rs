//! Faults of the engine's process, from outside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::json;
use test_harness_fake_engine::{Script, starts};

use crate::client::Manner;
use crate::error::{Failing, Verdict};
use crate::keeper::signal;
use crate::procs::Process;
use crate::rng::Rng;
use crate::setup::healthy;
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
    let tokens = rng.between(1, 10);
    world.streaming(&mut rng, tokens, 120).await?;
    let engine = world.serving_engine().await?;
    signal(engine.pid, Signal::SIGKILL);
    gone(&engine, Duration::from_secs(10)).await
}

pub(super) async fn kill_loading(world: Arc<World>, mut rng: Rng) -> Verdict {
    let loading = started_anew(
        &world,
        &Script {
            load_ms: 400,
            ..healthy()
        },
    )
    .await?;
    tokio::time::sleep(rng.millis(0, 150)).await;
    signal(loading.pid, Signal::SIGKILL);
    gone(&loading, Duration::from_secs(10)).await
}

/// Kills the engine, and returns the next one as soon as it runs, most likely
/// while it loads. A scripted one follows this script; those after it do not.
pub(super) async fn started_anew(world: &World, script: &Script) -> Result<Process, Failing> {
    let before = world.serving_engine().await?;
    let starts = || world.setup.engine.script_dir.as_deref().map(starts);
    let earlier = starts();
    world.script(script);
    signal(before.pid, Signal::SIGKILL);
    gone(&before, Duration::from_secs(10)).await?;
    let next = new_engine(world, &before).await;
    // A start is counted when the script has been read.
    let limit = Instant::now() + world.patience();
    while earlier.is_some() && starts() == earlier && Instant::now() < limit {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    world.script(&healthy());
    next
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

/// Kills one engine after the other as soon as it serves, until the pool gives
/// up for a while and says so.
pub(super) async fn crash_loop(world: Arc<World>, _: Rng) -> Verdict {
    const ENOUGH: u32 = 20;
    let mut last = None;
    for kills in 0..ENOUGH {
        let limit = Instant::now() + world.patience();
        let engine = loop {
            if Instant::now() > limit {
                return Err(Failing::broken(
                    "a lost engine is replaced",
                    format!("after {kills} kills"),
                ));
            }
            if let Some(up) = world.keeper.up()
                && let Some(view) = world.pool(&up).await
            {
                let why = view["last_error"]["message"].as_str().unwrap_or("");
                if view["state"] == "failed" && !why.is_empty() {
                    return Ok(format!("failed after {kills} kills"));
                }
                let engine = view["replica"]["pid"]
                    .as_u64()
                    .and_then(|pid| Process::of(pid as u32));
                if let Some(engine) = engine
                    .filter(|engine| view["state"] == "ready" && last.as_ref() != Some(engine))
                {
                    break engine;
                }
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        signal(engine.pid, Signal::SIGKILL);
        last = Some(engine);
    }
    Err(Failing::broken(
        "a pool whose engine crashes on and on gives up",
        format!("{ENOUGH} kills"),
    ))
}

/// A task that asked for it is continued on the next engine.
pub(super) async fn continued(world: Arc<World>, mut rng: Rng) -> Verdict {
    super::daemon::offering(
        &world,
        world.offers().resume_tasks,
        "on_worker_reset: resume",
    )?;
    // The clients' own tasks would only make the wait longer.
    let quiet = world.quiet().await?;
    let (mut body, mut facts) = world.task_body(&mut rng, 150);
    body["on_worker_reset"] = json!("resume");
    facts.resumes = true;
    let task = world.admitted(&body, facts).await?;
    let crashes = rng.between(1, 2);
    let crash = async {
        for crash in 1..=crashes {
            let tokens = crash * 20 + rng.between(0, 20);
            while world.ledger().is_open(&task.key) && world.ledger().tokens(&task.key) < tokens {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            signal(world.serving_engine().await?.pid, Signal::SIGKILL);
        }
        Ok::<(), Failing>(())
    };
    let manner = Manner::default();
    let (ending, crashed) = tokio::join!(world.follow(&task, &manner), crash);
    drop(quiet);
    crashed?;
    let tokens = world.ledger().tokens(&task.key);
    match ending.as_deref() {
        Some("length" | "stop") => Ok(format!("{tokens} tokens over {crashes} crashes")),
        other => Err(Failing::broken(
            "a task that asked for it is continued",
            format!(
                "{}: {other:?} after {tokens} tokens and {crashes} crashes",
                task.key
            ),
        )),
    }
}
