//! Locks between processes, on files.
//!
//! Two processes that want the same thing agree on a lock file: one makes the
//! thing, the other waits and uses it. The kernel releases the lock when its
//! holder ends, however it ends. The file itself is never removed: if it were,
//! two processes could each hold a lock on a file of that name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use llama_orch_types::Hinted;

use crate::fs::{FsError, create_dir_all, is_shortage};

/// How often a waiter asks again.
const POLL: Duration = Duration::from_millis(50);

/// Who holds a lock that is being waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LockHolder {
    pub path: PathBuf,
    /// The holder's process id, where it could be read.
    pub pid: Option<u32>,
}

/// Why a lock was not had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error(transparent)]
    Directory(FsError),
    #[error("cannot open the lock file {}", path.display())]
    Open {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot lock {}", path.display())]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "another process{} still holds {} after {} s",
        holder.pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default(),
        holder.path.display(),
        waited.as_secs()
    )]
    TimedOut {
        holder: LockHolder,
        waited: Duration,
    },
}

impl LockError {
    /// Whether no lock can be had here at all: the directory cannot be written
    /// to, or its disk is full. Then nobody can change what lies there either,
    /// and what is complete may be used without.
    pub fn cannot_be_made(&self) -> bool {
        matches!(self, Self::Directory(_) | Self::Open { .. })
    }

    /// Whether the same call may succeed a little later: when the holder is
    /// done, or when somebody has freed space, memory or open files.
    pub fn retriable(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            Self::Directory(error) => error.retriable(),
            Self::Open { source, .. } | Self::Lock { source, .. } => is_shortage(source),
        }
    }
}

impl Hinted for LockError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::TimedOut { holder, .. } => Some(match holder.pid {
                Some(pid) => format!(
                    "see what process {pid} is doing (`ps -p {pid}`), end it or try again later"
                ),
                None => format!(
                    "see who holds it (`fuser {}`), or try again later",
                    holder.path.display()
                ),
            }),
            Self::Directory(error) if error.hint().is_some() => error.hint(),
            Self::Directory(_) | Self::Open { .. } | Self::Lock { .. } => Some(
                "set `cache_dir` to a directory that is writable and on a file system that knows locks"
                    .to_owned(),
            ),
        }
    }
}

/// An exclusive lock, held until dropped.
#[derive(Debug)]
pub struct FileLock {
    file: File,
}

impl FileLock {
    /// The lock, or nothing if somebody else holds it.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>, LockError> {
        if let Some(parent) = path.parent() {
            create_dir_all(parent).map_err(LockError::Directory)?;
        }
        let mut file = open_lock_file(path).map_err(|source| LockError::Open {
            path: path.to_owned(),
            source,
        })?;
        match file.try_lock() {
            Ok(()) => {
                // The pid is a help to people only; a lock without it is a lock.
                if let Err(error) = write_pid(&mut file) {
                    tracing::debug!(path = %path.display(), %error, "the lock file does not name its holder");
                }
                Ok(Some(Self { file }))
            }
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(source)) => Err(LockError::Lock {
                path: path.to_owned(),
                source,
            }),
        }
    }

    /// Waits for the lock, at most `timeout`. `on_wait` is called once, before
    /// the waiting starts, if there is any.
    pub async fn acquire(
        path: &Path,
        timeout: Duration,
        on_wait: impl FnOnce(LockHolder),
    ) -> Result<Self, LockError> {
        let start = Instant::now();
        if let Some(lock) = Self::try_acquire(path)? {
            return Ok(lock);
        }
        on_wait(holder_of(path));
        loop {
            // Trying costs a system call and never blocks, so no thread is tied up.
            tokio::time::sleep(POLL).await;
            if let Some(lock) = Self::try_acquire(path)? {
                return Ok(lock);
            }
            let waited = start.elapsed();
            if waited >= timeout {
                return Err(LockError::TimedOut {
                    holder: holder_of(path),
                    waited,
                });
            }
        }
    }

    /// As [`FileLock::acquire`], for code that may block.
    pub fn acquire_blocking(path: &Path, timeout: Duration) -> Result<Self, LockError> {
        let start = Instant::now();
        loop {
            if let Some(lock) = Self::try_acquire(path)? {
                return Ok(lock);
            }
            let waited = start.elapsed();
            if waited >= timeout {
                return Err(LockError::TimedOut {
                    holder: holder_of(path),
                    waited,
                });
            }
            std::thread::sleep(POLL / 10);
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // So that nobody reads a stale pid.
        if let Err(error) = self.file.set_len(0) {
            tracing::debug!(%error, "a released lock file still names its holder");
        }
        // Closing the file alone is not enough: a child between its fork and its
        // exec holds a copy of it, and the lock with it.
        if let Err(error) = self.file.unlock() {
            tracing::debug!(%error, "a lock is released only when its file is closed");
        }
    }
}

/// Opens a lock file, and makes it if it is missing. One that may only be read
/// can be locked all the same; it does not name its holder then.
pub fn open_lock_file(path: &Path) -> io::Result<File> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path);
    match opened {
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            File::open(path).map_err(|_| error)
        }
        result => result,
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(std::process::id().to_string().as_bytes())
}

fn holder_of(path: &Path) -> LockHolder {
    let mut text = String::new();
    let pid = File::open(path)
        .and_then(|file| file.take(16).read_to_string(&mut text))
        .ok()
        .and_then(|_| text.trim().parse().ok());
    LockHolder {
        path: path.to_owned(),
        pid,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_second_waits_for_the_first_and_knows_who_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locks/model.lock");
        let first = FileLock::try_acquire(&path).unwrap().unwrap();
        assert!(FileLock::try_acquire(&path).unwrap().is_none());
        let (tell, told) = tokio::sync::oneshot::channel();
        let waiter = tokio::spawn({
            let path = path.clone();
            async move {
                FileLock::acquire(&path, Duration::from_secs(20), |holder| {
                    tell.send(holder).unwrap();
                })
                .await
            }
        });
        assert_eq!(told.await.unwrap().pid, Some(std::process::id()));
        drop(first);
        let second = waiter.await.unwrap().unwrap();
        assert!(FileLock::try_acquire(&path).unwrap().is_none());
        drop(second);
        assert!(FileLock::try_acquire(&path).unwrap().is_some());
    }

    #[tokio::test]
    async fn waiting_has_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.lock");
        let _held = FileLock::try_acquire(&path).unwrap().unwrap();
        let error = FileLock::acquire(&path, Duration::ZERO, |_| {})
            .await
            .unwrap_err();
        assert!(error.retriable());
        assert!(
            error.to_string().contains(&std::process::id().to_string()),
            "{error}"
        );
        assert!(error.hint().is_some());
        assert!(FileLock::acquire_blocking(&path, Duration::ZERO).is_err());
        let open = |errno: nix::errno::Errno| LockError::Open {
            path: path.clone(),
            source: errno.into(),
        };
        // A flood of clients takes the descriptors for a while.
        assert!(open(nix::errno::Errno::EMFILE).retriable());
        assert!(!open(nix::errno::Errno::EACCES).retriable());
    }
}
