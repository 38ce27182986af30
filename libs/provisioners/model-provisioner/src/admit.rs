//! Lets a file in: looks at it, asks for its signature, names it, records it.
//!
//! Everything here blocks; the provisioner calls it off the runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use llama_orch_types::Digest;
use provision_kit::chain::one_line;
use provision_kit::download::Fetched;
use provision_kit::fs::{remove_file_if_there, sha256_file, sha256_file_watched};

use crate::config::VerifyPolicy;
use crate::error::ModelError;
use crate::gguf::{self, GgufFacts};
use crate::store::{FileStamp, ModelRecord, Place, Store};
use crate::verify::{SignatureVerifier, SignedModel};

/// What lets files in, and by which rules.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    pub(crate) store: Store,
    pub(crate) policy: VerifyPolicy,
    pub(crate) verifier: Option<Arc<dyn SignatureVerifier>>,
    pub(crate) hashed: Hashed,
}

/// The files that were hashed since this program began. A record says the same,
/// but a cache that cannot be written to keeps none, and a spoilt file has none:
/// without this, each new try would read all of it again.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hashed(Arc<Mutex<BTreeMap<PathBuf, (FileStamp, Digest)>>>);

impl Hashed {
    /// The digest of the file, whose stamp was just taken. Fails if it is
    /// written to meanwhile.
    fn digest(&self, path: &Path, stamp: FileStamp) -> Result<Digest, ModelError> {
        // Poison means that another thread panicked; the map itself is whole.
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, digest)) = known().get(path)
            && *of == stamp
        {
            return Ok(*digest);
        }
        let (digest, _) = sha256_file(path)?;
        check_unchanged(path, stamp)?;
        self.keep(path, stamp, digest);
        Ok(digest)
    }

    fn keep(&self, path: &Path, stamp: FileStamp, digest: Digest) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(path.to_owned(), (stamp, digest));
    }
}

/// What a file is let in as.
#[derive(Debug, Clone)]
pub(crate) struct Claim {
    /// What the user asked for.
    pub(crate) id: String,
    /// The reference that serves the file.
    pub(crate) source: String,
    pub(crate) digest: Option<Digest>,
}

impl Gate {
    /// Lets a fetched file into the store. A file that is refused is removed.
    pub(crate) fn admit_staged(
        &self,
        claim: &Claim,
        fetched: &Fetched,
    ) -> Result<ModelRecord, ModelError> {
        let admitted = self.publish(claim, fetched);
        if admitted.is_err()
            && let Err(error) = remove_file_if_there(&fetched.path)
        {
            tracing::warn!(%error, "a refused file stays among the downloads");
        }
        admitted
    }

    fn publish(&self, claim: &Claim, fetched: &Fetched) -> Result<ModelRecord, ModelError> {
        let stamp = FileStamp::of(&fetched.path)?;
        self.check_digest(claim, &fetched.path, fetched.digest)?;
        let facts = read_facts(&fetched.path, &claim.source)?;
        if facts.split_count > 1 {
            return Err(ModelError::Split {
                file: claim.source.clone(),
                count: facts.split_count,
            });
        }
        self.check_signature(claim, &fetched.path, fetched.digest, fetched.size)?;
        check_unchanged(&fetched.path, stamp)?;
        let path = self.store.publish(&fetched.path, fetched.digest)?;
        let published = FileStamp::of(&path)?;
        if published.size_bytes != fetched.size || !published.is_renamed(stamp) {
            remove_file_if_there(&path)?;
            return Err(ModelError::ChangedMeanwhile { path });
        }
        if let Some(chunks) = &fetched.chunks
            && let Err(error) = self.store.save_chunks(fetched.digest, chunks)
        {
            tracing::warn!(path = %path.display(), error = %one_line(&error), "should this model be spoilt, all of it will have to be fetched again");
        }
        Ok(self.record(claim, path, published, fetched.digest, facts))
    }

    /// The stored file of this digest, if it is there and still what it was. That it is used again
    /// is for the caller to write down.
    pub(crate) fn admit_stored(
        &self,
        claim: &Claim,
        digest: Digest,
    ) -> Result<Option<ModelRecord>, ModelError> {
        let path = self.store.path_of(digest);
        if !path.exists() {
            return Ok(None);
        }
        let stamp = FileStamp::of(&path)?;
        let known = self.store.record(Place::Stored(digest));
        if let Some(record) = known.as_ref()
            && record.is_as_verified(stamp)
        {
            return Ok(Some(record.clone()));
        }
        let (actual, size) = (self.hashed.digest(&path, stamp)?, stamp.size_bytes);
        if actual != digest {
            return Err(ModelError::Changed {
                path,
                expected: digest,
                actual,
                repair: None,
            });
        }
        let facts = read_facts(&path, &path.display().to_string())?;
        // The source that first served the file is the truth about it.
        let source = known.map_or_else(|| claim.source.clone(), |record| record.source);
        let claim = Claim {
            source,
            ..claim.clone()
        };
        self.check_signature(&claim, &path, actual, size)?;
        check_unchanged(&path, stamp)?;
        Ok(Some(self.record(&claim, path, stamp, digest, facts)))
    }

    /// A file that lies elsewhere. That it is used again is for the caller to write down.
    ///
    /// Of a split model this is the first part, and digest and signature speak
    /// of that part alone: the engine finds the others beside it, unverified.
    pub(crate) fn admit_in_place(
        &self,
        claim: &Claim,
        path: &Path,
    ) -> Result<ModelRecord, ModelError> {
        let stamp = FileStamp::of(path)?;
        let known = self.store.record(Place::Elsewhere(path));
        if let Some(record) = known.as_ref()
            && record.is_as_verified(stamp)
        {
            self.check_digest(claim, path, record.digest)?;
            return Ok(record.clone());
        }
        // The header first: it is quick, and hashing a useless file is not.
        let facts = read_facts(path, &path.display().to_string())?;
        let (digest, size) = (self.hashed.digest(path, stamp)?, stamp.size_bytes);
        self.check_digest(claim, path, digest)?;
        self.check_signature(claim, path, digest, size)?;
        check_unchanged(path, stamp)?;
        if facts.split_count > 1 {
            tracing::warn!(path = %path.display(), parts = facts.split_count, "only the first part of this split model is verified");
        }
        if let Some(before) = known.filter(|record| record.digest != digest) {
            tracing::warn!(path = %path.display(), before = %before.digest, now = %digest, "the model file has changed");
        }
        Ok(self.record(claim, path.to_owned(), stamp, digest, facts))
    }

    /// Hashes all of a recorded file, whatever is known about it, and writes
    /// down what came of it. `None` if `watch` wants no more.
    pub(crate) fn look_again(
        &self,
        record: &ModelRecord,
        watch: impl FnMut(u64) -> ControlFlow<()>,
    ) -> Result<Option<(ModelRecord, Digest, u64)>, ModelError> {
        let stamp = FileStamp::of(&record.path)?;
        let Some((actual, size)) = sha256_file_watched(&record.path, watch)? else {
            return Ok(None);
        };
        check_unchanged(&record.path, stamp)?;
        self.hashed.keep(&record.path, stamp, actual);
        let now = Timestamp::now();
        // It may have been used while it was read.
        let place = if self.store.is_stored(record) {
            Place::Stored(record.digest)
        } else {
            Place::Elsewhere(&record.path)
        };
        let current = self.store.record(place);
        let current = current.filter(|current| current.digest == record.digest);
        let mut seen = current.unwrap_or_else(|| record.clone());
        if actual == record.digest {
            seen.stamp = stamp;
            seen.verified_at = now;
            seen.spoilt_since = None;
        } else {
            seen.spoilt_since.get_or_insert(now);
        }
        Ok(Some((self.save(seen), actual, size)))
    }

    /// `stamp` is from before the file was read.
    fn record(
        &self,
        claim: &Claim,
        path: PathBuf,
        stamp: FileStamp,
        digest: Digest,
        facts: GgufFacts,
    ) -> ModelRecord {
        let now = Timestamp::now();
        self.save(ModelRecord {
            stamp,
            path,
            digest,
            references: BTreeSet::from([claim.id.clone(), claim.source.clone()]),
            source: claim.source.clone(),
            verified_at: now,
            last_used: now,
            spoilt_since: None,
            facts,
        })
    }

    /// A verified file is as good without its record: that only saves work.
    fn save(&self, record: ModelRecord) -> ModelRecord {
        match self.store.save(record.clone()) {
            Ok(saved) => saved,
            Err(error) => {
                tracing::warn!(path = %record.path.display(), error = %one_line(&error), "a model is used, but its record was not written");
                record
            }
        }
    }

    fn check_digest(&self, claim: &Claim, path: &Path, actual: Digest) -> Result<(), ModelError> {
        match claim.digest {
            Some(expected) if expected != actual => {
                if self.policy == VerifyPolicy::Off {
                    tracing::warn!(model = %claim.id, %expected, %actual, "the digest is wrong, and `verify: off` lets it through");
                    return Ok(());
                }
                Err(ModelError::WrongDigest {
                    id: claim.id.clone(),
                    path: path.to_owned(),
                    expected,
                    actual,
                })
            }
            _ => Ok(()),
        }
    }

    fn check_signature(
        &self,
        claim: &Claim,
        path: &Path,
        digest: Digest,
        size_bytes: u64,
    ) -> Result<(), ModelError> {
        let Some(verifier) = &self.verifier else {
            return Ok(());
        };
        let model = SignedModel {
            id: &claim.id,
            source: &claim.source,
            path,
            digest,
            size_bytes,
        };
        verifier
            .verify(model)
            .map_err(|source| ModelError::Signature {
                file: claim.source.clone(),
                source,
            })
    }
}

/// What was read is what is there: nobody wrote to the file meanwhile.
fn check_unchanged(path: &Path, before: FileStamp) -> Result<(), ModelError> {
    if FileStamp::of(path)? == before {
        Ok(())
    } else {
        Err(ModelError::ChangedMeanwhile {
            path: path.to_owned(),
        })
    }
}

fn read_facts(path: &Path, file: &str) -> Result<GgufFacts, ModelError> {
    gguf::read_file(path).map_err(|source| ModelError::Gguf {
        file: file.to_owned(),
        source,
    })
}
