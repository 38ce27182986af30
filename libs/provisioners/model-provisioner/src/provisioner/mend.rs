//! Mends a stored model that is not any more what it was when it was verified.
//!
//! ```text
//! changed ──► mended before, since this program began? ── yes ──► refused
//!    │ copy, with the digests of its chunks, to where downloads gather
//!    ▼
//! sources in order ──► the chunks that are wrong, or all of it ──► takes its place
//! ```
//!
//! A copy is mended, never the file itself: an engine may have it in its
//! memory, and keeps what it has when another file takes the name. Where no
//! source serves, the file stays as it is and is refused.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use llama_orch_types::Digest;
use provision_kit::chain::one_line;
use provision_kit::fs::{FsError, create_dir_all, free_space, remove_file_if_there, write_atomic};
use provision_kit::part::{Sidecar, remove_sidecars, sidecar};
use provision_kit::progress::Step;

use super::{ModelProvisioner, Provided, blocking};
use crate::error::ModelError;
use crate::fetch::Expected;
use crate::provenance::How;
use crate::store::{FileStamp, Place};
use crate::wanted::Wanted;

/// The models that were mended since this program began. One that is spoilt
/// again lies on a disk that somebody must look at.
#[derive(Debug, Default)]
pub(super) struct Mended(Mutex<BTreeSet<Digest>>);

impl Mended {
    fn contains(&self, digest: Digest) -> bool {
        // Poison means that another thread panicked; the set itself is whole.
        let mended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mended.contains(&digest)
    }

    fn add(&self, digest: Digest) {
        let mut mended = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        mended.insert(digest);
    }
}

impl ModelProvisioner {
    /// Mends the stored model that `problem` says was changed. Other problems,
    /// and one that no source can mend, come back. To be called under the
    /// model's lock.
    pub(super) async fn mend(
        &self,
        wanted: &Wanted,
        problem: ModelError,
        step: &mut Step,
    ) -> Result<Provided, ModelError> {
        let ModelError::Changed {
            path,
            expected: digest,
            actual,
            repair: None,
        } = problem
        else {
            return Err(problem);
        };
        let refuse = |repair: Option<Box<ModelError>>| ModelError::Changed {
            path: path.clone(),
            expected: digest,
            actual,
            repair,
        };
        if self.mended.contains(digest) {
            // By another reference just now?
            if let Ok(Some(provided)) = self.use_cached(wanted).await {
                return Ok(provided);
            }
            step.note("it was mended once since this program began, and is spoilt again");
            return Err(refuse(None));
        }
        let cause = refuse(None).to_string();
        step.note(format!("{cause}; fetching again what is wrong with it"));
        tracing::warn!(model = %wanted.id, "{cause}: it will be mended");
        let spoilt = FileStamp::of(&path)?;
        let wanted = self.exactly(wanted, digest).await?;
        self.stage(&wanted, &path, digest, step).await?;
        match self
            .fetch_from_sources(&wanted, wanted.expected, step)
            .await
        {
            Ok(provided) => {
                self.mended.add(digest);
                self.settle(digest, spoilt, provided).await
            }
            Err(error) => {
                if !error.retriable() {
                    self.clear_staged(&wanted).await?;
                }
                Err(refuse(Some(Box::new(error))))
            }
        }
    }

    /// What was wanted, as these bytes and no others: the source may hold a
    /// newer file by now, which nobody asked for.
    async fn exactly(&self, wanted: &Wanted, digest: Digest) -> Result<Wanted, ModelError> {
        let store = self.gate.store.clone();
        let known = blocking(move || Ok(store.record(Place::Stored(digest)))).await?;
        let mut wanted = wanted.clone();
        wanted.expected = Expected {
            digest: Some(digest),
            size: known.map(|record| record.stamp.size_bytes),
            has_alternative: false,
        };
        Ok(wanted)
    }

    /// Puts what is there to where a fetch goes on with it.
    async fn stage(
        &self,
        wanted: &Wanted,
        path: &Path,
        digest: Digest,
        step: &Step,
    ) -> Result<(), ModelError> {
        let (store, path, part) = (self.gate.store.clone(), path.to_owned(), self.part(wanted));
        let copied = blocking(move || {
            let Some(chunks) = store.chunks(digest) else {
                return Ok(Some("nothing is known about its parts".to_owned()));
            };
            Ok(match copy(&path, &part, &chunks) {
                Ok(()) => None,
                Err(error) => {
                    remove_file_if_there(&part)?;
                    remove_sidecars(&part)?;
                    Some(one_line(&error))
                }
            })
        });
        if let Some(why) = copied.await? {
            step.note(format!("all of it has to be fetched again: {why}"));
        }
        Ok(())
    }

    async fn clear_staged(&self, wanted: &Wanted) -> Result<(), ModelError> {
        let part = self.part(wanted);
        blocking(move || {
            remove_file_if_there(&part)?;
            Ok(remove_sidecars(&part)?)
        })
        .await
    }

    /// What became of the model; nothing stays of the spoilt file.
    async fn settle(
        &self,
        digest: Digest,
        spoilt: FileStamp,
        provided: Provided,
    ) -> Result<Provided, ModelError> {
        if provided.how == How::Fetched {
            let how = How::Mended;
            return Ok(Provided { how, ..provided });
        }
        // A source is used where it lies: the store has no such model any more.
        let store = self.gate.store.clone();
        let removed = blocking(move || {
            // Under another reference, and so another lock, somebody may have mended it.
            match FileStamp::of(&store.path_of(digest)) {
                Ok(now) if now != spoilt => Ok(()),
                _ => Ok(store.remove(digest).map(drop)?),
            }
        })
        .await;
        if let Err(error) = removed {
            tracing::warn!(error = %one_line(&error), "a spoilt model stays in the store");
        }
        Ok(provided)
    }
}

/// Copies a spoilt model, unless an earlier start did and mended some of it.
/// Fails if there is no room for it.
fn copy(path: &Path, part: &Path, chunks: &str) -> Result<(), FsError> {
    let facts = fs::symlink_metadata(path).map_err(FsError::at("look at", path))?;
    if !facts.is_file() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file");
        return Err(FsError::at("copy", path)(source));
    }
    let notes = sidecar(part, Sidecar::Chunks);
    let copied = fs::symlink_metadata(part)
        .is_ok_and(|part| part.is_file() && part.len() >= facts.len() && notes.exists());
    if copied {
        return Ok(());
    }
    remove_file_if_there(part)?;
    remove_sidecars(part)?;
    if let Some(parent) = part.parent() {
        create_dir_all(parent)?;
    }
    if free_space(part)? < facts.len() {
        return Err(FsError::at("copy", path)(io::ErrorKind::StorageFull.into()));
    }
    let mut from = fs::File::open(path).map_err(FsError::at("open", path))?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(part)
        .and_then(|mut to| io::copy(&mut from, &mut to))
        .map_err(FsError::at("copy to", part))?;
    // Last: without it, what is there counts as an unfinished copy.
    write_atomic(&notes, chunks.as_bytes())
}
