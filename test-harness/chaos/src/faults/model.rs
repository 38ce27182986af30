//! Bad bytes, bad sources, no room.

use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use test_harness_e2e_haiku::engine::sha256;

use crate::error::{Failing, Verdict};
use crate::rng::Rng;
use crate::source::Mischief;
use crate::world::World;

fn harness_fault(what: &str) -> impl FnOnce(std::io::Error) -> Failing {
    move |error| {
        Failing::broken(
            "the harness can write its files",
            format!("{what}: {error}"),
        )
    }
}

/// Removes the stored model and what is known of it.
pub(super) fn forget(world: &World) -> Result<(), Failing> {
    for path in [
        world.setup.stored_model(),
        world.setup.model_records(),
        world.setup.cache().join("downloads"),
    ] {
        let removed = if path.is_dir() {
            std::fs::remove_dir_all(&path)
        } else {
            std::fs::remove_file(&path)
        };
        match removed {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(harness_fault("remove")(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether the stored model is what it must be.
fn check_stored(world: &World) -> Verdict {
    let digest = sha256(&world.setup.stored_model()).unwrap_or_else(|error| error.to_string());
    if digest == format!("sha256:{}", world.setup.engine.digest) {
        return Ok(String::new());
    }
    Err(Failing::broken(
        "only the digest decides what is the model",
        digest,
    ))
}

pub(super) async fn flipped(world: Arc<World>, mut rng: Rng) -> Verdict {
    let place = rng.between(0, world.setup.engine.size - 1);
    spoil(&world, |file| {
        let mut byte = [0];
        file.seek(SeekFrom::Start(place))?;
        file.read_exact(&mut byte)?;
        file.seek(SeekFrom::Start(place))?;
        file.write_all(&[byte[0] ^ 0x10])
    })
    .await
}

pub(super) async fn truncated(world: Arc<World>, mut rng: Rng) -> Verdict {
    let size = rng.between(0, world.setup.engine.size - 1);
    spoil(&world, |file| file.set_len(size)).await
}

/// Changes the stored model while the daemon is down. The next one must notice
/// and fetch it again.
async fn spoil(
    world: &World,
    change: impl FnOnce(&mut std::fs::File) -> std::io::Result<()>,
) -> Verdict {
    world.stop().await?;
    let path = world.setup.stored_model();
    let opened = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path);
    opened
        .and_then(|mut file| change(&mut file))
        .map_err(harness_fault("spoil the model"))?;
    let up = world.start().await?;
    let limit = Instant::now() + world.patience();
    while Instant::now() < limit {
        let Some(view) = world.pool(&up).await else {
            break;
        };
        let why = view["last_error"]["message"].as_str().unwrap_or("");
        match view["state"].as_str() {
            Some("ready") => {
                check_stored(world)?;
                return Ok("noticed and fetched again".to_owned());
            }
            Some("failed") if why.contains("digest") || why.contains("changed") => {
                // As the hint says.
                std::fs::remove_file(&path).map_err(harness_fault("remove the model"))?;
                world.settle().await?;
                check_stored(world)?;
                return Ok("noticed, refused with the cause, fetched after `rm`".to_owned());
            }
            _ => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
    Err(Failing::broken(
        "a spoilt model is noticed",
        "neither repaired nor refused",
    ))
}

pub(super) async fn fetch_cut(world: Arc<World>, rng: Rng) -> Verdict {
    fetch(&world, rng, Mischief::Cut).await
}

pub(super) async fn fetch_stall(world: Arc<World>, rng: Rng) -> Verdict {
    fetch(&world, rng, Mischief::Stall).await
}

pub(super) async fn fetch_truncate(world: Arc<World>, rng: Rng) -> Verdict {
    fetch(&world, rng, Mischief::Truncate).await
}

pub(super) async fn fetch_flip(world: Arc<World>, rng: Rng) -> Verdict {
    fetch(&world, rng, Mischief::Flip).await
}

pub(super) async fn fetch_wrong_range(world: Arc<World>, mut rng: Rng) -> Verdict {
    // Only a transfer that goes on asks for a range.
    world.stop().await?;
    forget(&world)?;
    world.source.misbehave(Mischief::Slow, 1);
    world.start().await?;
    tokio::time::sleep(rng.millis(30, 150)).await;
    world.stop().await?;
    world.source.misbehave(Mischief::WrongRange, 1);
    fetched(&world).await
}

pub(super) async fn fetch_error(world: Arc<World>, rng: Rng) -> Verdict {
    fetch(&world, rng, Mischief::Error).await
}

/// Has a new daemon fetch the model from a source that misbehaves once or
/// twice: it must get it in the end, or say why not until the source is well.
async fn fetch(world: &World, mut rng: Rng, mischief: Mischief) -> Verdict {
    world.stop().await?;
    forget(world)?;
    world.source.misbehave(mischief, rng.between(1, 2) as u32);
    fetched(world).await
}

async fn fetched(world: &World) -> Verdict {
    world.start().await?;
    let settled = world.settle().await;
    world.source.behave();
    let took = settled?;
    check_stored(world)?;
    Ok(format!(
        "there after {:.1} s and {} answers",
        took.as_secs_f64(),
        world.source.answers()
    ))
}

pub(super) async fn full_disk(world: Arc<World>, _: Rng) -> Verdict {
    world.stop().await?;
    forget(&world)?;
    // The model does not fit; nor, late in a run, does the daemon's log, which must
    // cost no more than its lines.
    let kib = world.setup.engine.size / 1024 / 2;
    let started = world.keeper.start_with_little_disk(kib).await;
    started.map_err(|why| Failing::broken("the daemon starts", why))?;
    let reason = refused(&world).await;
    // Mended by a start with room.
    world.stop().await?;
    world.start().await?;
    let reason = reason?;
    world.settle().await?;
    check_stored(&world)?;
    Ok(reason)
}

/// Waits until the pool says that the model cannot be stored.
async fn refused(world: &World) -> Verdict {
    let begun = Instant::now();
    let mut last = Value::Null;
    while begun.elapsed() < Duration::from_mins(1) {
        if let Some(up) = world.keeper.up()
            && let Some(view) = world.pool(&up).await
        {
            if view["state"] == "failed" {
                let text = view["last_error"]["message"]
                    .as_str()
                    .unwrap_or("")
                    .to_lowercase();
                let told = ["space", "too large", "full", "write"]
                    .iter()
                    .any(|word| text.contains(word));
                let short: String = text.chars().take(60).collect();
                return if told {
                    Ok(format!("refused: {short}…"))
                } else {
                    Err(Failing::broken(
                        "a full disk is named as the cause",
                        view["last_error"].to_string(),
                    ))
                };
            }
            last = view;
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    Err(Failing::broken(
        "a full disk is named as the cause",
        format!("not failed: {last}"),
    ))
}
