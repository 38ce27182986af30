//! Which models go when the store is too full: a pure decision.

use jiff::Timestamp;
use llama_orch_types::Digest;
use serde::Serialize;

/// A model of the store, as far as the decision needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Candidate {
    pub digest: Digest,
    pub size_bytes: u64,
    pub last_used: Timestamp,
    /// Some process serves it, or is about to.
    pub in_use: bool,
    /// What it was asked for as, for people.
    pub names: Vec<String>,
}

/// What would go, and what that comes to.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct EvictionPlan {
    /// Least recently used first.
    pub remove: Vec<Candidate>,
    /// Size of the store before, in bytes.
    pub bytes_before: u64,
    pub bytes_after: u64,
    /// What stays beyond the limit because it is in use, in bytes.
    pub bytes_over_limit: u64,
}

/// The least recently used models beyond the limit, never one in use. Without
/// a limit nothing goes.
pub fn plan(mut models: Vec<Candidate>, max_bytes: Option<u64>) -> EvictionPlan {
    let total = |models: &[Candidate]| {
        models
            .iter()
            .fold(0u64, |sum, model| sum.saturating_add(model.size_bytes))
    };
    let bytes_before = total(&models);
    let limit = max_bytes.unwrap_or(u64::MAX);
    // The digest makes the order the same every time.
    models.sort_by_key(|model| (model.last_used, model.digest));
    let mut bytes_after = bytes_before;
    let mut remove = Vec::new();
    for model in models {
        if bytes_after <= limit {
            break;
        }
        if !model.in_use {
            bytes_after -= model.size_bytes;
            remove.push(model);
        }
    }
    EvictionPlan {
        remove,
        bytes_before,
        bytes_after,
        bytes_over_limit: bytes_after.saturating_sub(limit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn candidate(index: u8, size_bytes: u64, used: i64, in_use: bool) -> Candidate {
        Candidate {
            digest: Digest::from_bytes([index; 32]),
            size_bytes,
            last_used: Timestamp::from_second(used).unwrap(),
            in_use,
            names: Vec::new(),
        }
    }

    #[test]
    fn the_oldest_goes_first_and_only_as_many_as_needed() {
        let models = vec![
            candidate(1, 10, 300, false),
            candidate(2, 10, 100, false),
            candidate(3, 10, 200, false),
        ];
        let plan = plan(models, Some(25));
        assert_eq!(plan.remove.len(), 1);
        assert_eq!(plan.remove[0].digest, Digest::from_bytes([2; 32]));
        assert_eq!(
            (plan.bytes_before, plan.bytes_after, plan.bytes_over_limit),
            (30, 20, 0)
        );
    }

    #[test]
    fn what_is_in_use_stays_even_beyond_the_limit() {
        let plan = plan(
            vec![candidate(1, 10, 1, true), candidate(2, 10, 2, false)],
            Some(5),
        );
        assert_eq!(plan.remove.len(), 1);
        assert_eq!(plan.bytes_over_limit, 5);
    }

    proptest! {
        #[test]
        fn promises(
            models in prop::collection::vec((0u64..100, 0i64..20, any::<bool>()), 0..12),
            limit in prop::option::of(0u64..400),
        ) {
            let models: Vec<_> = models
                .into_iter()
                .enumerate()
                .map(|(index, (size, used, in_use))| candidate(index as u8, size, used, in_use))
                .collect();
            let plan = plan(models.clone(), limit);
            prop_assert!(plan.remove.iter().all(|model| !model.in_use));
            let removed: u64 = plan.remove.iter().map(|model| model.size_bytes).sum();
            prop_assert_eq!(plan.bytes_before - removed, plan.bytes_after);
            match limit {
                None => prop_assert!(plan.remove.is_empty()),
                Some(limit) => {
                    let kept = models.iter().filter(|model| !plan.remove.contains(model));
                    let idle_kept = kept.clone().any(|model| !model.in_use);
                    // Over the limit only when nothing idle is left.
                    prop_assert!(plan.bytes_after <= limit || !idle_kept);
                    // The last one to go was needed.
                    if let Some(last) = plan.remove.last() {
                        prop_assert!(plan.bytes_after + last.size_bytes > limit);
                        let newest = last.last_used;
                        prop_assert!(kept.filter(|model| !model.in_use).all(|model| model.last_used >= newest));
                    }
                }
            }
        }
    }
}
