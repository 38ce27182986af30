//! Which pool a model's name means.
//!
//! A name is a pool's id, one of its aliases, or its model as the configuration
//! has it or as it is shown (for a profile that is the profile's name). Ids and
//! aliases mean one pool each, which the configuration is checked for; several
//! pools may serve one model.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use llama_orch_types::{ErrorCode, PoolId};

use super::state::AppState;
use crate::services::event_log::Failure;
use crate::services::failure::shortened;
use crate::services::pool::{Phase, PoolHandle, PoolSnapshot};

impl AppState {
    /// The pool that serves what a client calls `model`; without a name the pool
    /// that a task without one goes to. Among several pools that serve the same
    /// model, a ready one is preferred, then the one with the shorter queue.
    ///
    /// # Errors
    /// `MODEL_NOT_FOUND`, with the names that are known or the nearest of them;
    /// without a name `POOL_NOT_FOUND`, if there are several pools and none is
    /// called `default`.
    pub fn pool_named(&self, model: Option<&str>) -> Result<PoolHandle, Failure> {
        let pools = self.pools.get();
        match model {
            Some(model) => by_name(&pools, model),
            None => default_pool(&pools),
        }
    }
}

/// The pool called `default`, else the only one.
fn default_pool(pools: &BTreeMap<PoolId, PoolHandle>) -> Result<PoolHandle, Failure> {
    let mut all = pools.values();
    let default = pools.get(&PoolId::default_pool());
    match (default, all.next(), all.next()) {
        (Some(pool), ..) | (None, Some(pool), None) => Ok(pool.clone()),
        _ => Err(Failure::new(
            ErrorCode::PoolNotFound,
            "there are several pools and the task names none",
        )
        .with_hint("set `pool_id` or `model`; GET /v2/pools lists the pools")),
    }
}

fn by_name(pools: &BTreeMap<PoolId, PoolHandle>, name: &str) -> Result<PoolHandle, Failure> {
    let snapshots: Vec<(&PoolHandle, PoolSnapshot)> =
        pools.values().map(|pool| (pool, pool.snapshot())).collect();
    let facts: Vec<Facts<'_>> = snapshots
        .iter()
        .map(|(_, snapshot)| Facts::of(snapshot))
        .collect();
    match choose(&facts, name) {
        Some(found) => Ok(snapshots[found].0.clone()),
        None => Err(not_known(&facts, name)),
    }
}

/// Whether a pool is called so.
pub(super) fn goes_by(pool: &PoolHandle, name: &str) -> bool {
    Facts::of(&pool.snapshot()).likeness(name).is_some()
}

/// What a choice among pools needs to know of one.
#[derive(Debug, Clone, Copy)]
struct Facts<'a> {
    id: &'a str,
    aliases: &'a [String],
    /// As it is shown.
    model: &'a str,
    /// As the configuration has it.
    configured: &'a str,
    ready: bool,
    /// Tasks that run or wait.
    tasks: usize,
}

/// How a name fits a pool; the lesser is the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Likeness {
    Id,
    Alias,
    Model,
}

impl<'a> Facts<'a> {
    fn of(snapshot: &'a PoolSnapshot) -> Self {
        let settings = &snapshot.settings;
        Self {
            id: settings.id.as_str(),
            aliases: &settings.config.aliases,
            model: &settings.model,
            configured: &settings.config.model,
            ready: snapshot.phase == Phase::Ready,
            tasks: snapshot.queued() + snapshot.running,
        }
    }

    fn likeness(&self, name: &str) -> Option<Likeness> {
        if self.id == name {
            Some(Likeness::Id)
        } else if self.aliases.iter().any(|alias| alias == name) {
            Some(Likeness::Alias)
        } else if self.model == name || self.configured == name {
            Some(Likeness::Model)
        } else {
            None
        }
    }

    /// What it may be called in an answer: a model as configured may hold a
    /// signature, so it is left out.
    fn names(&self) -> impl Iterator<Item = &'a str> {
        let aliases = self.aliases.iter().map(String::as_str);
        [self.id].into_iter().chain(aliases).chain([self.model])
    }
}

fn choose(pools: &[Facts<'_>], name: &str) -> Option<usize> {
    let fitting = pools.iter().enumerate();
    let fitting = fitting.filter_map(|(index, pool)| Some((index, pool, pool.likeness(name)?)));
    fitting
        .min_by_key(|(_, pool, likeness)| (*likeness, Reverse(pool.ready), pool.tasks))
        .map(|(index, ..)| index)
}

fn not_known(pools: &[Facts<'_>], name: &str) -> Failure {
    /// As many as a person reads.
    const SHOWN: usize = 20;
    let name = shortened(name);
    let known: Vec<&str> = pools.iter().flat_map(Facts::names).collect();
    let hint = if let Some(nearest) = provision_kit::config::nearest(name, known.iter().copied()) {
        format!("did you mean `{nearest}`?")
    } else {
        let mut names: Vec<&str> = Vec::new();
        for known in known {
            if !names.contains(&known) {
                names.push(known);
            }
        }
        let more = if names.len() > SHOWN { ", …" } else { "" };
        names.truncate(SHOWN);
        format!("the names are: {}{more}", names.join(", "))
    };
    Failure::new(ErrorCode::ModelNotFound, format!("no pool serves `{name}`")).with_hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts<'a>(id: &'a str, aliases: &'a [String], model: &'a str) -> Facts<'a> {
        Facts {
            id,
            aliases,
            model,
            configured: model,
            ready: true,
            tasks: 0,
        }
    }

    #[test]
    fn an_id_goes_before_an_alias_and_an_alias_before_a_model() {
        let aliases = ["small".to_owned()];
        let pools = [
            facts("a", &[], "small"),
            facts("b", &aliases, "haiku"),
            facts("haiku", &[], "other"),
        ];
        assert_eq!(choose(&pools, "small"), Some(1));
        assert_eq!(choose(&pools, "haiku"), Some(2));
        assert_eq!(choose(&pools, "other"), Some(2));
        assert_eq!(choose(&pools, "none"), None);
    }

    #[test]
    fn among_pools_of_one_model_a_ready_one_with_few_tasks_is_chosen() {
        let pool = |ready, tasks| Facts {
            ready,
            tasks,
            ..facts("p", &[], "haiku")
        };
        let chosen = |pools: &[Facts<'_>]| choose(pools, "haiku");
        assert_eq!(chosen(&[pool(false, 0), pool(true, 9)]), Some(1));
        assert_eq!(chosen(&[pool(true, 2), pool(true, 1)]), Some(1));
        assert_eq!(chosen(&[pool(true, 1), pool(true, 1)]), Some(0));
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_nearest_or_all() {
        let aliases = ["gpt-4o".to_owned()];
        let pools = [
            facts("default", &aliases, "haiku"),
            facts("b", &[], "haiku"),
        ];
        let hint = |name| not_known(&pools, name).hint.unwrap();
        assert_eq!(hint("gpt-4"), "did you mean `gpt-4o`?");
        assert_eq!(hint("zzz"), "the names are: default, gpt-4o, haiku, b");
    }
}
