//! Watches an engine that has nothing to do. `/health` says little: an engine
//! whose every completion hangs may answer it. In doubt it has to generate a
//! token; if it fails twice, it is not relied on any more.
//!
//! Nothing is asked of an engine that works on tasks: their deadlines watch
//! it, and every request delays its look at lost clients.

use std::time::Duration;

use adapter_host::AdapterHost;
use worker_adapters_adapter_api::EngineHealth;

use crate::services::pool::lifecycle::Phase;
use crate::services::pool::{PoolHandle, PoolSnapshot};
use provision_kit::chain::one_line;

/// Failed probes in a row until the engine counts as hung.
const PROBES: u32 = 2;

/// Between a failed probe and the next.
const PAUSE: Duration = Duration::from_secs(1);

/// What is seen of the engine from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sight {
    /// It has no task and could be given one.
    idle: bool,
    doubt: u64,
    /// Tasks that engines were given so far.
    dispatched: u64,
}

impl Sight {
    fn of(snapshot: &PoolSnapshot) -> Self {
        Self {
            idle: snapshot.phase == Phase::Ready && snapshot.running == 0,
            doubt: snapshot.doubt,
            dispatched: snapshot.dispatched,
        }
    }
}

/// What is done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Leave,
    AskHealth,
    Probe,
}

/// What follows a failed probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Again,
    /// Tasks came in the meantime, and the probe says nothing.
    Void,
    Hung,
}

/// Decides. Pure.
#[derive(Debug, Default)]
pub(super) struct Watch {
    /// As much doubt as a probe has settled.
    settled: u64,
    silent: bool,
    failures: u32,
}

impl Watch {
    /// The watch over an engine, which begins with the first look at it. What was
    /// doubted before concerned another engine.
    fn over(memory: &mut Option<Self>, doubt: u64) -> &mut Self {
        memory.get_or_insert_with(|| Self {
            settled: doubt,
            ..Self::default()
        })
    }

    fn next(&self, sight: Sight) -> Step {
        if !sight.idle {
            Step::Leave
        } else if self.silent || self.failures > 0 || sight.doubt > self.settled {
            Step::Probe
        } else {
            Step::AskHealth
        }
    }

    fn health(&mut self, answered: bool) {
        self.silent = !answered;
    }

    fn proved(&mut self, before: Sight) {
        *self = Self {
            settled: before.doubt,
            ..Self::default()
        };
    }

    fn failed(&mut self, before: Sight, after: Sight) -> Verdict {
        if !after.idle || after.dispatched != before.dispatched {
            self.failures = 0;
            return Verdict::Void;
        }
        self.failures += 1;
        if self.failures < PROBES {
            Verdict::Again
        } else {
            Verdict::Hung
        }
    }
}

/// Watches the pool's engine, and returns why it can no longer be relied on.
/// Asks nothing while tasks run. `memory` is one engine's: whoever watches it
/// next goes on with what this one has seen.
pub(super) async fn watch(
    pool: &PoolHandle,
    host: &AdapterHost,
    memory: &mut Option<Watch>,
) -> String {
    let watch = Watch::over(memory, pool.snapshot().doubt);
    let mut pause = None;
    loop {
        let liveness = &pool.settings().config.liveness;
        let every = Duration::from_secs(liveness.check_seconds);
        let limit = Duration::from_secs(liveness.probe_seconds);
        wait(pool, pause.take().unwrap_or(every), watch.settled).await;
        let before = Sight::of(&pool.snapshot());
        match watch.next(before) {
            Step::Leave => {}
            Step::AskHealth => {
                let health = tokio::time::timeout(limit, host.health(pool.id())).await;
                let answered = matches!(health, Ok(Ok(EngineHealth::Ready)));
                watch.health(answered);
                if !answered {
                    pause = Some(Duration::ZERO);
                }
            }
            Step::Probe => match host.probe(pool.id(), limit).await {
                Ok(()) => watch.proved(before),
                Err(error) => match watch.failed(before, Sight::of(&pool.snapshot())) {
                    Verdict::Void => {}
                    Verdict::Again => {
                        tracing::warn!(pool = %pool.id(), error = one_line(&error), "an idle engine failed a probe");
                        pause = Some(PAUSE);
                    }
                    Verdict::Hung => {
                        return format!(
                            "idle, it failed {PROBES} probes; the last: {}",
                            one_line(&error)
                        );
                    }
                },
            },
        }
    }
}

/// Waits, less long where new doubt comes up.
async fn wait(pool: &PoolHandle, pause: Duration, settled: u64) {
    let doubted = pool.wait_for(|snapshot| Sight::of(snapshot).idle && snapshot.doubt > settled);
    tokio::select! {
        () = tokio::time::sleep(pause) => {}
        seen = doubted => if seen.is_none() {
            // The pool is gone, and so are we soon.
            std::future::pending::<()>().await;
        } else {
            // Not at once: more tasks may be on their way to it.
            tokio::time::sleep(PAUSE.min(pause)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const IDLE: Sight = Sight {
        idle: true,
        doubt: 0,
        dispatched: 7,
    };

    #[test]
    fn without_doubt_a_cheap_question_is_enough() {
        let mut watch = Watch::default();
        assert_eq!(watch.next(IDLE), Step::AskHealth);
        watch.health(true);
        assert_eq!(watch.next(IDLE), Step::AskHealth);
        watch.health(false);
        assert_eq!(watch.next(IDLE), Step::Probe);
        watch.proved(IDLE);
        assert_eq!(watch.next(IDLE), Step::AskHealth);
    }

    #[test]
    fn doubt_is_settled_by_a_probe_alone() {
        let mut watch = Watch::default();
        let doubtful = Sight { doubt: 1, ..IDLE };
        assert_eq!(watch.next(doubtful), Step::Probe);
        assert_eq!(watch.failed(doubtful, doubtful), Verdict::Again);
        assert_eq!(watch.next(doubtful), Step::Probe);
        watch.proved(doubtful);
        assert_eq!(watch.next(doubtful), Step::AskHealth);
    }

    #[test]
    fn doubt_outlives_who_watches() {
        let mut memory = None;
        assert_eq!(Watch::over(&mut memory, 1).settled, 1);
        // Raised while somebody else watched, and not settled by then.
        let doubtful = Sight { doubt: 2, ..IDLE };
        assert_eq!(Watch::over(&mut memory, 2).next(doubtful), Step::Probe);
    }

    #[test]
    fn a_probe_that_met_a_task_says_nothing() {
        let mut watch = Watch::default();
        let busy = Sight {
            idle: false,
            ..IDLE
        };
        let later = Sight {
            dispatched: 8,
            ..IDLE
        };
        assert_eq!(watch.failed(IDLE, IDLE), Verdict::Again);
        assert_eq!(watch.failed(IDLE, busy), Verdict::Void);
        assert_eq!(watch.failed(IDLE, IDLE), Verdict::Again, "counted afresh");
        assert_eq!(watch.failed(IDLE, later), Verdict::Void);
        watch.failed(IDLE, IDLE);
        assert_eq!(watch.failed(IDLE, IDLE), Verdict::Hung);
    }

    proptest! {
        #[test]
        fn a_busy_engine_is_left_alone(silent: bool, failures in 0u32..3, doubt in 0u64..3) {
            let watch = Watch { settled: 0, silent, failures };
            let busy = Sight { idle: false, doubt, dispatched: 1 };
            prop_assert_eq!(watch.next(busy), Step::Leave);
        }
    }
}
