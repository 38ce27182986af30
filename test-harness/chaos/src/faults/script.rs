//! Faults that only a scripted engine can be made to have.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use test_harness_fake_engine::{
    Fault, LoadFailure, Script, grandchild as grandchild_of, order, orders,
};

use super::engine::{gone, started_anew};
use crate::error::{Failing, Verdict};
use crate::keeper::signal;
use crate::procs::Process;
use crate::rng::Rng;
use crate::setup::healthy;
use crate::world::World;

pub(super) async fn crash(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    let fault = Fault::Crash {
        after_tokens,
        exit_code: 3,
    };
    strike(&world, &mut rng, &fault, 1).await
}

pub(super) async fn hang(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    strike(&world, &mut rng, &Fault::Hang { after_tokens }, 1).await
}

pub(super) async fn cut(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    strike(&world, &mut rng, &Fault::Cut { after_tokens }, 1).await
}

pub(super) async fn end_without_final(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    strike(
        &world,
        &mut rng,
        &Fault::EndWithoutFinal { after_tokens },
        1,
    )
    .await
}

pub(super) async fn error_event(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    strike(&world, &mut rng, &Fault::ErrorEvent { after_tokens }, 1).await
}

pub(super) async fn garbage(world: Arc<World>, mut rng: Rng) -> Verdict {
    let after_tokens = rng.between(0, 8);
    strike(&world, &mut rng, &Fault::Garbage { after_tokens }, 1).await
}

pub(super) async fn status_500(world: Arc<World>, mut rng: Rng) -> Verdict {
    let times = rng.between(1, 4);
    strike(&world, &mut rng, &Fault::Status500, times).await
}

/// Has the next completions go wrong, and waits until all of that has happened.
async fn strike(world: &World, rng: &mut Rng, fault: &Fault, times: u64) -> Verdict {
    let Some(dir) = &world.setup.engine.script_dir else {
        return Err(Failing::Missing("a scripted engine"));
    };
    for _ in 0..times {
        order(dir, fault);
    }
    // Enough tasks that each order meets one.
    let mut victims = Vec::new();
    for _ in 0..=times {
        let (body, facts) = world.task_body(rng, 30);
        let task = world.admitted(&body, facts).await?;
        let world = world.arc();
        victims.push(tokio::spawn(async move {
            world.follow(&task, &crate::client::Manner::default()).await
        }));
    }
    for victim in victims {
        let _ = victim.await;
    }
    match orders::take_back(dir) {
        0 => Ok(String::new()),
        left => Err(Failing::broken(
            "tasks reach the engine",
            format!("{left} of {times} orders met no completion"),
        )),
    }
}

pub(super) async fn slow_load(world: Arc<World>, mut rng: Rng) -> Verdict {
    let script = Script {
        load_ms: rng.between(800, 2500),
        log_every_ms: 100,
        ..healthy()
    };
    let loading = started_anew(&world, &script).await?;
    // Slow is not dead: it must be the one that serves in the end.
    let serving = world.serving_engine().await?;
    if serving == loading {
        return Ok(String::new());
    }
    let detail = format!("{loading:?} was loading, {serving:?} serves");
    Err(Failing::broken("a slow load is waited for", detail))
}

pub(super) async fn failing_loads(world: Arc<World>, mut rng: Rng) -> Verdict {
    let engine = world.serving_engine().await?;
    world.script(&Script {
        load_ms: rng.between(0, 60),
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors, as the script says".to_owned(),
        }),
        ..healthy()
    });
    signal(engine.pid, Signal::SIGKILL);
    let limit = Instant::now() + world.patience();
    let mut said = false;
    while !said && Instant::now() < limit {
        if let Some(up) = world.keeper.up()
            && let Some(view) = world.pool(&up).await
        {
            let text = view["last_error"]["message"].as_str().unwrap_or("");
            said = text.contains("no room for the tensors");
        }
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    world.script(&healthy());
    if said {
        return Ok(String::new());
    }
    Err(Failing::broken(
        "a failed load says the engine's last words",
        "never seen",
    ))
}

pub(super) async fn ignores_term(world: Arc<World>, mut rng: Rng) -> Verdict {
    let script = Script {
        ignore_term: true,
        ..healthy()
    };
    let engine = started_anew(&world, &script).await?;
    world.settle().await?;
    // A client that cancels would take the hang away before it is noticed.
    let _quiet = world.quiet().await?;
    let after_tokens = rng.between(1, 8);
    strike(&world, &mut rng, &Fault::Hang { after_tokens }, 1).await?;
    gone(&engine, Duration::from_secs(30)).await
}

pub(super) async fn grandchild(world: Arc<World>, _: Rng) -> Verdict {
    let Some(dir) = world.setup.engine.script_dir.clone() else {
        return Err(Failing::Missing("a scripted engine"));
    };
    let script = Script {
        grandchild: true,
        ..healthy()
    };
    let engine = started_anew(&world, &script).await?;
    world.settle().await?;
    let child = grandchild_of(&dir).and_then(Process::of);
    let Some(child) = child else {
        return Err(Failing::broken("the engine has a child", "none was noted"));
    };
    signal(engine.pid, Signal::SIGKILL);
    gone(&child, Duration::from_secs(10)).await
}
