//! Says to other processes that a model is in use.
//!
//! Everybody who uses a model holds a shared lock on a file of its digest;
//! whoever wants to remove it needs the exclusive one. The kernel ends a lease
//! with its process, however that ends.

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use llama_orch_types::Digest;
use provision_kit::fs::{FsError, create_dir_all};
use provision_kit::lock::open_lock_file;

/// The models that this process uses.
#[derive(Debug)]
pub(crate) struct Leases {
    locks: PathBuf,
    held: Mutex<BTreeMap<Digest, File>>,
}

impl Leases {
    pub(crate) fn new(locks: PathBuf) -> Self {
        Self {
            locks,
            held: Mutex::default(),
        }
    }

    fn path(&self, digest: Digest) -> PathBuf {
        self.locks.join(format!("model-use-{}.lock", digest.hex()))
    }

    /// Holds the model until this value is dropped. False if it is just being
    /// removed.
    pub(crate) fn take(&self, digest: Digest) -> Result<bool, FsError> {
        // Poison means that another thread panicked; the map itself is whole.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if held.contains_key(&digest) {
            return Ok(true);
        }
        let path = self.path(digest);
        let file = match open(&path) {
            Ok(file) => file,
            // Others may have the descriptors that are used up here.
            Err(error) if error.retriable() && !error.is_no_space() => return Err(error),
            // Where no lock can be made nobody can remove a model either.
            Err(error) => {
                tracing::debug!(%error, "a model is used without a lease");
                return Ok(true);
            }
        };
        match file.try_lock_shared() {
            Ok(()) => {
                held.insert(digest, file);
                Ok(true)
            }
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(FsError::at("lock", &path)(error)),
        }
    }

    /// Holds the model until the returned file is dropped. `None` if it is just
    /// being removed.
    pub(crate) fn hold(&self, digest: Digest) -> Result<Option<File>, FsError> {
        let path = self.path(digest);
        let file = open(&path)?;
        match file.try_lock_shared() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(FsError::at("lock", &path)(error)),
        }
    }

    /// The exclusive right to remove the model, unless anybody uses it.
    pub(crate) fn take_for_removal(&self, digest: Digest) -> Result<Option<File>, FsError> {
        let path = self.path(digest);
        let file = open(&path)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(FsError::at("lock", &path)(error)),
        }
    }

    /// Whether anybody uses the model now.
    pub(crate) fn is_in_use(&self, digest: Digest) -> Result<bool, FsError> {
        self.take_for_removal(digest).map(|right| right.is_none())
    }
}

fn open(path: &Path) -> Result<File, FsError> {
    if let Some(parent) = path.parent() {
        create_dir_all(parent)?;
    }
    open_lock_file(path).map_err(FsError::at("open", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_in_use_by_anybody_cannot_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (
            Leases::new(dir.path().to_owned()),
            Leases::new(dir.path().to_owned()),
        );
        let digest = Digest::from_bytes([1; 32]);
        assert!(!other.is_in_use(digest).unwrap());
        assert!(one.take(digest).unwrap());
        assert!(one.take(digest).unwrap());
        assert!(other.take(digest).unwrap());
        drop(other);
        let other = Leases::new(dir.path().to_owned());
        assert!(other.is_in_use(digest).unwrap());
        assert!(one.is_in_use(digest).unwrap());
        drop(one);
        let right = other.take_for_removal(digest).unwrap().unwrap();
        assert!(!other.take(digest).unwrap());
        drop(right);
        assert!(other.take(digest).unwrap());
    }
}
