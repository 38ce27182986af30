//! What is taken of memory and of seats in groups, now or after some have gone.

use std::collections::BTreeMap;

use llama_orch_types::PoolId;

use super::{Tenant, View};
use crate::services::residency::{Group, Needs};

/// Memory and seats in groups that are taken.
#[derive(Debug, Clone, Default)]
pub(super) struct Ledger {
    pub(super) used: Needs,
    /// Pools, and how often each is counted: a pool takes one seat.
    pools: BTreeMap<PoolId, usize>,
}

impl Ledger {
    pub(super) fn of<'a>(tenants: impl Iterator<Item = &'a Tenant>) -> Self {
        let mut ledger = Self::default();
        for tenant in tenants {
            ledger.add(&tenant.pool, tenant.needs);
        }
        ledger
    }

    pub(super) fn add(&mut self, pool: &PoolId, needs: Needs) {
        self.used = self.used.plus(needs);
        *self.pools.entry(pool.clone()).or_default() += 1;
    }

    pub(super) fn remove(&mut self, tenant: &Tenant) {
        self.used = self.used.minus(tenant.needs);
        if let Some(count) = self.pools.get_mut(&tenant.pool) {
            *count -= 1;
            if *count == 0 {
                self.pools.remove(&tenant.pool);
            }
        }
    }

    /// The groups that have no seat for the pool.
    fn full<'a>(
        &'a self,
        groups: &'a [Group],
        pool: &'a PoolId,
    ) -> impl Iterator<Item = &'a Group> {
        groups.iter().filter(move |group| {
            let others = group
                .pools
                .iter()
                .filter(|other| *other != pool && self.pools.contains_key(*other));
            group.pools.contains(pool) && others.count() >= group.at_most
        })
    }

    pub(super) fn fits(&self, view: &View<'_>, pool: &PoolId, needs: Needs) -> bool {
        view.budget.holds(self.used.plus(needs)) && self.full(view.groups, pool).next().is_none()
    }

    /// Whether one tenant less makes it easier for the waiter.
    pub(super) fn helps(
        &self,
        view: &View<'_>,
        waiter: &PoolId,
        needs: Needs,
        tenant: &Tenant,
    ) -> bool {
        let short = view.budget.short(self.used.plus(needs));
        let gives = tenant.needs;
        (short.ram > 0 && gives.ram > 0)
            || (short.vram > 0 && gives.vram > 0)
            || self
                .full(view.groups, waiter)
                .any(|group| group.pools.contains(&tenant.pool))
    }
}
