//! Who has to go.

use std::time::{Duration, Instant};

use proptest::prelude::*;

use crate::services::residency::plan::{Activity, Decision, Tenant, View, Waiter, plan};
use crate::services::residency::{Budget, Limit, Needs};

/// A pool: what it holds, how long its load took and how long it has been
/// without a task, in seconds.
type Idle = (u64, u64, u64);

/// Whom a pool that needs so much makes go, of pools that fill the budget.
fn who_goes(pools: &[Idle], needs: u64) -> Vec<usize> {
    let start = Instant::now();
    let now = start + Duration::from_secs(1000);
    let tenant = |(index, &(held, load, idle)): (usize, &Idle)| Tenant {
        pool: format!("p{index}").parse().unwrap(),
        needs: Needs::of_ram(held),
        activity: Activity::Idle {
            since: now.checked_sub(Duration::from_secs(idle)).unwrap_or(start),
        },
        pinned: false,
        loaded_since: Some(start),
        load_took: Duration::from_secs(load),
        asked_again_at: None,
    };
    let tenants: Vec<Tenant> = pools.iter().enumerate().map(tenant).collect();
    let bytes = pools.iter().map(|(held, ..)| held).sum();
    let budget = Budget {
        ram: Some(Limit {
            bytes,
            by_hand: true,
        }),
        vram: None,
    };
    let waiter = Waiter {
        id: 1,
        pool: "new".parse().unwrap(),
        needs: Needs::of_ram(needs),
        since: now,
        at_once: false,
    };
    let view = View {
        budget: &budget,
        groups: &[],
        min_dwell: None,
        tenants: &tenants,
        waiters: &[waiter],
    };
    let evicted = plan(&view, now)
        .decisions
        .into_iter()
        .filter_map(|decision| {
            let Decision::Evict { pool, .. } = decision else {
                return None;
            };
            tenants.iter().position(|tenant| tenant.pool == pool)
        });
    evicted.collect()
}

#[test]
fn long_idle_and_quickly_loaded_pools_go_first() {
    assert_eq!(who_goes(&[(5, 10, 10), (5, 10, 500)], 5), [1]);
    assert_eq!(who_goes(&[(5, 2, 100), (5, 50, 100)], 5), [0]);
    // A costly load outweighs some idleness.
    assert_eq!(who_goes(&[(5, 50, 120), (5, 2, 100)], 5), [1]);
}

#[test]
fn no_more_go_than_are_needed() {
    // The first would be the cheapest; but it alone is not enough, and with the
    // second it is no longer needed.
    assert_eq!(who_goes(&[(2, 1, 500), (8, 10, 100), (1, 50, 1)], 8), [1]);
}

proptest! {
    #[test]
    fn those_who_go_make_room_and_none_of_them_in_vain(
        pools in prop::collection::vec((1..20u64, 1..100u64, 0..900u64), 1..8),
        share in 1..=100u64,
    ) {
        let all: u64 = pools.iter().map(|(held, ..)| held).sum();
        let needs = (all * share / 100).max(1);
        let going = who_goes(&pools, needs);
        let freed: u64 = going.iter().map(|&index| pools[index].0).sum();
        prop_assert!(freed >= needs);
        for index in going {
            prop_assert!(freed - pools[index].0 < needs, "{index} goes in vain");
        }
    }
}
