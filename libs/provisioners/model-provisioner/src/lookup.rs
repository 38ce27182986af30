//! Which model of this machine a name means: a pure decision.
//!
//! Tried in this order; the first way that finds anything decides:
//!
//! 1. the whole digest, with or without `sha256:`
//! 2. what it was asked for as, and a profile's name
//! 3. the path of its file, or the last part of a reference or path
//! 4. the first digits of its digest, at least four
//!
//! Several models under one name are never guessed at.

use std::collections::BTreeSet;

use llama_orch_types::Digest;

use crate::error::ModelError;
use crate::profile::Profiles;
use crate::reference::{ModelRef, shown};
use crate::store::ModelRecord;

/// The fewest digits that stand for a digest.
const FEWEST_DIGITS: usize = 4;

/// The record that `name` means. Of two files with the same bytes it is the
/// first in the list.
pub fn select<'a>(
    records: &'a [ModelRecord],
    profiles: &Profiles,
    name: &str,
) -> Result<&'a ModelRecord, ModelError> {
    let name = name.trim();
    let ways: [&dyn Fn(&ModelRecord) -> bool; 4] = [
        &|record| name.parse::<Digest>().is_ok_and(|it| it == record.digest),
        &|record| is_called(record, profiles, name),
        &|record| is_file_named(record, name),
        &|record| begins_with(record.digest, name),
    ];
    for way in ways {
        let found: Vec<&ModelRecord> = records.iter().filter(|record| way(record)).collect();
        let digests: BTreeSet<Digest> = found.iter().map(|record| record.digest).collect();
        match (found.first(), digests.len()) {
            (None, _) => {}
            (Some(record), 1) => return Ok(record),
            (Some(_), _) => {
                return Err(ModelError::Ambiguous {
                    name: shortened(name),
                    candidates: digests.iter().map(ToString::to_string).collect(),
                });
            }
        }
    }
    Err(ModelError::NotHere {
        name: shortened(name),
        known: known_names(records, profiles),
    })
}

/// What a model is called by people: profiles of these bytes, then everything
/// it was asked for as.
pub fn names(record: &ModelRecord, profiles: &Profiles) -> Vec<String> {
    let mut names = profiles_of(record.digest, profiles);
    let asked = record
        .references
        .iter()
        .filter(|name| !names.contains(name));
    let asked: Vec<String> = asked.cloned().collect();
    names.extend(asked);
    names
}

/// The profiles that stand for these bytes.
pub fn profiles_of(digest: Digest, profiles: &Profiles) -> Vec<String> {
    let same = profiles.iter().filter(|profile| profile.digest == digest);
    same.map(|profile| profile.name.clone()).collect()
}

/// Whether it was asked for so, or is what the profile of this name means.
pub fn is_called(record: &ModelRecord, profiles: &Profiles, name: &str) -> bool {
    // A profile means its bytes, even if others were asked for by its name once.
    if let Some(profile) = profiles.get(name) {
        return profile.digest == record.digest;
    }
    let meant = name.parse::<ModelRef>().ok();
    // Written in another way, or with a query that is not recorded.
    let same = |it: &String| {
        let is_shown = meant.as_ref().is_some_and(|meant| meant.to_string() == *it);
        it == name || is_shown || (meant.is_some() && it.parse::<ModelRef>().ok() == meant)
    };
    record.references.iter().any(same)
}

fn is_file_named(record: &ModelRecord, name: &str) -> bool {
    let last = |text: &str| text.rsplit('/').next() == Some(name);
    let path = record.path.to_string_lossy();
    !name.is_empty() && (path == name || last(&path) || record.references.iter().any(|it| last(it)))
}

fn begins_with(digest: Digest, name: &str) -> bool {
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    digits.len() >= FEWEST_DIGITS && digest.hex().starts_with(&digits.to_ascii_lowercase())
}

fn known_names(records: &[ModelRecord], profiles: &Profiles) -> Vec<String> {
    let all = records.iter().flat_map(|record| names(record, profiles));
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

/// As much of it as is repeated: a name may be long, and hold a signature.
pub(crate) fn shortened(name: &str) -> String {
    shown(name).chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::GgufFacts;
    use crate::store::FileStamp;
    use jiff::Timestamp;
    use llama_orch_types::Hinted;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn record(first_byte: u8, path: &str, references: &[&str]) -> ModelRecord {
        let mut bytes = [0xab; 32];
        bytes[0] = first_byte;
        ModelRecord {
            path: path.into(),
            digest: Digest::from_bytes(bytes),
            stamp: FileStamp {
                size_bytes: 1,
                mtime_seconds: 0,
                mtime_nanoseconds: 0,
                ctime_seconds: 0,
                ctime_nanoseconds: 0,
                inode: 0,
            },
            references: references.iter().map(|it| (*it).to_owned()).collect(),
            source: references[0].to_owned(),
            verified_at: Timestamp::UNIX_EPOCH,
            last_used: Timestamp::UNIX_EPOCH,
            spoilt_since: None,
            facts: GgufFacts::default(),
        }
    }

    fn models() -> Vec<ModelRecord> {
        vec![
            record(0x12, "/store/12", &["hf:o/r/dir/small.gguf"]),
            record(
                0x13,
                "/store/13",
                &["https://host/other.gguf", "hf:o/r/same.gguf"],
            ),
            record(
                0x14,
                "/srv/mine.gguf",
                &["/srv/mine.gguf", "hf:o/q/same.gguf"],
            ),
        ]
    }

    fn profiles() -> Profiles {
        let config = serde_json::json!({
            "tiny": { "digest": models()[1].digest, "sources": ["/x.gguf"] }
        });
        let config: BTreeMap<_, _> = serde_json::from_value(config).unwrap();
        Profiles::new(&config).unwrap()
    }

    fn found(name: &str) -> Result<usize, ModelError> {
        let records = models();
        let one = select(&records, &profiles(), name)?;
        Ok(records.iter().position(|record| record == one).unwrap())
    }

    #[test]
    fn a_model_is_found_by_digest_reference_profile_path_and_file_name() {
        let digest = models()[0].digest;
        for name in [
            digest.to_string(),
            digest.hex(),
            digest.hex().to_uppercase(),
            digest.hex()[..4].to_owned(),
            format!("sha256:{}", &digest.hex()[..6]),
            "hf:o/r/dir/small.gguf".to_owned(),
            " small.gguf ".to_owned(),
            "/store/12".to_owned(),
        ] {
            assert_eq!(found(&name).unwrap(), 0, "{name}");
        }
        assert_eq!(found("tiny").unwrap(), 1);
        assert_eq!(found("https://host/other.gguf").unwrap(), 1);
        for name in ["/srv/mine.gguf", "file:/srv/mine.gguf", "mine.gguf"] {
            assert_eq!(found(name).unwrap(), 2, "{name}");
        }
    }

    #[test]
    fn what_may_be_several_is_not_guessed_at() {
        let error = found("same.gguf").unwrap_err();
        assert!(
            matches!(&error, ModelError::Ambiguous { candidates, .. } if candidates.len() == 2)
        );
        assert!(
            error
                .hint()
                .unwrap()
                .contains(&models()[2].digest.to_string())
        );
    }

    #[test]
    fn what_is_not_here_is_said_with_the_nearest_name() {
        for name in ["", "12a", "haiku", "zz", "sha256:", "sha256:12a"] {
            assert!(
                matches!(found(name), Err(ModelError::NotHere { .. })),
                "{name}"
            );
        }
        assert!(
            found("tinny")
                .unwrap_err()
                .hint()
                .unwrap()
                .contains("`tiny`")
        );
        let signed = found("https://host/m.gguf?sig=hidden").unwrap_err();
        assert!(!format!("{signed} {signed:?}").contains("hidden"));
        let error = select(&[], &profiles(), "x").unwrap_err();
        assert!(error.hint().unwrap().contains("pull"), "{error:?}");
    }

    #[test]
    fn of_two_files_with_the_same_bytes_the_first_is_meant() {
        let records = [record(1, "/a", &["a"]), record(1, "/b", &["b"])];
        let one = select(&records, &profiles(), &records[0].digest.hex()).unwrap();
        assert_eq!(one.path, records[0].path);
    }

    proptest! {
        /// Any number of first digits finds the model or says that there are several.
        #[test]
        fn a_prefix_never_means_another_model(byte in any::<u8>(), length in 0usize..=64) {
            let records = models();
            let wanted = record(byte, "/x", &["x"]).digest.hex();
            let prefix = &wanted[..length];
            match select(&records, &profiles(), prefix) {
                Ok(one) => {
                    prop_assert!(one.digest.hex().starts_with(prefix));
                    let like = records.iter().filter(|it| it.digest.hex().starts_with(prefix));
                    prop_assert_eq!(like.count(), 1);
                }
                Err(ModelError::Ambiguous { candidates, .. }) => prop_assert!(candidates.len() > 1),
                Err(ModelError::NotHere { .. }) => {}
                Err(other) => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
