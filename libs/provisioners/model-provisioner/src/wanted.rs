//! What a reference asks for: sources, and what their bytes must be.

use provision_kit::fs::sha256_bytes;

use crate::admit::Claim;
use crate::config::VerifyPolicy;
use crate::error::ModelError;
use crate::fetch::Expected;
use crate::profile::Profiles;
use crate::reference::ModelRef;

/// A reference, resolved.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// What the user asked for, without what may be secret in it.
    pub(crate) id: String,
    pub(crate) expected: Expected,
    /// Never empty, never a profile.
    pub(crate) sources: Vec<ModelRef>,
    /// The same for everybody who wants these bytes: names lock and part file.
    pub(crate) key: String,
}

impl Wanted {
    /// Touches neither disk nor network.
    pub(crate) fn resolve(
        reference: &str,
        profiles: &Profiles,
        policy: VerifyPolicy,
    ) -> Result<Self, ModelError> {
        let parsed: ModelRef = reference.parse()?;
        let id = match &parsed {
            ModelRef::Http { .. } => parsed.to_string(),
            _ => reference.trim().to_owned(),
        };
        let wanted = if let ModelRef::Profile { name } = &parsed {
            let profile = profiles
                .get(name)
                .ok_or_else(|| ModelError::UnknownProfile {
                    name: name.clone(),
                    known: profiles.names().map(str::to_owned).collect(),
                })?;
            Self {
                id,
                expected: Expected {
                    digest: Some(profile.digest),
                    size: profile.size_bytes,
                    has_alternative: false,
                },
                sources: profile.sources.clone(),
                key: profile.digest.hex(),
            }
        } else {
            Self {
                id,
                expected: Expected::default(),
                key: sha256_bytes(String::from(parsed.clone()).as_bytes()).hex(),
                sources: vec![parsed],
            }
        };
        if policy == VerifyPolicy::Required && wanted.expected.digest.is_none() {
            return Err(ModelError::DigestRequired { id: wanted.id });
        }
        Ok(wanted)
    }

    /// What a file that `source` serves is let in as.
    pub(crate) fn claim(&self, source: &str) -> Claim {
        Claim {
            id: self.id.clone(),
            source: source.to_owned(),
            digest: self.expected.digest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    fn hostile() -> impl Strategy<Value = String> {
        let piece = prop::sample::select(vec![
            "hf:", "pip:", "file:", "https://", "haiku", "..", ".", "/", "//", "\\", "%2e%2e",
            "%2f", "@", "==", "a", "b-1", "~", " ", ":", "?", "#", "-", ".gguf", "m.gguf", "é",
            "\u{202e}",
        ]);
        prop::collection::vec(piece, 1..9).prop_map(|pieces| pieces.concat())
    }

    fn is_inside(path: &str) -> bool {
        let mut parts = Path::new(path).components();
        parts.all(|part| matches!(part, Component::Normal(_)))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever the reference: locks, downloads and records get names of
        /// digits alone, and what lies inside something stays inside.
        #[test]
        fn no_reference_names_a_place_of_ours(text in hostile()) {
            let profiles = Profiles::new(&std::collections::BTreeMap::new()).unwrap();
            if let Ok(wanted) = Wanted::resolve(&text, &profiles, VerifyPolicy::WhenKnown) {
                prop_assert_eq!(wanted.key.len(), 64);
                prop_assert!(wanted.key.bytes().all(|byte| byte.is_ascii_hexdigit()));
                for source in wanted.sources {
                    match source {
                        ModelRef::Hub { owner, repo, revision, file } => {
                            for part in [owner, repo, revision.unwrap_or("r".into()), file] {
                                prop_assert!(is_inside(&part) && !part.is_empty(), "{part}");
                            }
                        }
                        ModelRef::Pip { package, version, member } => {
                            for part in [package, version, member] {
                                prop_assert!(is_inside(&part), "{part}");
                                prop_assert!(!part.starts_with('-') || part.contains('/'), "{part}");
                            }
                        }
                        // Used where it lies, never copied nor written to.
                        ModelRef::File { .. } | ModelRef::Http { .. } => {}
                        ModelRef::Profile { name } => prop_assert!(false, "{name}"),
                    }
                }
            }
        }
    }
}
