//! The store: model files by digest, and what is known about each.
//!
//! ```text
//! models/
//!   sha256/<64 hex digits>     a model file; its name is its digest
//!   records/<64 hex digits>.json      what is known about it
//!   records/<64 hex digits>.chunks    the digests of its chunks as it arrived,
//!                                     to mend it with
//!   records/file-<64 hex digits>.json what is known about a file that lies
//!                                     elsewhere; the digits name its path
//! ```
//!
//! A file that was verified once is not hashed again while its size, its time
//! of change and its inode stand. Files under `sha256/` are complete: they
//! arrive by rename. A record is a help, never the truth: one that is missing
//! or unreadable is made again from the file.
//!
//! Everything here blocks; the provisioner calls it off the runtime.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use llama_orch_types::Digest;
use provision_kit::fs::{
    FsError, remove_file_if_there, rename_durably, sha256_bytes, write_atomic,
};
use provision_kit::lock::{FileLock, LockError};
use serde::{Deserialize, Serialize};

use crate::gguf::GgufFacts;

/// How long a change of a record waits for another one; each takes a moment.
const RECORD_LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// What a file must still look like to count as the one that was verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStamp {
    pub size_bytes: u64,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: i64,
    /// Of the last change of content, name or permissions. Unlike the time of
    /// modification nobody can set it. Absent in old records, which then match
    /// no file.
    #[serde(default)]
    pub ctime_seconds: i64,
    #[serde(default)]
    pub ctime_nanoseconds: i64,
    pub inode: u64,
}

impl FileStamp {
    /// The stamp of the file as it is now.
    pub fn of(path: &Path) -> Result<Self, FsError> {
        let metadata = fs::metadata(path).map_err(FsError::at("look at", path))?;
        if !metadata.is_file() {
            return Err(FsError::at("use", path)(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            )));
        }
        Ok(Self {
            size_bytes: metadata.size(),
            mtime_seconds: metadata.mtime(),
            mtime_nanoseconds: metadata.mtime_nsec(),
            ctime_seconds: metadata.ctime(),
            ctime_nanoseconds: metadata.ctime_nsec(),
            inode: metadata.ino(),
        })
    }

    /// The same but for a new name, which changes the ctime alone.
    pub(crate) fn is_renamed(self, before: Self) -> bool {
        self == Self {
            ctime_seconds: self.ctime_seconds,
            ctime_nanoseconds: self.ctime_nanoseconds,
            ..before
        }
    }
}

/// What is known about a model file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelRecord {
    pub path: PathBuf,
    pub digest: Digest,
    /// How the file looked when its digest was computed.
    pub stamp: FileStamp,
    /// Everything it was asked for as.
    pub references: BTreeSet<String>,
    /// The reference that served it.
    pub source: String,
    pub verified_at: Timestamp,
    pub last_used: Timestamp,
    /// When it was seen that the file is not any more what it was. It is hashed
    /// before it is used again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spoilt_since: Option<Timestamp>,
    pub facts: GgufFacts,
}

impl ModelRecord {
    /// Whether a file that looks like this now is the one that was verified.
    pub(crate) fn is_as_verified(&self, now: FileStamp) -> bool {
        self.stamp == now && self.spoilt_since.is_none()
    }
}

/// Where a model's file lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place<'a> {
    /// In the store.
    Stored(Digest),
    /// Elsewhere; the path is absolute and free of links.
    Elsewhere(&'a Path),
}

#[derive(Debug, Clone)]
pub struct Store {
    models: PathBuf,
    lock: PathBuf,
}

impl Store {
    /// `models` is the store's directory, `locks` the one for lock files.
    pub fn new(models: PathBuf, locks: &Path) -> Self {
        Self {
            models,
            lock: locks.join("model-records.lock"),
        }
    }

    /// Where the file of this digest is, or would be.
    pub fn path_of(&self, digest: Digest) -> PathBuf {
        self.models.join("sha256").join(digest.hex())
    }

    fn records(&self) -> PathBuf {
        self.models.join("records")
    }

    fn record_path(&self, place: Place<'_>) -> PathBuf {
        let name = match place {
            Place::Stored(digest) => digest.hex(),
            Place::Elsewhere(path) => format!(
                "file-{}",
                sha256_bytes(path.as_os_str().as_encoded_bytes()).hex()
            ),
        };
        self.records().join(format!("{name}.json"))
    }

    fn chunks_path(&self, digest: Digest) -> PathBuf {
        self.records().join(format!("{}.chunks", digest.hex()))
    }

    /// The digests of a stored model's chunks, where they are known.
    pub fn chunks(&self, digest: Digest) -> Option<String> {
        fs::read_to_string(self.chunks_path(digest)).ok()
    }

    /// Keeps the digests of a stored model's chunks.
    pub fn save_chunks(&self, digest: Digest, chunks: &str) -> Result<(), FsError> {
        write_atomic(&self.chunks_path(digest), chunks.as_bytes())
    }

    /// The record, if there is a readable one.
    pub fn record(&self, place: Place<'_>) -> Option<ModelRecord> {
        read_record(&self.record_path(place))
    }

    /// The stored model that was asked for by this reference before.
    pub fn find(&self, reference: &str) -> Result<Option<ModelRecord>, FsError> {
        let found = self
            .list()?
            .into_iter()
            .filter(|record| record.references.contains(reference) && self.is_stored(record))
            // Of several, as when a branch moved, the newest.
            .max_by_key(|record| record.verified_at);
        Ok(found)
    }

    /// Whether the record's file belongs to the store.
    pub fn is_stored(&self, record: &ModelRecord) -> bool {
        record.path == self.path_of(record.digest)
    }

    /// All records whose file is there, most recently used first.
    pub fn list(&self) -> Result<Vec<ModelRecord>, FsError> {
        let directory = self.records();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(FsError::at("list", &directory))?,
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(FsError::at("list", &directory))?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
                && let Some(record) = read_record(&path)
                && record.path.is_file()
            {
                records.push(record);
            }
        }
        records.sort_by_key(|record| std::cmp::Reverse(record.last_used));
        Ok(records)
    }

    /// Gives a complete, verified file its name in the store.
    pub fn publish(&self, staged: &Path, digest: Digest) -> Result<PathBuf, FsError> {
        let path = self.path_of(digest);
        rename_durably(staged, &path)?;
        Ok(path)
    }

    /// Writes down that a model was used now, as this reference. Of one that has no record there is
    /// nothing to write.
    pub fn used(&self, used: &ModelRecord, reference: &str) -> Result<(), SaveError> {
        let _lock = FileLock::acquire_blocking(&self.lock, RECORD_LOCK_TIMEOUT)?;
        let path = self.record_path(self.place_of(used));
        // What was found out about the file meanwhile stands.
        if let Some(mut record) = read_record(&path).filter(|record| record.digest == used.digest) {
            record.last_used = Timestamp::now();
            record.references.insert(reference.to_owned());
            write_record(&path, &record)?;
        }
        Ok(())
    }

    fn place_of<'a>(&self, record: &'a ModelRecord) -> Place<'a> {
        if self.is_stored(record) {
            Place::Stored(record.digest)
        } else {
            Place::Elsewhere(&record.path)
        }
    }

    /// Writes a record. What an older record of the same file was asked for
    /// as is kept.
    pub fn save(&self, mut record: ModelRecord) -> Result<ModelRecord, SaveError> {
        let _lock = FileLock::acquire_blocking(&self.lock, RECORD_LOCK_TIMEOUT)?;
        let path = self.record_path(self.place_of(&record));
        if let Some(before) = read_record(&path)
            && before.digest == record.digest
        {
            record.references.extend(before.references);
        }
        write_record(&path, &record)?;
        Ok(record)
    }

    /// Removes a model of the store, the file first: a record without a file
    /// is nothing, a file without a record is found again. Returns the bytes
    /// that went.
    pub fn remove(&self, digest: Digest) -> Result<u64, SaveError> {
        let _lock = FileLock::acquire_blocking(&self.lock, RECORD_LOCK_TIMEOUT)?;
        let all = [
            self.path_of(digest),
            self.chunks_path(digest),
            self.record_path(Place::Stored(digest)),
        ];
        let mut freed = 0;
        for path in all {
            // Of a link only the link goes.
            let size = fs::symlink_metadata(&path).map_or(0, |facts| facts.len());
            remove_file_if_there(&path)?;
            freed += size;
        }
        Ok(freed)
    }

    /// Forgets a file that lies elsewhere; the file itself stays.
    pub fn forget(&self, path: &Path) -> Result<(), SaveError> {
        let _lock = FileLock::acquire_blocking(&self.lock, RECORD_LOCK_TIMEOUT)?;
        Ok(remove_file_if_there(
            &self.record_path(Place::Elsewhere(path)),
        )?)
    }
}

/// A record could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error(transparent)]
    File(#[from] FsError),
    #[error(transparent)]
    Lock(#[from] LockError),
}

fn write_record(path: &Path, record: &ModelRecord) -> Result<(), FsError> {
    let json = serde_json::to_vec_pretty(record)
        .map_err(|error| FsError::at("write", path)(error.into()))?;
    write_atomic(path, &json)
}

fn read_record(path: &Path) -> Option<ModelRecord> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(record) => Some(record),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "an unreadable record is passed over");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(dir: &Path) -> Store {
        Store::new(dir.join("models"), &dir.join("locks"))
    }

    fn put(store: &Store, dir: &Path, bytes: &[u8], reference: &str, second: i64) -> ModelRecord {
        let staged = dir.join("staged");
        fs::write(&staged, bytes).unwrap();
        let digest = sha256_bytes(bytes);
        let path = store.publish(&staged, digest).unwrap();
        let now = Timestamp::from_second(second).unwrap();
        let record = ModelRecord {
            stamp: FileStamp::of(&path).unwrap(),
            path,
            digest,
            references: BTreeSet::from([reference.to_owned()]),
            source: reference.to_owned(),
            verified_at: now,
            last_used: now,
            spoilt_since: None,
            facts: GgufFacts::default(),
        };
        store.save(record).unwrap()
    }

    #[test]
    fn what_was_put_is_found_by_digest_and_reference() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        assert!(store.list().unwrap().is_empty());
        let record = put(&store, dir.path(), b"one", "haiku", 1);
        assert_eq!(
            store.record(Place::Stored(record.digest)),
            Some(record.clone())
        );
        assert_eq!(store.find("haiku").unwrap().unwrap().digest, record.digest);
        assert!(store.find("other").unwrap().is_none());
        let again = put(&store, dir.path(), b"one", "hf:o/r/m.gguf", 2);
        assert_eq!(again.references.len(), 2);
        assert!(store.find("haiku").unwrap().is_some());
    }

    #[test]
    fn a_use_changes_nothing_else_that_is_known_and_makes_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let before = put(&store, dir.path(), b"one", "haiku", 1);
        let spoilt = ModelRecord {
            spoilt_since: Some(Timestamp::from_second(2).unwrap()),
            ..before.clone()
        };
        store.save(spoilt.clone()).unwrap();
        store.used(&before, "again").unwrap();
        let after = store.record(Place::Stored(before.digest)).unwrap();
        assert_eq!(after.spoilt_since, spoilt.spoilt_since);
        assert!(after.last_used > before.last_used);
        assert!(after.references.contains("haiku") && after.references.contains("again"));
        store.remove(before.digest).unwrap();
        store.used(&before, "again").unwrap();
        assert_eq!(store.record(Place::Stored(before.digest)), None);
    }

    #[test]
    fn the_most_recently_used_comes_first_and_what_is_gone_is_not_listed() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let old = put(&store, dir.path(), b"old", "old", 1);
        let new = put(&store, dir.path(), b"new", "new", 2);
        let listed: Vec<_> = store
            .list()
            .unwrap()
            .iter()
            .map(|record| record.digest)
            .collect();
        assert_eq!(listed, [new.digest, old.digest]);
        fs::remove_file(&old.path).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        store.save_chunks(new.digest, "chunks 1\n").unwrap();
        assert!(store.chunks(new.digest).is_some());
        assert!(store.remove(new.digest).unwrap() > 3);
        assert_eq!(store.remove(new.digest).unwrap(), 0);
        assert_eq!(store.chunks(new.digest), None);
        assert!(store.list().unwrap().is_empty());
        assert!(!new.path.exists());
    }

    #[test]
    fn an_unreadable_record_is_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path());
        let record = put(&store, dir.path(), b"one", "haiku", 1);
        fs::write(store.record_path(Place::Stored(record.digest)), "{").unwrap();
        assert_eq!(store.record(Place::Stored(record.digest)), None);
        assert!(store.list().unwrap().is_empty());
    }

    #[test]
    fn a_directory_is_no_model() {
        let dir = tempfile::tempdir().unwrap();
        assert!(FileStamp::of(dir.path()).is_err());
    }
}
