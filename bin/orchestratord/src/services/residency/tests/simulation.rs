//! Many pools, random arrivals, a simulated clock.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use llama_orch_types::PoolId;
use proptest::prelude::*;

use crate::services::residency::plan::{Activity, Decision, Tenant, View, Waiter, dwell, plan};
use crate::services::residency::{Budget, Group, Limit, Needs};

/// How long an engine takes to end.
const STOP: Duration = Duration::from_millis(20);

/// What a pool is made of.
#[derive(Debug, Clone)]
struct Make {
    needs: u64,
    load: Duration,
}

/// A task: when it comes, for which pool, and how long it takes.
#[derive(Debug, Clone)]
struct Arrival {
    at: Duration,
    pool: usize,
    takes: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    Out,
    /// In the line since then.
    Waiting(u64, Instant),
    Loading(Instant),
    /// Ready since then; the task that runs ends then.
    Ready(Instant, Option<Instant>),
    /// Makes way: the task that runs ends then.
    Yielding(Option<Instant>),
    Stopping(Instant),
}

struct Pool {
    id: PoolId,
    make: Make,
    state: State,
    queue: VecDeque<Duration>,
    idle_since: Instant,
}

struct World {
    begun: Instant,
    now: Instant,
    pools: Vec<Pool>,
    budget: Budget,
    groups: Vec<Group>,
    /// Waiters' order.
    line: Vec<usize>,
    next_id: u64,
    swaps: Vec<(usize, Duration)>,
    done: usize,
    rounds: usize,
}

impl World {
    fn new(makes: Vec<Make>, budget: u64, groups: Vec<Group>) -> Self {
        let begun = Instant::now();
        let pools = makes.into_iter().enumerate().map(|(index, make)| Pool {
            id: format!("p{index}").parse().unwrap(),
            make,
            state: State::Out,
            queue: VecDeque::new(),
            idle_since: begun,
        });
        Self {
            begun,
            now: begun,
            pools: pools.collect(),
            budget: Budget {
                ram: Some(Limit {
                    bytes: budget,
                    by_hand: true,
                }),
                vram: None,
            },
            groups,
            line: Vec::new(),
            next_id: 0,
            swaps: Vec::new(),
            done: 0,
            rounds: 0,
        }
    }

    fn tenant(pool: &Pool) -> Option<Tenant> {
        let (activity, loaded_since) = match pool.state {
            State::Out | State::Waiting(..) => return None,
            State::Loading(_) => (Activity::Loading, None),
            State::Ready(since, None) if pool.queue.is_empty() => {
                let idle = Activity::Idle {
                    since: pool.idle_since,
                };
                (idle, Some(since))
            }
            State::Ready(since, running) => {
                let tasks = pool.queue.len() + usize::from(running.is_some());
                (Activity::Busy { tasks }, Some(since))
            }
            State::Yielding(_) | State::Stopping(_) => (Activity::Leaving { tasks: 0 }, None),
        };
        Some(Tenant {
            pool: pool.id.clone(),
            needs: Needs::of_ram(pool.make.needs),
            activity,
            pinned: false,
            loaded_since,
            load_took: pool.make.load,
            asked_again_at: None,
        })
    }

    /// What happens by itself now.
    fn pass(&mut self) {
        let now = self.now;
        for (index, pool) in self.pools.iter_mut().enumerate() {
            loop {
                let next = match pool.state {
                    State::Out if !pool.queue.is_empty() => {
                        self.next_id += 1;
                        self.line.push(index);
                        State::Waiting(self.next_id, now)
                    }
                    State::Loading(until) if until <= now => {
                        pool.idle_since = now;
                        State::Ready(now, None)
                    }
                    State::Ready(since, Some(until)) if until <= now => {
                        self.done += 1;
                        pool.idle_since = now;
                        State::Ready(since, None)
                    }
                    State::Ready(since, None) if !pool.queue.is_empty() => {
                        let takes = pool.queue.pop_front().unwrap();
                        State::Ready(since, Some(now + takes))
                    }
                    State::Yielding(until) if until.is_none_or(|until| until <= now) => {
                        self.done += usize::from(until.is_some());
                        State::Stopping(now + STOP)
                    }
                    State::Stopping(until) if until <= now => State::Out,
                    _ => break,
                };
                pool.state = next;
            }
        }
    }

    /// Decides and does, until nothing is to be done now; says when to look again.
    fn decide(&mut self) -> Option<Instant> {
        self.rounds += 1;
        let tenants: Vec<Tenant> = self.pools.iter().filter_map(Self::tenant).collect();
        let waiters: Vec<Waiter> = self
            .line
            .iter()
            .map(|&index| {
                let pool = &self.pools[index];
                let State::Waiting(id, since) = pool.state else {
                    panic!("who stands in the line waits");
                };
                Waiter {
                    id,
                    pool: pool.id.clone(),
                    needs: Needs::of_ram(pool.make.needs),
                    since,
                    at_once: false,
                }
            })
            .collect();
        let view = View {
            budget: &self.budget,
            groups: &self.groups,
            min_dwell: None,
            tenants: &tenants,
            waiters: &waiters,
        };
        let plan = plan(&view, self.now);
        for decision in plan.decisions {
            match decision {
                Decision::Grant { waiter, .. } => self.grant(waiter),
                Decision::Evict { pool, .. } => self.unload(&pool, true),
                Decision::Yield { pool, .. } => self.unload(&pool, false),
                Decision::Wait { .. } => {}
                Decision::Never { why, .. } => panic!("each of them fits alone: {why}"),
            }
        }
        self.check();
        plan.look_again
    }

    fn grant(&mut self, waiter: u64) {
        let is = |pool: &Pool| matches!(pool.state, State::Waiting(id, _) if id == waiter);
        let index = self.pools.iter().position(is).unwrap();
        self.line.retain(|&other| other != index);
        let pool = &mut self.pools[index];
        pool.state = State::Loading(self.now + pool.make.load);
    }

    fn unload(&mut self, id: &PoolId, idle: bool) {
        let now = self.now;
        let index = self.pools.iter().position(|pool| pool.id == *id).unwrap();
        let pool = &mut self.pools[index];
        let State::Ready(since, running) = pool.state else {
            panic!(
                "only a ready pool is asked to go, and {id} is {:?}",
                pool.state
            );
        };
        let busy = running.is_some() || !pool.queue.is_empty();
        assert_eq!(busy, !idle, "a busy pool is never evicted");
        let stayed = now - since;
        if busy {
            assert!(stayed >= dwell(None, pool.make.load), "{id} had its time");
        }
        self.swaps.push((index, stayed));
        pool.state = State::Yielding(running);
    }

    fn check(&self) {
        let loaded = || {
            let holds = |pool: &&Pool| !matches!(pool.state, State::Out | State::Waiting(..));
            self.pools.iter().filter(holds)
        };
        let sum: u64 = loaded().map(|pool| pool.make.needs).sum();
        assert!(sum <= self.budget.ram.unwrap().bytes, "{sum} are promised");
        for group in &self.groups {
            let inside = loaded()
                .filter(|pool| group.pools.contains(&pool.id))
                .count();
            assert!(inside <= group.at_most);
        }
    }

    /// The next moment at which something happens.
    fn next(&self, look_again: Option<Instant>, arrival: Option<Instant>) -> Option<Instant> {
        let own = self.pools.iter().filter_map(|pool| match pool.state {
            State::Loading(until)
            | State::Stopping(until)
            | State::Ready(_, Some(until))
            | State::Yielding(Some(until)) => Some(until),
            _ => None,
        });
        own.chain(look_again)
            .chain(arrival)
            .min()
            .map(|at| at.max(self.now))
    }

    fn run(&mut self, arrivals: &[Arrival]) {
        let mut coming: VecDeque<&Arrival> = arrivals.iter().collect();
        // Each task can have its pool loaded, and each load has few steps.
        let most = 400 + arrivals.len() * 60;
        while self.done < arrivals.len() {
            assert!(self.rounds < most, "nobody waits for ever");
            while let Some(arrival) = coming.front()
                && self.begun + arrival.at <= self.now
            {
                self.pools[arrival.pool].queue.push_back(arrival.takes);
                coming.pop_front();
            }
            self.pass();
            let look_again = self.decide();
            // Who was asked to go and has no task goes at once.
            self.pass();
            let arrival = coming.front().map(|arrival| self.begun + arrival.at);
            let next = self.next(look_again, arrival);
            self.now = next.expect("somebody waits, and nothing is to happen any more");
            self.pass();
        }
    }
}

fn makes() -> impl Strategy<Value = Vec<Make>> {
    let make = (1..=10u64, 1..4000u64).prop_map(|(needs, load)| Make {
        needs,
        load: Duration::from_millis(load),
    });
    prop::collection::vec(make, 2..6)
}

fn arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let one = (0..20_000u64, 0..6usize, 1..6000u64);
    prop::collection::vec(one, 1..60).prop_map(|mut all| {
        all.sort_unstable();
        let arrival = |(at, pool, takes)| Arrival {
            at: Duration::from_millis(at),
            pool,
            takes: Duration::from_millis(takes),
        };
        all.into_iter().map(arrival).collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn everybody_is_served_within_the_budget(
        makes in makes(),
        budget in 10..30u64,
        mut arrivals in arrivals(),
        at_most in prop::option::of(1..3usize),
    ) {
        for arrival in &mut arrivals {
            arrival.pool %= makes.len();
        }
        let groups = at_most.map(|at_most| Group {
            pools: ["p0", "p1", "p2"].iter().map(|id| id.parse().unwrap()).collect(),
            at_most,
        });
        let mut world = World::new(makes, budget, groups.into_iter().collect());
        world.run(&arrivals);
        prop_assert_eq!(world.done, arrivals.len());
        // A pool that went had stayed as long as its load took, or its dwell.
        for &(index, stayed) in &world.swaps {
            let load = world.pools[index].make.load;
            prop_assert!(stayed >= load.min(dwell(None, load)), "{stayed:?} of {load:?}");
        }
        // So no pool can have gone more often than the time allows.
        let passed = world.now - world.begun;
        let mut times = BTreeMap::<usize, u32>::new();
        for (index, _) in &world.swaps {
            *times.entry(*index).or_default() += 1;
        }
        for (index, swaps) in times {
            let load = world.pools[index].make.load;
            let stay = load.min(dwell(None, load));
            prop_assert!((load + stay) * swaps <= passed);
        }
    }
}

#[test]
fn two_pools_in_turn_do_not_swap_at_every_request() {
    let makes = vec![
        Make {
            needs: 10,
            load: Duration::from_secs(2),
        };
        2
    ];
    let arrivals: Vec<Arrival> = (0..200)
        .map(|number| Arrival {
            at: Duration::from_millis(100 * number),
            pool: usize::try_from(number % 2).unwrap(),
            takes: Duration::from_millis(90),
        })
        .collect();
    let mut world = World::new(makes, 15, Vec::new());
    world.run(&arrivals);
    // Each stays as long as its load of 2 s takes, at the least.
    assert!(world.swaps.len() <= 10, "{:?}", world.swaps);
}
