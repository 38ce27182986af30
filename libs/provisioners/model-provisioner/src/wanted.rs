//! What a reference asks for: sources, and what their bytes must be.

use provision_kit::fs::sha256_bytes;

use crate::admit::Claim;
use crate::config::VerifyPolicy;
use crate::error::ModelError;
use crate::fetch::Expected;
use crate::profile::Profiles;
use crate::reference::ModelRef;

/// A reference, resolved.
#[derive(Debug)]
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
