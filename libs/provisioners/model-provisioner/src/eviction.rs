//! Carries out what [`crate::evict`] decides. Blocks.

use crate::error::ModelError;
use crate::evict::{self, Candidate, EvictionPlan};
use crate::lease::Leases;
use crate::store::Store;

/// What would go now.
pub(crate) fn plan(
    store: &Store,
    leases: &Leases,
    limit: Option<u64>,
) -> Result<EvictionPlan, ModelError> {
    let mut models = Vec::new();
    for record in store.list()? {
        // What lies elsewhere is not ours to remove.
        if store.is_stored(&record) {
            models.push(Candidate {
                digest: record.digest,
                size_bytes: record.stamp.size_bytes,
                last_used: record.last_used,
                in_use: leases.is_in_use(record.digest)?,
                names: record.references.into_iter().collect(),
            });
        }
    }
    Ok(evict::plan(models, limit))
}

/// Removes it. Returns what went.
pub(crate) fn evict(
    store: &Store,
    leases: &Leases,
    limit: Option<u64>,
) -> Result<EvictionPlan, ModelError> {
    let mut plan = plan(store, leases, limit)?;
    let mut removed = Vec::new();
    for candidate in std::mem::take(&mut plan.remove) {
        // Somebody may have begun to use it since the plan was made.
        if let Some(_right) = leases.take_for_removal(candidate.digest)? {
            store.remove(candidate.digest)?;
            tracing::info!(digest = %candidate.digest, bytes = candidate.size_bytes, "removed a model");
            removed.push(candidate);
        } else {
            plan.bytes_after += candidate.size_bytes;
        }
    }
    plan.bytes_over_limit = plan.bytes_after.saturating_sub(limit.unwrap_or(u64::MAX));
    plan.remove = removed;
    Ok(plan)
}
