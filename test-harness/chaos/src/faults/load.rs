//! More work than there is room for, and work that is taken back.

use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use serde_json::json;

use crate::client::{Manner, Submitted};
use crate::error::{Failing, Verdict};
use crate::rng::Rng;
use crate::setup::CAPACITY;
use crate::world::World;

pub(super) async fn flood(world: Arc<World>, mut rng: Rng) -> Verdict {
    let length = if world.is_scripted() { 60 } else { 24 };
    // What is admitted, queued and refused at once depends on how fast the
    // engine is; twice as many the second time.
    for times in [4, 8] {
        let burst = (0..CAPACITY * times).map(|_| {
            let (body, facts) = world.task_body(&mut rng, length);
            let world = Arc::clone(&world);
            async move {
                match world.submit(&body, facts).await {
                    Submitted::Admitted(task) => {
                        world.follow(&task, &Manner::default()).await;
                        0u64
                    }
                    Submitted::Refused { code, .. } => u64::from(code == "QUEUE_FULL"),
                    Submitted::Gone => 0,
                }
            }
        });
        let burst = join_all(burst.collect::<Vec<_>>());
        let watch = async {
            loop {
                if let Some(up) = world.keeper.up() {
                    world.pool(&up).await;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let refused: u64 = tokio::select! {
            refused = burst => refused.iter().sum(),
            () = watch => 0,
        };
        if refused > 0 {
            return Ok(format!("{refused} of {} refused", CAPACITY * times));
        }
    }
    Err(Failing::broken(
        "a full queue refuses",
        "no task of the flood was refused",
    ))
}

pub(super) async fn cancel_storm(world: Arc<World>, mut rng: Rng) -> Verdict {
    let mut storm = Vec::new();
    for _ in 0..rng.between(5, 10) {
        let length = rng.between(20, 100);
        let (mut body, facts) = world.task_body(&mut rng, length);
        if !world.is_scripted() && rng.percent(25) {
            body["prompt"] = json!(long_prompt());
        }
        let manner = Manner {
            // At its first token at the earliest; queued ones are cancelled below.
            cancel_after: rng.percent(50).then(|| rng.between(1, 10)),
            twice: rng.percent(50),
            ..Manner::default()
        };
        let (at_once, wait) = (rng.percent(50), rng.millis(0, 150));
        let world = Arc::clone(&world);
        storm.push(async move {
            let Submitted::Admitted(task) = world.submit(&body, facts).await else {
                return;
            };
            let cancel = async {
                if at_once {
                    tokio::time::sleep(wait).await;
                    world.cancel(&task).await;
                }
            };
            tokio::join!(world.follow(&task, &manner), cancel);
            // Once more, now that it is over.
            if let Some(answer) = world.cancel(&task).await
                && answer["cancelled"] != json!(false)
            {
                world.broken(
                    "a finished task cannot be cancelled",
                    format!("{}: {answer}", task.key),
                );
            }
        });
    }
    join_all(storm).await;
    Ok(String::new())
}

/// About 1,400 tokens to the small model: seconds of work before the first one.
fn long_prompt() -> String {
    let numbers: Vec<String> = (1..=300).map(|number| number.to_string()).collect();
    numbers.join(", ")
}

pub(super) async fn deadlines(world: Arc<World>, mut rng: Rng) -> Verdict {
    let mut tasks = Vec::new();
    for _ in 0..rng.between(6, 12) {
        let (mut body, mut facts) = world.task_body(&mut rng, 20);
        let deadline = rng.between(1, 250);
        body["deadline_ms"] = json!(deadline);
        facts.deadline = Some(Duration::from_millis(deadline));
        let world = Arc::clone(&world);
        tasks.push(async move {
            match world.submit(&body, facts).await {
                Submitted::Admitted(task) => world.follow(&task, &Manner::default()).await,
                Submitted::Refused { code, .. } => Some(code),
                Submitted::Gone => None,
            }
        });
    }
    let endings = join_all(tasks).await;
    let unmet = endings
        .iter()
        .flatten()
        .filter(|ending| *ending == "DEADLINE_UNMET")
        .count();
    Ok(format!("{unmet} of {} unmet", endings.len()))
}
