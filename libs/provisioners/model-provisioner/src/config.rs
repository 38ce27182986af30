//! What can be configured.

use std::collections::BTreeMap;
use std::env;

use provision_kit::rate::ByteRate;
use provision_kit::secret::Secret;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::profile::ProfileConfig;

/// The key `models:` of a configuration file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelProvisionerConfig {
    /// When a model's digest must be known and right.
    pub verify: VerifyPolicy,
    /// Limit of the model store in bytes. Beyond it the least recently used
    /// models are removed, never one that is in use. No limit where absent.
    pub max_cache_bytes: Option<u64>,
    /// Models known by name, beside the built-in `haiku`.
    pub profiles: BTreeMap<String, ProfileConfig>,
    /// Seconds without a byte before a transfer counts as stalled.
    #[schemars(range(min = 1))]
    pub stall_timeout_seconds: u64,
    /// Attempts in a row that bring nothing before a source is given up.
    #[schemars(range(min = 1))]
    pub attempts: u32,
    /// The most that model downloads may take of the line, in bytes per second
    /// (at least 1024): a number, or a text such as `10MiB`. pip, which fetches
    /// `pip:` models, knows no such limit. No limit where absent.
    pub max_download_rate: Option<ByteRate>,
    /// Seconds to wait for another process that fetches the same model.
    pub lock_timeout_seconds: u64,
}

impl Default for ModelProvisionerConfig {
    fn default() -> Self {
        Self {
            verify: VerifyPolicy::default(),
            max_cache_bytes: None,
            profiles: BTreeMap::new(),
            stall_timeout_seconds: 30,
            attempts: 4,
            max_download_rate: None,
            lock_timeout_seconds: 2 * 60 * 60,
        }
    }
}

/// When a model's digest must be known and right. Of a split model that lies
/// on this machine, the digest is that of its first part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VerifyPolicy {
    /// A wrong digest is said and let through.
    Off,
    /// A known digest must be right; a model without one is taken as it is.
    #[default]
    WhenKnown,
    /// A model without a known digest is refused.
    Required,
}

/// How to reach the Hugging Face Hub.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HubSettings {
    /// The public Hub where absent.
    pub endpoint: Option<String>,
    pub token: Option<Secret>,
}

impl HubSettings {
    /// From `HF_ENDPOINT` and `HF_TOKEN`; empty values do not count.
    pub fn from_env() -> Self {
        let variable = |name| {
            env::var(name)
                .ok()
                .filter(|value: &String| !value.trim().is_empty())
        };
        Self {
            endpoint: variable("HF_ENDPOINT"),
            token: variable("HF_TOKEN").map(Secret::new),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use provision_kit::config::parse_strict;
    use std::path::Path;

    #[test]
    fn a_configuration_as_people_write_it() {
        let text = "
verify: required
max_cache_bytes: 20000000000
max_download_rate: 10MiB
profiles:
  tiny:
    digest: sha256:b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    size_bytes: 98362432
    sources:
      - hf:owner/repo/tiny.gguf
      - file:/srv/models/tiny.gguf
    license: Apache-2.0
";
        let config: ModelProvisionerConfig = parse_strict(text, Path::new("c.yaml")).unwrap();
        assert_eq!(config.verify, VerifyPolicy::Required);
        assert_eq!(config.profiles["tiny"].sources.len(), 2);
        assert_eq!(config.attempts, 4);
        let rate = config.max_download_rate.map(ByteRate::bytes_per_second);
        assert_eq!(rate, Some(10 * 1024 * 1024));
        let again: ModelProvisionerConfig = parse_strict(
            &serde_json::to_string(&config).unwrap(),
            Path::new("c.json"),
        )
        .unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn a_misspelt_key_is_named() {
        let error =
            parse_strict::<ModelProvisionerConfig>("verfy: off", Path::new("c.yaml")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("c.yaml:1:1: unknown key `verfy`"),
            "{error}"
        );
        let text = "profiles:\n  tiny:\n    digest: sha256:00\n    sources: [haiku]\n";
        let error = parse_strict::<ModelProvisionerConfig>(text, Path::new("c.yaml")).unwrap_err();
        assert!(error.to_string().contains("sha256:00"), "{error}");
    }

    #[test]
    fn a_token_is_not_shown() {
        let settings = HubSettings {
            endpoint: None,
            token: Some(Secret::new("hf_secret")),
        };
        assert!(!format!("{settings:?}").contains("hf_secret"));
    }
}
