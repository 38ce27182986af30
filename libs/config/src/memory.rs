//! Which pools are in memory, and how much of it they may take together.

use std::collections::BTreeMap;

use llama_orch_types::{EngineKind, PoolId};
use provision_kit::config::nearest;
use provision_kit::rate::ByteSize;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::PoolConfig;
use super::read::{ranged, ranged_option};

/// When a pool's engine is loaded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LoadPolicy {
    /// At start, as far as the memory budget has room.
    #[default]
    Eager,
    /// When the first task comes.
    OnDemand,
}

/// What the engine is started for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Serves {
    /// Chat and completions.
    #[default]
    Text,
    /// Embeddings. A model that does not say how the vectors of a text's tokens
    /// become one needs `--pooling` among the pool's `flags`.
    Embeddings,
    /// Scores of documents for a query.
    Rerank,
}

/// Less main memory than this was meant to have a unit.
const LEAST: ByteSize = ByteSize(1 << 20);

/// How much memory the engines may take together.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MemoryConfig {
    /// Main memory, such as `12GiB`. Default: what the machine, or the control
    /// group, has, less a reserve.
    #[schemars(with = "Option<String>")]
    pub ram: Option<ByteSize>,
    /// Memory of the GPUs together. Default: what they have, less a reserve.
    #[schemars(with = "Option<String>")]
    pub vram: Option<ByteSize>,
    /// How long a loaded pool stays, in seconds (0 to 3600), before another may
    /// take its memory while tasks wait for both. Default: twice as long as its
    /// load took.
    #[serde(deserialize_with = "ranged_option::<_, u64, 0, 3600>")]
    #[schemars(range(min = 0, max = 3600))]
    pub min_dwell_seconds: Option<u64>,
    /// Pools of which only so many may be loaded at once, whatever the memory.
    pub groups: BTreeMap<String, GroupConfig>,
}

/// Pools that share a place.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    pub pools: Vec<PoolId>,
    /// How many of them may be loaded at once (1 to 1000).
    #[serde(default = "one", deserialize_with = "ranged::<_, u32, 1, 1000>")]
    #[schemars(range(min = 1, max = 1000))]
    pub at_most: u32,
}

impl MemoryConfig {
    /// Finds what does not fit the pools: the keys under `memory`, the problem and
    /// a hint.
    pub(super) fn check(&self, pools: &BTreeMap<PoolId, PoolConfig>) -> Result<(), Misfit> {
        if let Some(ram) = self.ram.filter(|ram| *ram < LEAST) {
            return Err(Misfit::new(
                &["ram"],
                format!("no engine fits into {} bytes", ram.0),
                "write a unit, such as 12GiB, or leave it out for what the machine has",
            ));
        }
        let mut groups = self.groups.iter();
        groups.try_for_each(|(name, group)| group.check(name, pools))
    }
}

/// A setting of the memory that cannot stand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Misfit {
    /// Below `memory`.
    pub(super) keys: Vec<String>,
    pub(super) problem: String,
    pub(super) hint: String,
}

impl Misfit {
    fn new(keys: &[&str], problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            keys: keys.iter().map(|&key| key.to_owned()).collect(),
            problem: problem.into(),
            hint: hint.into(),
        }
    }
}

impl GroupConfig {
    fn check(&self, name: &str, pools: &BTreeMap<PoolId, PoolConfig>) -> Result<(), Misfit> {
        let misfit = |key, problem: String, hint: &str| {
            Err(Misfit::new(&["groups", name, key], problem, hint))
        };
        if self.pools.is_empty() {
            return misfit(
                "pools",
                "the group has no pools".to_owned(),
                "name some, or remove the group",
            );
        }
        let mut pinned = 0;
        for (index, id) in self.pools.iter().enumerate() {
            let Some(pool) = pools.get(id) else {
                let known = pools.keys().map(PoolId::as_str);
                let hint = match nearest(id.as_str(), known.clone()) {
                    Some(nearest) => format!("did you mean `{nearest}`?"),
                    None => format!("the pools are: {}", known.collect::<Vec<_>>().join(", ")),
                };
                return misfit("pools", format!("there is no pool `{id}`"), &hint);
            };
            if self.pools[..index].contains(id) {
                return misfit("pools", format!("`{id}` is named twice"), "name it once");
            }
            if pool.engine != EngineKind::Llamacpp {
                return misfit(
                    "pools",
                    format!("the engine of `{id}` is not started here, and takes no memory"),
                    "take it out of the group",
                );
            }
            pinned += u32::from(pool.pin);
        }
        if pinned > self.at_most {
            return misfit(
                "at_most",
                format!(
                    "{pinned} of the group's pools are pinned, and {} may be loaded at once",
                    self.at_most
                ),
                "raise it, or take `pin` from some of them",
            );
        }
        Ok(())
    }
}

fn one() -> u32 {
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(memory: &str) -> Result<(), Misfit> {
        let memory: MemoryConfig = serde_json::from_str(memory).unwrap();
        let pool = |pin, engine| PoolConfig {
            engine,
            pin,
            ..PoolConfig::default()
        };
        let pools = [
            ("chat", pool(false, EngineKind::Llamacpp)),
            ("coder", pool(true, EngineKind::Llamacpp)),
            ("judge", pool(true, EngineKind::Llamacpp)),
            ("away", pool(false, EngineKind::Openai)),
        ];
        let pools = pools.map(|(id, pool)| (id.parse().unwrap(), pool));
        memory.check(&BTreeMap::from(pools))
    }

    #[test]
    fn groups_name_pools_that_there_are_and_that_can_be_loaded_together() {
        assert_eq!(
            problem(r#"{"ram": "2GiB", "groups": {"g": {"pools": ["chat", "coder"]}}}"#),
            Ok(())
        );
        let wrong = |memory: &str| problem(memory).unwrap_err();
        let unknown = wrong(r#"{"groups": {"g": {"pools": ["chat", "codr"]}}}"#);
        assert_eq!(unknown.keys, ["groups", "g", "pools"]);
        assert_eq!(unknown.problem, "there is no pool `codr`");
        assert_eq!(unknown.hint, "did you mean `coder`?");
        for (memory, said) in [
            (r#"{"ram": 0}"#, " 0 bytes"),
            (r#"{"ram": 12}"#, "12 bytes"),
            (r#"{"groups": {"g": {"pools": []}}}"#, "no pools"),
            (r#"{"groups": {"g": {"pools": ["chat", "chat"]}}}"#, "twice"),
            (
                r#"{"groups": {"g": {"pools": ["away"]}}}"#,
                "not started here",
            ),
            (
                r#"{"groups": {"g": {"pools": ["judge", "coder"]}}}"#,
                "2 of the group's pools are pinned",
            ),
        ] {
            let problem = wrong(memory).problem;
            assert!(problem.contains(said), "{memory}: {problem}");
        }
    }
}
