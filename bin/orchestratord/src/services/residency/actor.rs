//! The one owner of who holds memory and who waits for it.

mod show;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;
use metrics::{counter, histogram};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::plan::{Activity, Decision, Plan, Tenant, View, Wait, Waiter, plan};
use super::view::{MemoryView, PoolMemory};
use super::{Budget, Claim, Lease, Needs, Refused, Resident, Rules, Seen, Unloading};
use crate::services::telemetry;

/// When a pool that would not go is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// How many measurements and pools are remembered.
const REMEMBERED: usize = 1000;

/// Somebody wants memory.
pub(super) struct Command {
    pub(super) claim: Claim,
    pub(super) at_once: bool,
    pub(super) waits: watch::Sender<Option<Wait>>,
    pub(super) reply: oneshot::Sender<Result<Lease, Refused>>,
}

/// One promise. It is over when the sender of what is measured is gone.
struct Promise {
    key: String,
    estimated: Needs,
    promised: Needs,
    measured: watch::Receiver<Needs>,
}

/// A pool that holds memory.
struct Held {
    resident: Arc<dyn Resident>,
    promises: Vec<Promise>,
    /// It has been asked to go and has not answered yet.
    asking: bool,
    asked_again_at: Option<Instant>,
    /// Wakes the actor when the pool changes.
    _watcher: AbortOnDropHandle<()>,
}

struct Waiting {
    id: u64,
    command: Command,
    needs: Needs,
    since: Instant,
}

struct Actor {
    rules: Rules,
    budget: Budget,
    poke: Arc<Notify>,
    held: BTreeMap<PoolId, Held>,
    line: Vec<Waiting>,
    next_id: u64,
    asks: JoinSet<(PoolId, Unloading, Result<(), String>)>,
    /// By [`Claim::key`].
    learnt: BTreeMap<String, Needs>,
    pools: BTreeMap<PoolId, PoolMemory>,
    swaps: u64,
    look_again: Option<Instant>,
    view: watch::Sender<MemoryView>,
}

pub(super) fn spawn(
    rules: Rules,
    budget: impl Future<Output = Budget> + Send + 'static,
    commands: mpsc::Receiver<Command>,
    poke: Arc<Notify>,
) -> watch::Receiver<MemoryView> {
    let (view, seen) = watch::channel(MemoryView::default());
    let mut actor = Actor {
        rules,
        budget: Budget::default(),
        poke,
        held: BTreeMap::new(),
        line: Vec::new(),
        next_id: 0,
        asks: JoinSet::new(),
        learnt: BTreeMap::new(),
        pools: BTreeMap::new(),
        swaps: 0,
        look_again: None,
        view,
    };
    // Owned by the handles: it ends with the last of them.
    tokio::spawn(async move {
        actor.budget = budget.await;
        actor.publish();
        actor.run(commands).await;
    });
    seen
}

impl Actor {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let poke = Arc::clone(&self.poke);
        loop {
            let look_again = self.look_again.map(tokio::time::Instant::from_std);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.line_up(command),
                    None => return,
                },
                () = poke.notified() => {}
                Some(answer) = self.asks.join_next() => self.answered(answer),
                () = until(look_again) => {}
            }
            self.take_back();
            self.settle(Instant::now());
            self.publish();
        }
    }

    fn line_up(&mut self, command: Command) {
        let estimated = command.claim.estimated;
        let measured = self.learnt.get(&command.claim.key).copied();
        let pool = command.claim.resident.pool();
        if self.pools.len() < REMEMBERED || self.pools.contains_key(&pool) {
            let memory = self.pools.entry(pool).or_default();
            (memory.estimated, memory.measured) = (estimated, measured);
        }
        self.next_id += 1;
        self.line.push(Waiting {
            id: self.next_id,
            command,
            needs: corrected(estimated, measured.unwrap_or_default()),
            since: Instant::now(),
        });
    }

    /// Sees who has left the line, whose engine is gone, and what was measured.
    fn take_back(&mut self) {
        self.line
            .retain(|waiting| !waiting.command.reply.is_closed());
        for (pool, held) in &mut self.held {
            held.promises.retain_mut(|promise| {
                let used = *promise.measured.borrow_and_update();
                if used != Needs::default() {
                    promise.promised = self.budget.cut(corrected(promise.estimated, used));
                    if self.learnt.len() >= REMEMBERED && !self.learnt.contains_key(&promise.key) {
                        self.learnt.pop_first();
                    }
                    let known = self.learnt.entry(promise.key.clone()).or_default();
                    *known = known.at_least(used);
                    if let Some(memory) = self.pools.get_mut(pool) {
                        memory.measured = Some(*known);
                    }
                }
                // Fails once the lease is gone.
                promise.measured.has_changed().is_ok()
            });
        }
        self.held.retain(|_, held| !held.promises.is_empty());
    }

    fn settle(&mut self, now: Instant) {
        let Plan {
            decisions,
            look_again,
        } = self.decide(now);
        self.look_again = look_again;
        for decision in decisions {
            match decision {
                Decision::Grant { waiter, promised } => self.grant(waiter, promised, now),
                Decision::Evict { pool, whom } => self.ask(&pool, Unloading::IfIdle, whom),
                Decision::Yield { pool, whom } => self.ask(&pool, Unloading::Yield, whom),
                Decision::Wait { waiter, why } => self.tell(waiter, why),
                Decision::Never { waiter, why } => {
                    if let Some(waiting) = self.leave(waiter) {
                        // Nobody may be left to be told.
                        let _ = waiting.command.reply.send(Err(Refused::Never(why)));
                    }
                }
            }
        }
    }

    fn decide(&self, now: Instant) -> Plan {
        let tenants: Vec<Tenant> = self
            .held
            .iter()
            .map(|(pool, held)| held.as_tenant(pool))
            .collect();
        let waiters: Vec<Waiter> = self
            .line
            .iter()
            .map(|waiting| Waiter {
                id: waiting.id,
                pool: waiting.command.claim.resident.pool(),
                needs: waiting.needs,
                since: waiting.since,
                at_once: waiting.command.at_once,
            })
            .collect();
        let view = View {
            budget: &self.budget,
            groups: &self.rules.groups,
            min_dwell: self.rules.min_dwell,
            tenants: &tenants,
            waiters: &waiters,
        };
        plan(&view, now)
    }

    fn leave(&mut self, waiter: u64) -> Option<Waiting> {
        let place = self.line.iter().position(|waiting| waiting.id == waiter)?;
        Some(self.line.remove(place))
    }

    fn tell(&mut self, waiter: u64, why: Wait) {
        let waiting = self.line.iter().find(|waiting| waiting.id == waiter);
        if let Some(waiting) = waiting {
            let why = Some(why);
            waiting.command.waits.send_if_modified(|told| {
                let news = *told != why;
                if news {
                    *told = why;
                }
                news
            });
        }
    }

    fn grant(&mut self, waiter: u64, promised: Needs, now: Instant) {
        let Some(waiting) = self.leave(waiter) else {
            return;
        };
        let Command { claim, reply, .. } = waiting.command;
        let waited = now.saturating_duration_since(waiting.since);
        let pool = claim.resident.pool();
        histogram!(telemetry::MEMORY_WAIT, "pool" => pool.to_string()).record(waited);
        if promised != waiting.needs {
            tracing::warn!(%pool, needs = waiting.needs.ram, promised = promised.ram,
                "the engine seems to need more memory than there is; it is let try alone");
        }
        let (measured, seen) = watch::channel(Needs::default());
        let held = self
            .held
            .entry(pool)
            .or_insert_with(|| Held::new(Arc::clone(&claim.resident), &self.poke));
        held.promises.push(Promise {
            key: claim.key,
            estimated: claim.estimated,
            promised,
            measured: seen,
        });
        let lease = Lease {
            measured: Some(measured),
            promised,
            poke: Arc::clone(&self.poke),
        };
        // Whoever has left the line drops the lease, and so gives it back.
        let _ = reply.send(Ok(lease));
    }

    fn ask(&mut self, pool: &PoolId, how: Unloading, whom: PoolId) {
        let Some(held) = self.held.get_mut(pool) else {
            return;
        };
        held.asking = true;
        let (pool, resident) = (pool.clone(), Arc::clone(&held.resident));
        self.asks.spawn(async move {
            let answer = resident.unload(how, &whom).await;
            (pool, how, answer)
        });
    }

    fn answered(
        &mut self,
        answer: Result<(PoolId, Unloading, Result<(), String>), tokio::task::JoinError>,
    ) {
        let (pool, how, answer) = match answer {
            Ok(answer) => answer,
            Err(broken) => {
                // Whose question broke is not known: all may be asked again.
                tracing::error!(%broken, "a pool could not be asked for its memory");
                self.held.values_mut().for_each(|held| held.asking = false);
                return;
            }
        };
        match &answer {
            Ok(()) => {
                self.swaps += 1;
                counter!(telemetry::MEMORY_SWAPS, "pool" => pool.to_string()).increment(1);
                tracing::info!(%pool, ?how, "the pool makes way for another");
            }
            Err(why) => tracing::debug!(%pool, ?how, why, "the pool does not make way now"),
        }
        if let Some(held) = self.held.get_mut(&pool) {
            held.asking = false;
            held.asked_again_at = Some(Instant::now() + ASK_AGAIN);
        }
    }
}

impl Held {
    fn new(resident: Arc<dyn Resident>, poke: &Arc<Notify>) -> Self {
        let watched = watched(Arc::clone(&resident), Arc::clone(poke));
        Self {
            resident,
            promises: Vec::new(),
            asking: false,
            asked_again_at: None,
            _watcher: AbortOnDropHandle::new(tokio::spawn(watched)),
        }
    }

    fn promised(&self) -> Needs {
        let all = self.promises.iter().map(|promise| promise.promised);
        all.fold(Needs::default(), Needs::plus)
    }

    fn as_tenant(&self, pool: &PoolId) -> Tenant {
        let Seen {
            activity,
            pinned,
            loaded_since,
            load_took,
        } = self.resident.seen();
        let activity = match activity {
            Activity::Busy { tasks } if self.asking => Activity::Leaving { tasks },
            _ if self.asking => Activity::Leaving { tasks: 0 },
            activity => activity,
        };
        Tenant {
            pool: pool.clone(),
            needs: self.promised(),
            activity,
            pinned,
            loaded_since,
            load_took,
            asked_again_at: self.asked_again_at,
        }
    }
}

/// Wakes the actor whenever the pool is seen otherwise.
async fn watched(resident: Arc<dyn Resident>, poke: Arc<Notify>) {
    let mut seen = resident.seen();
    loop {
        if !resident.differs(seen).await {
            return;
        }
        seen = resident.seen();
        poke.notify_one();
    }
}

/// An estimate that was corrected by what was measured. What was measured is
/// what the engine had touched by then, and so a little more is counted, and
/// never much less than was estimated.
fn corrected(estimated: Needs, measured: Needs) -> Needs {
    let correct = |estimated: u64, measured: u64| match measured {
        0 => estimated,
        measured => (measured + measured / 20).max(estimated / 3 * 2),
    };
    Needs {
        ram: correct(estimated.ram, measured.ram),
        vram: correct(estimated.vram, measured.vram),
    }
}

/// Waits until the deadline; for ever where there is none.
async fn until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
