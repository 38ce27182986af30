//! The clients that run all along, each with habits of its own.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use crate::client::{Manner, Submitted};
use crate::rng::Rng;
use crate::world::World;

/// Runs one client until the run is over.
pub async fn client(world: Arc<World>, mut rng: Rng) {
    while !world.is_over() {
        if world.is_paused() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        let refused = one_task(&world, &mut rng).await;
        let pause = if refused {
            rng.millis(100, 400)
        } else {
            rng.millis(0, 120)
        };
        tokio::time::sleep(pause).await;
    }
}

/// Whether it was refused.
async fn one_task(world: &World, rng: &mut Rng) -> bool {
    let most = if world.is_scripted() { 60 } else { 40 };
    let tokens = rng.between(3, most);
    let (mut body, mut facts) = world.task_body(rng, tokens);
    if rng.percent(10) {
        let deadline = rng.between(500, 8000);
        body["deadline_ms"] = json!(deadline);
        facts.deadline = Some(Duration::from_millis(deadline));
    }
    let manner = manner(rng, tokens);
    match world.submit(&body, facts).await {
        Submitted::Admitted(task) => {
            world.follow(&task, &manner).await;
            if rng.percent(15) {
                world.replay(&task).await;
            }
            false
        }
        Submitted::Refused { .. } | Submitted::Gone => true,
    }
}

fn manner(rng: &mut Rng, tokens: u64) -> Manner {
    match rng.between(0, 9) {
        0 => Manner {
            cancel_after: Some(rng.between(0, tokens)),
            twice: rng.percent(30),
            ..Manner::default()
        },
        1 | 2 => Manner {
            leave_after: (0..rng.between(1, 3))
                .map(|_| rng.between(0, tokens))
                .collect(),
            away: rng.millis(0, 200),
            ..Manner::default()
        },
        3 => Manner {
            pause: rng.millis(5, 60),
            ..Manner::default()
        },
        _ => Manner::default(),
    }
}
