//! Names that clients ask for must mean one pool each.

use std::collections::BTreeMap;

use llama_orch_types::PoolId;

use super::loaded::{Loaded, SetupError};

/// Longest alias, in bytes.
const MAX_BYTES: usize = 200;

impl Loaded {
    /// Checks that no alias is another pool's id or alias.
    pub(super) fn check_aliases(&self) -> Result<(), SetupError> {
        let pools = &self.config.pools;
        let mut taken: BTreeMap<&str, &PoolId> = BTreeMap::new();
        for (id, pool) in pools {
            for alias in &pool.aliases {
                let refused = |problem: String, hint: &str| {
                    Err(self.rule(&["pools", id.as_str(), "aliases"], problem, hint))
                };
                let printable = alias.chars().all(|c| !c.is_control());
                if alias.trim().is_empty() || alias.len() > MAX_BYTES || !printable {
                    return refused(
                        format!("`{}` is no name", alias.escape_debug()),
                        "an alias has 1 to 200 bytes, and not only blanks",
                    );
                }
                if alias != id.as_str() && pools.keys().any(|other| other.as_str() == alias) {
                    return refused(
                        format!("`{alias}` is the id of another pool"),
                        "leave the alias out, or rename that pool",
                    );
                }
                if let Some(other) = taken.insert(alias, id)
                    && other != id
                {
                    return refused(
                        format!("`{alias}` is an alias of pool `{other}` already"),
                        "an alias can lead to one pool only",
                    );
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<(), SetupError> {
        let config = provision_kit::config::parse_strict(text, "x.yaml".as_ref()).unwrap();
        let loaded = Loaded {
            config,
            origin: Some(("x.yaml".into(), text.to_owned())),
        };
        loaded.check(false, false)
    }

    #[test]
    fn an_alias_means_one_pool() {
        check("pools:\n  a:\n    aliases: [one, a, one]\n  b:\n    aliases: [two]\n").unwrap();
        for (text, problem) in [
            (
                "pools:\n  a: {}\n  b:\n    aliases: [a]\n",
                "x.yaml:4: `pools.b.aliases`: `a` is the id of another pool",
            ),
            (
                "pools:\n  a:\n    aliases: [one]\n  b:\n    aliases: [two, one]\n",
                "x.yaml:5: `pools.b.aliases`: `one` is an alias of pool `a` already",
            ),
            (
                "pools:\n  a:\n    aliases: [\" \"]\n",
                "x.yaml:3: `pools.a.aliases`: ` ` is no name",
            ),
        ] {
            assert_eq!(check(text).unwrap_err().to_string(), problem);
        }
    }
}
