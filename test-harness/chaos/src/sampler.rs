//! Looks at the daemon all along: that it lives, what it holds, and that the
//! queue keeps to its bound.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::guests;
use crate::keeper::Up;
use crate::procs;
use crate::world::World;

const EVERY: Duration = Duration::from_millis(200);
/// A daemon that has run for so long is warm; what it holds then is the
/// measure of what it may hold later.
const WARM_AFTER: Duration = Duration::from_secs(8);
/// What a warm daemon may grow by, in KiB: tasks are kept for a while.
const MORE_KIB: u64 = 160 * 1024;
/// Descriptors at any time: clients, readers and floods of this harness.
const MOST_DESCRIPTORS: usize = 600;

/// What the daemon held at the most.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct Peaks {
    pub descriptors: usize,
    pub resident_kib: u64,
    /// The largest growth of one daemon from when it was warm.
    pub grown_kib: u64,
}

/// Samples until the run is over.
pub async fn sample(world: Arc<World>) -> Peaks {
    let mut peaks = Peaks::default();
    let mut warm: Option<(u64, u64)> = None;
    while !world.is_over() {
        if let Some(status) = world.keeper.unasked_end().await {
            world.broken(
                "the daemon never goes down",
                format!("it ended by itself: {status}"),
            );
            world.collect_broken();
        } else if let Some(up) = world.keeper.up() {
            world.pool(&up).await;
            look(&world, &up, &mut peaks, &mut warm);
            guests::look(&world);
        }
        world.collect_broken();
        tokio::time::sleep(EVERY).await;
    }
    peaks
}

fn look(world: &World, up: &Up, peaks: &mut Peaks, warm: &mut Option<(u64, u64)>) {
    let (Some(descriptors), Some(kib)) = (procs::descriptors(up.pid), procs::resident_kib(up.pid))
    else {
        return;
    };
    peaks.descriptors = peaks.descriptors.max(descriptors);
    peaks.resident_kib = peaks.resident_kib.max(kib);
    if descriptors > MOST_DESCRIPTORS {
        let detail = format!("{descriptors} open, at most {MOST_DESCRIPTORS} are accounted for");
        world.broken("descriptors are bounded", detail);
    }
    match *warm {
        Some((generation, base)) if generation == up.generation => {
            let grown = kib.saturating_sub(base);
            peaks.grown_kib = peaks.grown_kib.max(grown);
            if grown > MORE_KIB {
                let detail = format!("grown by {grown} KiB since it was warm ({base} KiB)");
                world.broken("memory is bounded", detail);
            }
        }
        _ if Instant::now().duration_since(up.since) > WARM_AFTER => {
            *warm = Some((up.generation, kib));
        }
        _ => {}
    }
}

/// A daemon whose clients have all gone holds few descriptors.
pub async fn lets_go(world: &World) {
    const AT_REST: usize = 64;
    const LIMIT: Duration = Duration::from_secs(20);
    let begun = Instant::now();
    let Some(up) = world.keeper.up() else {
        return;
    };
    loop {
        let held = procs::descriptors(up.pid).unwrap_or(0);
        if held <= AT_REST {
            return;
        }
        if begun.elapsed() > LIMIT {
            let detail = format!("{held} held {LIMIT:?} after the last client left");
            world.broken("descriptors are given back", detail);
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
