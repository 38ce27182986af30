//! How the state of memory is published: as a view, and as metrics.

use metrics::gauge;

use super::{Actor, Waiting};
use crate::services::residency::Needs;
use crate::services::residency::plan::Wait;
use crate::services::residency::view::{LeaseView, MemoryView, WaiterView};
use crate::services::telemetry;

impl Actor {
    pub(super) fn publish(&self) {
        let view = self.show();
        let by_kind = [
            ("ram", view.promised.ram, view.measured.ram, view.budget.ram),
            (
                "vram",
                view.promised.vram,
                view.measured.vram,
                view.budget.vram,
            ),
        ];
        for (kind, promised, measured, budget) in by_kind {
            gauge!(telemetry::MEMORY_PROMISED, "kind" => kind).set(promised as f64);
            gauge!(telemetry::MEMORY_MEASURED, "kind" => kind).set(measured as f64);
            if let Some(budget) = budget {
                gauge!(telemetry::MEMORY_BUDGET, "kind" => kind).set(budget.bytes as f64);
            }
        }
        self.view.send_replace(view);
    }

    fn show(&self) -> MemoryView {
        let mut pools = self.pools.clone();
        let mut measured = Needs::default();
        let mut loaded = Vec::new();
        for (pool, held) in &self.held {
            let promised = held.promised();
            for promise in &held.promises {
                measured = measured.plus(*promise.measured.borrow());
            }
            pools.entry(pool.clone()).or_default().promised = Some(promised);
            loaded.push(LeaseView {
                pool_id: pool.clone(),
                promised,
                engines: held.promises.len(),
            });
        }
        let sum = |sum: Needs, lease: &LeaseView| sum.plus(lease.promised);
        MemoryView {
            budget: self.budget,
            promised: loaded.iter().fold(Needs::default(), sum),
            measured,
            swaps: self.swaps,
            loaded,
            waiting: self.line.iter().map(Waiting::show).collect(),
            pools,
        }
    }
}

impl Waiting {
    fn show(&self) -> WaiterView {
        let reason = self.command.waits.borrow();
        WaiterView {
            pool_id: self.command.claim.resident.pool(),
            needs: self.needs,
            waited_ms: self.since.elapsed().as_millis() as u64,
            reason: reason.as_ref().map(Wait::to_string).unwrap_or_default(),
        }
    }
}
