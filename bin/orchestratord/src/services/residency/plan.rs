//! Who gets memory next, and who has to give some back for it. Pure: the state
//! and the time come in, decisions come out.
//!
//! - Waiters are served in the order they came. What an earlier one waits for
//!   is kept free for it, so that no later one overtakes it for ever; one that
//!   needs nothing of it may go first.
//! - Memory is made by unloading pools without tasks, the least valuable first:
//!   long without a task, and quick to load again. Pools that load, and pinned
//!   ones, are left alone.
//! - A loaded pool keeps its place for a dwell, so that requests for two pools
//!   in turn do not make them take turns at every request. Without tasks it may
//!   have to go earlier: when somebody has waited for it as long as its load
//!   took. With tasks it is asked, once its dwell is over, to finish what runs
//!   and to make way.

mod ledger;

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;

use self::ledger::Ledger;
use super::{Budget, Group, Needs};

/// Bounds of the dwell that is measured by a pool's own load.
const SHORTEST_DWELL: Duration = Duration::from_secs(1);
const LONGEST_DWELL: Duration = Duration::from_mins(1);

/// A pool that holds memory.
#[derive(Debug, Clone)]
pub struct Tenant {
    pub pool: PoolId,
    /// What it was promised, over all of its engines.
    pub needs: Needs,
    pub activity: Activity,
    pub pinned: bool,
    /// When its engine was ready; none while it loads.
    pub loaded_since: Option<Instant>,
    /// How long that took.
    pub load_took: Duration,
    /// It would not go just now, and is not asked again before.
    pub asked_again_at: Option<Instant>,
}

/// What a tenant does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    Loading,
    /// So many tasks run or wait.
    Busy {
        tasks: usize,
    },
    /// No task since then.
    Idle {
        since: Instant,
    },
    /// It gives its memory back as soon as so many tasks are over.
    Leaving {
        tasks: usize,
    },
}

/// A pool that wants memory.
#[derive(Debug, Clone)]
pub struct Waiter {
    pub id: u64,
    pub pool: PoolId,
    pub needs: Needs,
    pub since: Instant,
    /// Nobody is to go for it: it is granted now, or not at all.
    pub at_once: bool,
}

/// All that a decision rests on. Waiters stand in the order they came.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    pub budget: &'a Budget,
    pub groups: &'a [Group],
    /// `None`: by the pool's own load.
    pub min_dwell: Option<Duration>,
    pub tenants: &'a [Tenant],
    pub waiters: &'a [Waiter],
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    Grant {
        waiter: u64,
        promised: Needs,
    },
    /// Unload a pool that has no task, for another one.
    Evict {
        pool: PoolId,
        whom: PoolId,
    },
    /// Ask a pool to finish what runs and to make way for another one.
    Yield {
        pool: PoolId,
        whom: PoolId,
    },
    Wait {
        waiter: u64,
        why: Wait,
    },
    /// It is no use to wait.
    Never {
        waiter: u64,
        why: Never,
    },
}

/// The decisions, and when to look again though nothing happens.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    pub decisions: Vec<Decision>,
    pub look_again: Option<Instant>,
}

/// What is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wait {
    /// For this pool, which makes way when so many tasks are over.
    Leaving { pool: PoolId, tasks: usize },
    /// For this pool, which loads.
    Loading(PoolId),
    /// For this pool, whose time is not over.
    Dwell { pool: PoolId, tasks: usize },
    /// Others came first.
    Line,
}

impl fmt::Display for Wait {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("waits for memory: ")?;
        match self {
            Self::Leaving { pool, tasks: 0 } => write!(f, "`{pool}` is unloaded"),
            Self::Leaving { pool, tasks: 1 } => write!(f, "`{pool}` finishes 1 task"),
            Self::Leaving { pool, tasks } => write!(f, "`{pool}` finishes {tasks} tasks"),
            Self::Loading(pool) => write!(f, "`{pool}` is loading"),
            Self::Dwell { pool, tasks: 0 } => write!(f, "`{pool}` has just been loaded"),
            Self::Dwell { pool, .. } => write!(f, "`{pool}` has its turn"),
            Self::Line => f.write_str("other pools came first"),
        }
    }
}

/// Why it is no use to wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Never {
    /// More than there is, by a budget that was set by hand.
    TooLarge {
        what: &'static str,
        needs: u64,
        budget: u64,
    },
    /// Pinned pools leave too little.
    Pinned(Vec<PoolId>),
    /// There is no room at once: what would be waited for.
    NoRoom(String),
}

impl fmt::Display for Never {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        match self {
            Self::TooLarge {
                what,
                needs,
                budget,
            } => write!(
                f,
                "it needs about {} MiB of {what}, and the budget is {} MiB",
                needs.div_ceil(MIB),
                budget / MIB
            ),
            Self::Pinned(pools) => {
                let names: Vec<String> = pools.iter().map(|pool| format!("`{pool}`")).collect();
                write!(f, "pinned pools leave no room for it: {}", names.join(", "))
            }
            Self::NoRoom(why) => f.write_str(why),
        }
    }
}

/// Decides.
pub fn plan(view: &View<'_>, now: Instant) -> Plan {
    let mut planner = Planner {
        view,
        now,
        held: Ledger::of(view.tenants.iter()),
        coming: Ledger::of(view.tenants.iter().filter(|tenant| !leaves(view, tenant))),
        going: BTreeSet::new(),
        plan: Plan::default(),
    };
    for waiter in view.waiters {
        planner.serve(waiter);
    }
    planner.plan
}

/// How long a pool keeps its place once it is loaded.
pub fn dwell(min_dwell: Option<Duration>, load_took: Duration) -> Duration {
    min_dwell.unwrap_or_else(|| {
        load_took
            .saturating_mul(2)
            .clamp(SHORTEST_DWELL, LONGEST_DWELL)
    })
}

struct Planner<'a> {
    view: &'a View<'a>,
    now: Instant,
    /// What is taken now, and kept free for those who wait.
    held: Ledger,
    /// The same, once all have gone who are going.
    coming: Ledger,
    /// Whom it was decided to ask.
    going: BTreeSet<PoolId>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn serve(&mut self, waiter: &Waiter) {
        let view = self.view;
        let needs = match self.possible(waiter) {
            Ok(needs) => needs,
            Err(why) => return self.never(waiter, why),
        };
        if self.held.fits(view, &waiter.pool, needs) {
            self.plan.decisions.push(Decision::Grant {
                waiter: waiter.id,
                promised: needs,
            });
        } else if waiter.at_once {
            let why = Never::NoRoom(self.no_room(needs));
            return self.never(waiter, why);
        } else {
            let why = self.make_room(waiter, needs);
            self.plan.decisions.push(Decision::Wait {
                waiter: waiter.id,
                why,
            });
        }
        // Granted, or kept free for it.
        self.held.add(&waiter.pool, needs);
        self.coming.add(&waiter.pool, needs);
    }

    fn never(&mut self, waiter: &Waiter, why: Never) {
        self.plan.decisions.push(Decision::Never {
            waiter: waiter.id,
            why,
        });
    }

    /// What it is to be promised, if that can ever be had.
    fn possible(&self, waiter: &Waiter) -> Result<Needs, Never> {
        let view = self.view;
        let needs = view.budget.promise(waiter.needs)?;
        let pinned = || {
            let others = view.tenants.iter();
            others.filter(|tenant| tenant.pinned && tenant.pool != waiter.pool)
        };
        if Ledger::of(pinned()).fits(view, &waiter.pool, needs) {
            Ok(needs)
        } else {
            Err(Never::Pinned(pinned().map(|t| t.pool.clone()).collect()))
        }
    }

    fn no_room(&self, needs: Needs) -> String {
        const MIB: u64 = 1 << 20;
        let short = self.view.budget.short(self.held.used.plus(needs));
        match (short.ram, short.vram) {
            (0, 0) => "a group of pools has no place left".to_owned(),
            (0, vram) => format!(
                "the memory budget lacks {} MiB of the GPU's memory",
                vram.div_ceil(MIB)
            ),
            (ram, _) => format!("the memory budget lacks {} MiB", ram.div_ceil(MIB)),
        }
    }

    /// Chooses who has to go, and says what is waited for.
    fn make_room(&mut self, waiter: &Waiter, needs: Needs) -> Wait {
        if self.coming.fits(self.view, &waiter.pool, needs) {
            return self.whom(waiter, needs);
        }
        let mut coming = self.coming.clone();
        let mut chosen: Vec<&Tenant> = Vec::new();
        for tenant in self.ripe(waiter) {
            if coming.fits(self.view, &waiter.pool, needs) {
                break;
            }
            if coming.helps(self.view, &waiter.pool, needs, tenant) {
                coming.remove(tenant);
                chosen.push(tenant);
            }
        }
        if !coming.fits(self.view, &waiter.pool, needs) {
            return self.whom(waiter, needs);
        }
        // What was chosen first may be more than is needed with what came later.
        chosen.retain(|tenant| {
            let mut with = coming.clone();
            with.add(&tenant.pool, tenant.needs);
            let spared = with.fits(self.view, &waiter.pool, needs);
            if spared {
                coming = with;
            }
            !spared
        });
        self.ask(&chosen, &waiter.pool);
        self.coming = coming;
        match chosen.iter().max_by_key(|tenant| tasks(tenant)) {
            Some(tenant) => Wait::Leaving {
                pool: tenant.pool.clone(),
                tasks: tasks(tenant),
            },
            None => Wait::Line,
        }
    }

    /// Those with tasks first: while they finish, the others may still serve.
    fn ask(&mut self, chosen: &[&Tenant], whom: &PoolId) {
        let any_busy = chosen.iter().any(|tenant| tasks(tenant) > 0);
        for tenant in chosen {
            self.going.insert(tenant.pool.clone());
            let (pool, whom) = (tenant.pool.clone(), whom.clone());
            if tasks(tenant) > 0 {
                self.plan.decisions.push(Decision::Yield { pool, whom });
            } else if !any_busy {
                self.plan.decisions.push(Decision::Evict { pool, whom });
            }
        }
    }

    /// Who may be asked to go now: those without a task first, the least
    /// valuable first among them; then those that were loaded first.
    fn ripe(&mut self, waiter: &Waiter) -> Vec<&'a Tenant> {
        let mut ripe = Vec::new();
        for tenant in self.view.tenants {
            if tenant.pinned || self.going.contains(&tenant.pool) {
                continue;
            }
            match self.ripe_at(tenant, waiter) {
                Some(at) if at <= self.now => ripe.push(tenant),
                Some(at) => self.look_again(at),
                None => {}
            }
        }
        ripe.sort_by(|a, b| self.value(a).total_cmp(&self.value(b)));
        ripe
    }

    /// When a tenant may be asked to go, if it is one that can be.
    fn ripe_at(&self, tenant: &Tenant, waiter: &Waiter) -> Option<Instant> {
        if self.leaves(tenant) {
            return None;
        }
        let loaded = tenant.loaded_since?;
        let dwell = dwell(self.view.min_dwell, tenant.load_took);
        let at = match tenant.activity {
            Activity::Busy { .. } => loaded + dwell,
            Activity::Idle { .. } => {
                let waited = waiter.since.max(loaded) + tenant.load_took.min(dwell);
                waited.min(loaded + dwell)
            }
            Activity::Loading | Activity::Leaving { .. } => return None,
        };
        Some(tenant.asked_again_at.map_or(at, |again| again.max(at)))
    }

    /// What is lost by unloading it: a load, weighed by how long it has not
    /// been asked for anything. One with tasks is worth more than any without.
    fn value(&self, tenant: &Tenant) -> f64 {
        let seconds = |since| self.now.saturating_duration_since(since).as_secs_f64();
        if let Activity::Idle { since } = tenant.activity {
            tenant.load_took.as_secs_f64() / (1.0 + seconds(since))
        } else {
            let loaded = tenant.loaded_since.unwrap_or(self.now);
            f64::MAX / (1.0 + seconds(loaded))
        }
    }

    fn leaves(&self, tenant: &Tenant) -> bool {
        leaves(self.view, tenant)
    }

    fn look_again(&mut self, at: Instant) {
        let next = self.plan.look_again.map_or(at, |next| next.min(at));
        self.plan.look_again = Some(next);
    }

    /// Whom an unserved waiter waits for.
    fn whom(&self, waiter: &Waiter, needs: Needs) -> Wait {
        let view = self.view;
        let mut others = view.tenants.iter().filter(|tenant| {
            tenant.pool != waiter.pool && self.held.helps(view, &waiter.pool, needs, tenant)
        });
        let leaving = |tenant: &&Tenant| self.leaves(tenant) || self.going.contains(&tenant.pool);
        if let Some(tenant) = others.clone().find(leaving) {
            return Wait::Leaving {
                pool: tenant.pool.clone(),
                tasks: tasks(tenant),
            };
        }
        match others.find(|tenant| !tenant.pinned) {
            Some(tenant) if tenant.activity == Activity::Loading => {
                Wait::Loading(tenant.pool.clone())
            }
            Some(tenant) => Wait::Dwell {
                pool: tenant.pool.clone(),
                tasks: tasks(tenant),
            },
            None => Wait::Line,
        }
    }
}

/// Whether a tenant's memory comes back without being asked for: it is on its
/// way out, or it waits itself and what it still has belongs to an engine that
/// ends.
fn leaves(view: &View<'_>, tenant: &Tenant) -> bool {
    matches!(tenant.activity, Activity::Leaving { .. })
        || view
            .waiters
            .iter()
            .any(|waiter| !waiter.at_once && waiter.pool == tenant.pool)
}

fn tasks(tenant: &Tenant) -> usize {
    match tenant.activity {
        Activity::Busy { tasks } | Activity::Leaving { tasks } => tasks,
        Activity::Loading | Activity::Idle { .. } => 0,
    }
}
