//! What a crash may have left, and who else may want the same directories.

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use serde_json::json;

use super::daemon::check_handoff;
use crate::error::{Failing, Verdict};
use crate::keeper::signal;
use crate::rng::Rng;
use crate::world::World;

/// Nobody goes on with what is so old.
const LONG_AGO: Duration = Duration::from_hours(24 * 60);

pub(super) async fn stale(world: Arc<World>, mut rng: Rng) -> Verdict {
    world.stop().await?;
    let setup = &world.setup;
    // A process that lives and is not ours: it must not be touched.
    let stranger = std::process::Command::new("sleep").arg("600").spawn();
    let mut stranger = stranger
        .map_err(|error| Failing::broken("the harness can start its tools", error.to_string()))?;
    let identity = json!({
        "pid": if rng.percent(50) { stranger.id() } else { 4_000_000 },
        "start_time": rng.number() % 1000, "executable": "/nowhere/llama-server",
    });
    let mut pid_file = identity.clone();
    pid_file["port"] = json!(1);
    pid_file["owner_pid"] = json!(4_000_001);
    pid_file["owner"] = identity;
    let text = if rng.percent(30) {
        "{ half a file".to_owned()
    } else {
        pid_file.to_string()
    };
    // What can be gone on with stays; what is old goes. Half of the time the
    // model itself is to be gone on with, from a part that is no part of it.
    let part = format!("downloads/model-{}.part", setup.engine.digest);
    if rng.percent(50) {
        super::model::forget(&world)?;
    }
    let old = [
        setup
            .cache()
            .join(format!("downloads/model-{}.part", "0".repeat(64))),
        setup.cache().join("downloads/.staged-left"),
    ];
    let written = [
        (setup.pid_file(), text),
        (
            setup.handoff(),
            json!({ "engine": "llamacpp", "url": "http://127.0.0.1:1", "pid": 4_000_000 })
                .to_string(),
        ),
        (
            setup.announcement(),
            json!({ "pid": 4_000_001, "url": "http://127.0.0.1:1" }).to_string(),
        ),
        (setup.cache().join(part), "half a model".to_owned()),
        (old[0].clone(), "half a model".to_owned()),
        (old[1].clone(), "half a file".to_owned()),
    ];
    let mut failed = None;
    for (path, text) in written {
        let parent = path.parent().map(std::fs::create_dir_all);
        let write = parent
            .unwrap_or(Ok(()))
            .and_then(|()| std::fs::write(&path, text));
        failed = failed.or(write.err());
    }
    for path in &old {
        let file = std::fs::File::options().write(true).open(path);
        let aged = file.and_then(|file| file.set_modified(SystemTime::now() - LONG_AGO));
        failed = failed.or(aged.err());
    }
    let verdict = async {
        if let Some(error) = failed {
            return Err(Failing::broken(
                "the harness can write its files",
                error.to_string(),
            ));
        }
        world.start().await?;
        world.settle().await?;
        check_handoff(&world).await
    }
    .await;
    let untouched = matches!(stranger.try_wait(), Ok(None));
    let _ = stranger.kill();
    let _ = stranger.wait();
    let left: Vec<_> = old.iter().filter(|path| path.exists()).collect();
    let found = format!("{left:?}");
    // Not to be met again by the look at the end of a later stop.
    for path in &left {
        let _ = std::fs::remove_file(path);
    }
    let part = setup
        .cache()
        .join(format!("downloads/model-{}.part", setup.engine.digest));
    let _ = std::fs::remove_file(part);
    verdict?;
    if !left.is_empty() {
        return Err(Failing::broken(
            "old leftovers of a crash are cleared",
            found,
        ));
    }
    if untouched {
        Ok(String::new())
    } else {
        Err(Failing::broken(
            "a stale PID file ends no stranger",
            "the process that it named has ended",
        ))
    }
}

pub(super) async fn second_daemon(world: Arc<World>, _: Rng) -> Verdict {
    let engine = world.serving_engine().await?;
    let config = world.setup.config_file();
    let mut command = world
        .setup
        .command(&["serve", "--config", &config.to_string_lossy()]);
    let spawned = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut second = spawned
        .map_err(|error| Failing::broken("the harness can start its tools", error.to_string()))?;
    let begun = Instant::now();
    let status = loop {
        if let Ok(Some(status)) = second.try_wait() {
            break Some(status);
        }
        if begun.elapsed() > Duration::from_secs(20) {
            signal(second.id(), Signal::SIGKILL);
            let _ = second.wait();
            break None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    let mut said = String::new();
    if let Some(mut pipe) = second.stderr.take() {
        // What can be read is what there is.
        let _ = std::io::Read::read_to_string(&mut pipe, &mut said);
    }
    match status {
        None => return Err(Failing::broken("a second daemon refuses its start", said)),
        Some(status) if status.success() || status.code().is_none() => {
            return Err(Failing::broken(
                "a second daemon refuses its start",
                format!("{status}: {said}"),
            ));
        }
        Some(_) if said.trim().is_empty() => {
            return Err(Failing::broken(
                "a second daemon says why it refuses",
                "nothing was said",
            ));
        }
        Some(_) => {}
    }
    world.settle().await?;
    check_handoff(&world).await?;
    let now = world.serving_engine().await?;
    if now != engine {
        let detail = format!("{engine:?} before, {now:?} after");
        return Err(Failing::broken(
            "a second daemon does not disturb the first",
            detail,
        ));
    }
    Ok(String::new())
}
