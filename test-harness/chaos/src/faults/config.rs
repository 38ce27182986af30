//! A changed configuration, applied with SIGHUP.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::daemon::{SOON, offering};
use crate::client::{Manner, Submitted};
use crate::error::{Failing, Verdict};
use crate::keeper::{Up, signal};
use crate::rng::Rng;
use crate::setup::{CAPACITY, POOL, SIDE_POOL};
use crate::world::World;

const NEEDED: &str = "orchestratord reload, and SIGHUP for it";

fn apply(world: &World, up: &Up, change: impl FnOnce(&mut Value)) -> Result<(), Failing> {
    world
        .write_config(change)
        .map_err(|error| Failing::broken("the harness can write its files", error.to_string()))?;
    signal(up.pid, Signal::SIGHUP);
    Ok(())
}

/// Takes back what a pool was given by its own reload, as the next change of the
/// file does: only then is a pool that the file does not change one that is not
/// touched.
async fn in_line(world: &World, up: &Up) -> Verdict {
    apply(world, up, |_| {})?;
    until_shown(world, up, POOL, world.patience(), |_, view| {
        let flags = view["flags"].as_array();
        view["state"] == "ready" && flags.is_none_or(Vec::is_empty)
    })
    .await
}

async fn until_shown(
    world: &World,
    up: &Up,
    pool: &str,
    limit: Duration,
    wanted: impl Fn(u16, &Value) -> bool,
) -> Verdict {
    let begun = Instant::now();
    let mut last = String::new();
    while begun.elapsed() < limit {
        let Some(reply) = world
            .ask(up, "GET", &format!("/v2/pools/{pool}"), None)
            .await
        else {
            break;
        };
        if wanted(reply.status, &reply.body) {
            return Ok(String::new());
        }
        last = reply.body.to_string();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Failing::broken(
        "SIGHUP applies the configuration",
        format!("pool {pool}: {last}"),
    ))
}

pub(super) async fn capacity(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().hangup, NEEDED)?;
    let before = world.failures(&up).await?;
    let raised = CAPACITY + rng.between(1, 20);
    for capacity in [raised, CAPACITY] {
        apply(&world, &up, |config| {
            config["pools"][POOL]["queue_capacity"] = json!(capacity);
        })?;
        until_shown(&world, &up, POOL, SOON, |_, view| {
            view["queue"]["capacity"] == capacity
        })
        .await?;
    }
    world.none_failed_since(&up, &before).await
}

pub(super) async fn pools(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().hangup, NEEDED)?;
    in_line(&world, &up).await?;
    let engine = world.serving_engine().await?;
    let before = world.failures(&up).await?;
    let side = world.setup.pool();
    apply(&world, &up, |config| config["pools"][SIDE_POOL] = side)?;
    let ready = until_shown(&world, &up, SIDE_POOL, world.patience(), |_, view| {
        view["state"] == "ready"
    })
    .await;
    let served = async {
        ready?;
        let (mut body, facts) = world.task_body(&mut rng, 10);
        body["pool_id"] = json!(SIDE_POOL);
        if let Submitted::Admitted(task) = world.submit(&body, facts).await {
            world.follow(&task, &Manner::default()).await;
        }
        Ok::<(), Failing>(())
    }
    .await;
    apply(&world, &up, |config| {
        if let Some(pools) = config["pools"].as_object_mut() {
            pools.remove(SIDE_POOL);
        }
    })?;
    served?;
    until_shown(&world, &up, SIDE_POOL, SOON * 2, |status, _| status == 404).await?;
    world.none_failed_since(&up, &before).await?;
    let now = world.serving_engine().await?;
    if now != engine {
        let detail = format!("{engine:?} before, {now:?} after");
        return Err(Failing::broken(
            "a pool that did not change is not touched",
            detail,
        ));
    }
    let begun = Instant::now();
    while world.engines().len() > 1 {
        if begun.elapsed() > SOON {
            return Err(Failing::broken(
                "a removed pool leaves no engine",
                format!("{:?}", world.engines()),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(String::new())
}
