//! What ended processes left behind, and nobody will go on with.
//!
//! Something is left over only if its lock is free: whoever works on it holds
//! the lock, and the kernel frees it when the process ends, however that ends.
//! What a later start may go on with stays until it is old.
//!
//! Everything here blocks, and nothing here fails: what cannot be looked at or
//! removed stays for another time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::lock::FileLock;
use crate::part::remove_sidecars;

/// For how long a download that was cut, or a build that was interrupted, is
/// kept to be gone on with.
pub const RESUMABLE: Duration = Duration::from_hours(14 * 24);

/// A temporary file of a whole-file write lives for a moment only.
const STAGED: Duration = Duration::from_hours(1);

/// How temporary files of whole-file writes are named.
const STAGED_PREFIX: &str = ".staged-";

/// Whether, at a time, something was last changed longer ago than this. What
/// bears a time of the future is not old.
pub fn is_older(path: &Path, age: Duration, now: SystemTime) -> bool {
    fs::symlink_metadata(path)
        .and_then(|facts| facts.modified())
        .is_ok_and(|changed| now.duration_since(changed).is_ok_and(|passed| passed > age))
}

/// The entries of a directory; none if it is not there.
pub fn entries(directory: &Path) -> Vec<(String, PathBuf)> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.to_owned(), entry.path())))
        .collect()
}

/// Removes something, file or directory, if nobody holds its lock; whether it
/// is gone.
pub fn remove_unlocked(path: &Path, lock: &Path) -> bool {
    // Kept until it is gone, so that nobody begins to use it meanwhile.
    let Ok(Some(_held)) = FileLock::try_acquire(lock) else {
        return false;
    };
    let removed = match fs::symlink_metadata(path) {
        Ok(facts) if facts.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(_) => return false,
    };
    match removed {
        Ok(()) => {
            tracing::info!(path = %path.display(), "removed what an ended process left");
            true
        }
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "something that is left over stays");
            false
        }
    }
}

/// Removes part files that were last written long ago, with what lies beside
/// them, and notes whose part file is gone. `lock_of` names the lock of a part
/// file, by its name without `.part`, and is silent about others' files.
pub fn clear_downloads(
    downloads: &Path,
    now: SystemTime,
    lock_of: impl Fn(&str) -> Option<PathBuf>,
) {
    for (name, path) in entries(downloads) {
        let Some((stem, rest)) = name.split_once(".part") else {
            continue;
        };
        let part = downloads.join(format!("{stem}.part"));
        let Some(lock) = lock_of(stem) else {
            continue;
        };
        let orphan = !rest.is_empty() && !part.exists();
        if (rest.is_empty() || orphan)
            && is_older(&path, if orphan { STAGED } else { RESUMABLE }, now)
            && remove_unlocked(&path, &lock)
            && let Err(error) = remove_sidecars(&part)
        {
            tracing::debug!(%error, "a note about a removed download stays");
        }
    }
}

/// Removes temporary files that a killed process left in a directory.
pub fn clear_staged(directory: &Path, now: SystemTime) {
    for (name, path) in entries(directory) {
        if name.starts_with(STAGED_PREFIX)
            && is_older(&path, STAGED, now)
            && let Err(error) = fs::remove_file(&path)
        {
            tracing::debug!(path = %path.display(), %error, "a temporary file stays");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::part::{Sidecar, sidecar};

    #[test]
    fn old_downloads_go_with_their_notes_unless_somebody_works_on_them() {
        let dir = tempfile::tempdir().unwrap();
        let downloads = dir.path().join("downloads");
        fs::create_dir(&downloads).unwrap();
        for name in ["model-a", "model-b", "other"] {
            let part = downloads.join(format!("{name}.part"));
            fs::write(&part, "x").unwrap();
            fs::write(sidecar(&part, Sidecar::Chunks), "x").unwrap();
        }
        fs::write(downloads.join("model-c.part.etag"), "x").unwrap();
        fs::write(downloads.join(".staged-x"), "x").unwrap();
        let lock = |stem: &str| {
            let path = dir.path().join(format!("{stem}.lock"));
            stem.starts_with("model-").then_some(path)
        };
        let names = || {
            let mut names: Vec<_> = entries(&downloads)
                .into_iter()
                .map(|(name, _)| name)
                .collect();
            names.sort();
            names
        };
        let clear = |now| {
            clear_downloads(&downloads, now, lock);
            clear_staged(&downloads, now);
        };
        clear(SystemTime::now());
        assert_eq!(names().len(), 8, "nothing of today goes");
        let _held = FileLock::try_acquire(&lock("model-b").unwrap())
            .unwrap()
            .unwrap();
        clear(SystemTime::now() + RESUMABLE + Duration::from_mins(1));
        assert_eq!(
            names(),
            [
                "model-b.part",
                "model-b.part.chunks",
                "other.part",
                "other.part.chunks"
            ]
        );
    }
}
