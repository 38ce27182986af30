//! What differs between the configuration in force and a new one, and what it
//! takes to get from one to the other. Pure: nothing is read, started or
//! stopped here.
//!
//! A setting is one of three kinds:
//! - of a pool, and changed while its engine runs ([`PoolConfig::same_engine`])
//! - of a pool, and changed by giving it a new engine (all others)
//! - of the daemon: taken over ([`LIVE_IN_DAEMON`]), or named as needing a
//!   restart of the daemon. One that this module does not know is of the
//!   latter sort, so that none is ever ignored in silence.
//!
//! The token is not compared here: its text is never written anywhere.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use llama_orch_types::PoolId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use super::{Config, PoolConfig, shown_model};

/// Settings of the daemon that are taken over while it runs.
const LIVE_IN_DAEMON: [&str; 1] = ["drain_seconds"];

/// The longest value that is shown, in characters.
const SHOWN: usize = 80;

/// One setting that has another value now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SettingChange {
    /// Its name, with dots between the levels.
    pub key: String,
    pub from: String,
    pub to: String,
}

impl fmt::Display for SettingChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} → {}", self.key, self.from, self.to)
    }
}

/// What happens to one pool.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolChange {
    Added(PoolConfig),
    Removed,
    /// It gets a new engine.
    Reloaded(PoolConfig, Vec<SettingChange>),
    /// Its engine goes on.
    Changed(PoolConfig, Vec<SettingChange>),
}

/// All that differs. Pools that did not change are not in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Difference {
    pub pools: BTreeMap<PoolId, PoolChange>,
    /// Settings of the daemon that are taken over at once.
    pub applied: Vec<SettingChange>,
    /// Settings of the daemon that keep their old value until it is restarted.
    pub needs_restart: Vec<SettingChange>,
}

impl Difference {
    pub fn between(old: &Config, new: &Config) -> Self {
        let (applied, needs_restart) = settings_of(old, new)
            .into_iter()
            .partition(|change| LIVE_IN_DAEMON.contains(&change.key.as_str()));
        let ids: BTreeSet<&PoolId> = old.pools.keys().chain(new.pools.keys()).collect();
        let changed = ids.into_iter().filter_map(|id| {
            let change = pool_change(old.pools.get(id), new.pools.get(id))?;
            Some((id.clone(), change))
        });
        Self {
            pools: changed.collect(),
            applied,
            needs_restart,
        }
    }

    /// The configuration that is in force once all of this was done: the new
    /// one, but for what needs a restart.
    pub fn apply_to(&self, old: &Config, new: &Config) -> Config {
        let mut config = old.clone();
        config.drain_seconds = new.drain_seconds;
        config.auth = new.auth.clone();
        for (id, change) in &self.pools {
            match change {
                PoolChange::Removed => {
                    config.pools.remove(id);
                }
                PoolChange::Added(pool)
                | PoolChange::Reloaded(pool, _)
                | PoolChange::Changed(pool, _) => {
                    config.pools.insert(id.clone(), pool.clone());
                }
            }
        }
        config
    }
}

fn pool_change(old: Option<&PoolConfig>, new: Option<&PoolConfig>) -> Option<PoolChange> {
    match (old, new) {
        (None, None) => None,
        (None, Some(new)) => Some(PoolChange::Added(new.clone())),
        (Some(_), None) => Some(PoolChange::Removed),
        (Some(old), Some(new)) if old == new => None,
        (Some(old), Some(new)) => {
            let settings = changed_settings(old, new);
            Some(if old.same_engine(new) {
                PoolChange::Changed(new.clone(), settings)
            } else {
                PoolChange::Reloaded(new.clone(), settings)
            })
        }
    }
}

/// What differs in the daemon's own settings.
fn settings_of(old: &Config, new: &Config) -> Vec<SettingChange> {
    let without_pools = |config: &Config| Config {
        pools: BTreeMap::new(),
        ..config.clone()
    };
    changed_settings(&without_pools(old), &without_pools(new))
}

fn changed_settings<T: Serialize>(old: &T, new: &T) -> Vec<SettingChange> {
    let (old, new) = (leaves(old), leaves(new));
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let changed = keys.into_iter().filter_map(|key| {
        let (from, to) = (old.get(key), new.get(key));
        (from != to).then(|| SettingChange {
            key: key.clone(),
            from: shown(from),
            to: shown(to),
        })
    });
    changed.collect()
}

/// Every single setting by its name. A list is one setting.
fn leaves<T: Serialize>(settings: &T) -> BTreeMap<String, Value> {
    let mut found = BTreeMap::new();
    // Plain data, all of whose keys are texts: JSON holds it.
    let value = serde_json::to_value(settings).unwrap_or_default();
    collect(String::new(), value, &mut found);
    found
}

fn collect(name: String, value: Value, found: &mut BTreeMap<String, Value>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let name = match name.as_str() {
                    "" => key,
                    parent => format!("{parent}.{key}"),
                };
                collect(name, value, found);
            }
        }
        value => {
            found.insert(name, value);
        }
    }
}

/// A value for people, on one line.
fn shown(value: Option<&Value>) -> String {
    let text = match value {
        None | Some(Value::Null) => return "(default)".to_owned(),
        Some(Value::String(text)) => shown_model(text),
        Some(value) => value.to_string(),
    };
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool() -> impl Strategy<Value = PoolConfig> {
        let engine = ("[ab]", 1..3u32, prop::option::of(1..3u32));
        let rest = (prop::collection::vec("--[xy]", 0..2), 1..3u64, 1..3u32);
        (engine, rest).prop_map(
            |((model, slots, threads), (flags, queue_capacity, default_max_tokens))| PoolConfig {
                model,
                slots,
                threads,
                flags,
                queue_capacity,
                default_max_tokens,
                ..PoolConfig::default()
            },
        )
    }

    fn config() -> impl Strategy<Value = Config> {
        let pools = prop::collection::btree_map("[a-d]", pool(), 0..4);
        (pools, 0..3u64, 1..3u16, 1..3u64).prop_map(|(pools, drain_seconds, port, keep_seconds)| {
            let mut config = Config {
                pools: pools
                    .into_iter()
                    .map(|(id, pool)| (id.parse().unwrap(), pool))
                    .collect(),
                drain_seconds,
                ..Config::default()
            };
            config.listen.set_port(port);
            config.tasks.keep_seconds = keep_seconds;
            config
        })
    }

    proptest! {
        #[test]
        fn equal_configurations_do_not_differ(config in config()) {
            prop_assert_eq!(Difference::between(&config, &config.clone()), Difference::default());
        }

        #[test]
        fn applying_the_difference_gives_the_new_configuration(old in config(), new in config()) {
            let difference = Difference::between(&old, &new);
            let applied = difference.apply_to(&old, &new);
            prop_assert_eq!(&applied.pools, &new.pools);
            prop_assert_eq!(applied.drain_seconds, new.drain_seconds);
            // What is left is exactly what was said to need a restart.
            let left = Difference::between(&applied, &new);
            prop_assert!(left.pools.is_empty() && left.applied.is_empty());
            prop_assert_eq!(left.needs_restart, difference.needs_restart);
        }

        #[test]
        fn a_pool_is_in_it_if_and_only_if_it_changed(old in config(), new in config()) {
            let difference = Difference::between(&old, &new);
            for id in old.pools.keys().chain(new.pools.keys()) {
                let (before, after) = (old.pools.get(id), new.pools.get(id));
                prop_assert_eq!(difference.pools.contains_key(id), before != after);
                if let Some(PoolChange::Changed(..)) = difference.pools.get(id) {
                    let (before, after) = (before.unwrap(), after.unwrap());
                    // Nothing that its engine was started with.
                    prop_assert_eq!(&before.model, &after.model);
                    prop_assert_eq!(before.slots, after.slots);
                    prop_assert_eq!(before.threads, after.threads);
                    prop_assert_eq!(&before.flags, &after.flags);
                }
            }
        }
    }

    #[test]
    fn settings_are_named_with_both_values() {
        let old = PoolConfig::default();
        let new = PoolConfig {
            queue_capacity: 128,
            ..old.clone()
        };
        let Some(PoolChange::Changed(_, settings)) = pool_change(Some(&old), Some(&new)) else {
            panic!("the engine does not notice the queue");
        };
        assert_eq!(settings[0].to_string(), "queue_capacity 64 → 128");
        let new = PoolConfig {
            ctx: Some(512),
            ..new
        };
        let Some(PoolChange::Reloaded(_, settings)) = pool_change(Some(&old), Some(&new)) else {
            panic!("the engine is started with its context length");
        };
        assert_eq!(settings[0].to_string(), "ctx (default) → 512");
    }

    #[test]
    fn a_token_is_never_in_it() {
        let mut old = Config::default();
        old.auth.token = Some(super::super::Token::try_from("s3cret".to_owned()).unwrap());
        let difference = Difference::between(&old, &Config::default());
        assert_eq!(difference, Difference::default());
    }

    #[test]
    fn every_setting_of_the_daemon_is_taken_over_or_named() {
        let old = Config::default();
        let mut new = old.clone();
        new.listen.set_port(1);
        new.cache_dir = Some("elsewhere".into());
        new.drain_seconds += 1;
        new.tasks.max_body_bytes += 1;
        let difference = Difference::between(&old, &new);
        let keys = |changes: &[SettingChange]| -> Vec<String> {
            changes.iter().map(|change| change.key.clone()).collect()
        };
        assert_eq!(keys(&difference.applied), ["drain_seconds"]);
        assert_eq!(
            keys(&difference.needs_restart),
            ["cache_dir", "listen", "tasks.max_body_bytes"]
        );
    }
}
