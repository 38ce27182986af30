//! Readers that misbehave. None of them may cost another one anything.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::daemon::SOON;
use crate::client::{Manner, Task};
use crate::error::{Failing, Verdict};
use crate::rng::Rng;
use crate::world::World;

pub(super) async fn leave_and_resume(world: Arc<World>, mut rng: Rng) -> Verdict {
    let mut readers = Vec::new();
    for _ in 0..4 {
        let (body, facts) = world.task_body(&mut rng, 60);
        let mut leave_after: Vec<u64> =
            (0..rng.between(2, 5)).map(|_| rng.between(0, 40)).collect();
        leave_after.sort_unstable();
        let manner = Manner {
            leave_after,
            away: rng.millis(0, 80),
            ..Manner::default()
        };
        let world = Arc::clone(&world);
        readers.push(async move {
            let task = world.admitted(&body, facts).await?;
            world.follow(&task, &manner).await;
            world.replay(&task).await;
            Ok::<(), Failing>(())
        });
    }
    join_all(readers)
        .await
        .into_iter()
        .collect::<Result<Vec<()>, Failing>>()?;
    Ok(String::new())
}

/// Asks for a task's stream on a bare connection.
async fn bare_reader(task: &Task) -> Option<TcpStream> {
    let address = task.up.url.strip_prefix("http://")?;
    let mut stream = TcpStream::connect(address).await.ok()?;
    let request = format!(
        "GET /v2/tasks/{}/events?verbose=true HTTP/1.1\r\nHost: {address}\r\n\r\n",
        task.key.task
    );
    stream.write_all(request.as_bytes()).await.ok()?;
    Some(stream)
}

pub(super) async fn never_read(world: Arc<World>, mut rng: Rng) -> Verdict {
    let task = world.streaming(&mut rng, 1, 120).await?;
    let mut deaf = Vec::new();
    for _ in 0..rng.between(3, 8) {
        deaf.extend(bare_reader(&task).await);
    }
    // The task ends for its real reader, whatever the others do.
    let limit = tokio::time::Instant::now() + SOON * 4;
    while world.ledger().is_open(&task.key) {
        if tokio::time::Instant::now() > limit {
            return Err(Failing::broken(
                "dead readers hold nobody up",
                task.key.to_string(),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(format!("{} dead readers", deaf.len()))
}

pub(super) async fn slow(world: Arc<World>, mut rng: Rng) -> Verdict {
    let readers = (0..4).map(|_| {
        let (body, facts) = world.task_body(&mut rng, 40);
        let manner = Manner {
            pause: rng.millis(30, 100),
            ..Manner::default()
        };
        let world = Arc::clone(&world);
        async move {
            let task = world.admitted(&body, facts).await?;
            world.follow(&task, &manner).await;
            Ok::<(), Failing>(())
        }
    });
    let readers: Vec<_> = readers.collect();
    join_all(readers)
        .await
        .into_iter()
        .collect::<Result<Vec<()>, Failing>>()?;
    Ok(String::new())
}

pub(super) async fn abandoned(world: Arc<World>, mut rng: Rng) -> Verdict {
    let (mut body, facts) = world.task_body(&mut rng, 900);
    body["cancel_on_disconnect"] = json!(true);
    let task = world.admitted(&body, facts).await?;
    let reader = bare_reader(&task).await;
    tokio::time::sleep(rng.millis(50, 400)).await;
    drop(reader);
    // Its cancel is seen at the task itself; a reader would keep it alive.
    let path = format!("/v2/tasks/{}", task.key.task);
    let limit = tokio::time::Instant::now() + SOON;
    loop {
        let Some(view) = world.ask(&task.up, "GET", &path, None).await else {
            break;
        };
        if view.body["status"] != "queued" && view.body["status"] != "running" {
            break;
        }
        if tokio::time::Instant::now() > limit {
            return Err(Failing::broken(
                "an abandoned task is cancelled",
                view.body.to_string(),
            ));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    world.follow(&task, &Manner::default()).await;
    Ok(String::new())
}
