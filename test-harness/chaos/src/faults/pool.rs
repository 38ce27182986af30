//! Drain, resume and reload, as an operator asks for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::daemon::offering;
use crate::error::{Failing, Verdict};
use crate::keeper::Up;
use crate::rng::Rng;
use crate::setup::POOL;
use crate::world::World;

/// Flags that both engines take, and that change nothing for clients.
pub(super) fn other_flags(rng: &mut Rng) -> Value {
    let size = rng.one_of(&["128", "256", "512", "1024"]);
    json!(["--batch-size", size])
}

async fn post(world: &World, up: &Up, route: &'static str, body: &Value) -> Verdict {
    let reply = world
        .ask(up, "POST", &format!("/v2/pools/{POOL}/{route}"), Some(body))
        .await;
    match reply {
        Some(reply) if reply.status == 202 || reply.status == 200 => Ok(String::new()),
        Some(reply) => Err(Failing::broken(
            "an operator's wish is taken",
            format!("{route}: {} {}", reply.status, reply.body),
        )),
        None => Err(Failing::broken(
            "an operator's wish is taken",
            format!("{route}: no answer"),
        )),
    }
}

/// Waits until the pool's view satisfies `wanted`.
async fn until(
    world: &World,
    what: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Result<Value, Failing> {
    let limit = Instant::now() + world.patience();
    let mut last = Value::Null;
    while Instant::now() < limit {
        if let Some(up) = world.keeper.up()
            && let Some(view) = world.pool(&up).await
        {
            if wanted(&view) {
                return Ok(view);
            }
            last = view;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Err(Failing::broken(
        "a pool does what its operator asks for",
        format!("{what}: {last}"),
    ))
}

pub(super) async fn drain_resume(world: Arc<World>, mut rng: Rng) -> Verdict {
    let offers = world.offers();
    let up = offering(
        &world,
        offers.drain && offers.resume,
        "POST /v2/pools/{id}/drain and /resume",
    )?;
    let engine = world.serving_engine().await?;
    let begun = Instant::now();
    post(
        &world,
        &up,
        "drain",
        &json!({ "deadline_ms": rng.between(0, 1500) }),
    )
    .await?;
    until(&world, "drained", |view| view["state"] == "stopped").await?;
    let took = begun.elapsed();
    if engine.lives() {
        return Err(Failing::broken(
            "a drained pool has no engine",
            format!("{engine:?}"),
        ));
    }
    tokio::time::sleep(rng.millis(0, 200)).await;
    post(&world, &up, "resume", &json!({})).await?;
    until(&world, "resumed", |view| view["state"] == "ready").await?;
    Ok(format!("drained in {:.1} s", took.as_secs_f64()))
}

pub(super) async fn reload(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().reload, "POST /v2/pools/{id}/reload")?;
    world.streaming(&mut rng, 1, 80).await?;
    let before = world.failures(&up).await?;
    let engine = world.serving_engine().await?;
    let body = json!({ "flags": other_flags(&mut rng) });
    post(&world, &up, "reload", &body).await?;
    let pid = json!(engine.pid);
    let view = until(&world, "reloaded", |view| {
        view["state"] == "ready" && view["replica"]["pid"] != pid
    })
    .await?;
    super::engine::gone(&engine, Duration::from_secs(30)).await?;
    world.none_failed_since(&up, &before).await?;
    let mode = view["reload"]["mode"].as_str().unwrap_or("?");
    Ok(format!("mode {mode}"))
}

pub(super) async fn failing_reload(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, world.offers().reload, "POST /v2/pools/{id}/reload")?;
    world.streaming(&mut rng, 1, 80).await?;
    let before = world.failures(&up).await?;
    let engine = world.serving_engine().await?;
    post(
        &world,
        &up,
        "reload",
        &json!({ "flags": ["--no-such-flag"] }),
    )
    .await?;
    let view = until(&world, "rolled back", |view| {
        view["state"] == "ready" && view["reload"]["error"].is_object()
    })
    .await?;
    world.none_failed_since(&up, &before).await?;
    let now = world.serving_engine().await?;
    // With too little memory it drains first, and starts the old one again.
    if now != engine && view["reload"]["mode"] == "beside" {
        let detail = format!("{engine:?} before, {now:?} after: {}", view["reload"]);
        return Err(Failing::broken(
            "a failing reload leaves the pool untouched",
            detail,
        ));
    }
    Ok(String::new())
}
