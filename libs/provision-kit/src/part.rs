//! A file that is still arriving: written, hashed and counted as bytes come.
//!
//! What has arrived stays when a transfer is cut, and a later one goes on
//! where it ended. A part file has a name of its own; only a complete and
//! checked one is renamed to its final name.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use llama_orch_types::Digest;
use sha2::{Digest as _, Sha256};

use crate::fs::{FsError, create_dir_all, finish, hash_into, remove_file_if_there};

/// Bytes are handed to the disk in pieces of about this size.
const PIECE: usize = 1024 * 1024;

/// The arriving file.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    /// Away only while a blocking thread writes.
    on_disk: Option<OnDisk>,
    /// Arrived, not yet handed to the disk.
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct OnDisk {
    file: File,
    hasher: Sha256,
    size: u64,
}

impl PartFile {
    /// Opens the part file, and hashes what an earlier transfer left in it.
    pub async fn open(path: &Path) -> Result<Self, FsError> {
        let owned = path.to_owned();
        let on_disk = blocking(move || OnDisk::open(&owned)).await?;
        Ok(Self {
            path: path.to_owned(),
            on_disk: Some(on_disk),
            buffer: Vec::with_capacity(PIECE),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that have arrived.
    pub fn size(&self) -> u64 {
        let on_disk = self.on_disk.as_ref().map_or(0, |on_disk| on_disk.size);
        on_disk + self.buffer.len() as u64
    }

    /// Takes the next bytes.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), FsError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush().await?;
        }
        Ok(())
    }

    /// Hands everything that has arrived to the disk.
    pub async fn flush(&mut self) -> Result<(), FsError> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let mut on_disk = self.take()?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let path = self.path.clone();
        let (on_disk, buffer) = blocking(move || {
            on_disk
                .file
                .write_all(&buffer)
                .map_err(FsError::at("write", &path))?;
            on_disk.hasher.update(&buffer);
            on_disk.size += buffer.len() as u64;
            buffer.clear();
            Ok((on_disk, buffer))
        })
        .await?;
        self.on_disk = Some(on_disk);
        self.buffer = buffer;
        Ok(())
    }

    /// Forgets what has arrived, and what was noted about it, and begins again.
    pub async fn restart(&mut self) -> Result<(), FsError> {
        self.buffer.clear();
        self.on_disk = None;
        let path = self.path.clone();
        let on_disk = blocking(move || {
            remove_sidecars(&path)?;
            File::create(&path).map_err(FsError::at("empty", &path))?;
            OnDisk::open(&path)
        })
        .await?;
        self.on_disk = Some(on_disk);
        Ok(())
    }

    /// Ends the transfer: the file is on disk, whole. Its digest and size.
    pub async fn complete(mut self) -> Result<(Digest, u64), FsError> {
        self.flush().await?;
        let on_disk = self.take()?;
        let path = self.path;
        blocking(move || {
            on_disk
                .file
                .sync_all()
                .map_err(FsError::at("flush", &path))?;
            Ok((finish(on_disk.hasher), on_disk.size))
        })
        .await
    }

    fn take(&mut self) -> Result<OnDisk, FsError> {
        self.on_disk.take().ok_or_else(|| {
            let source = std::io::Error::other("an earlier write to it failed");
            FsError::at("write", &self.path)(source)
        })
    }
}

/// A note about a part file, such as the server's name for its version: it
/// lies beside it.
pub fn sidecar(part: &Path, kind: Sidecar) -> PathBuf {
    let mut name = part.as_os_str().to_owned();
    name.push(match kind {
        Sidecar::Etag => ".etag",
        Sidecar::Total => ".total",
    });
    name.into()
}

/// What is noted beside a part file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sidecar {
    /// The server's name for the version of the file.
    Etag,
    /// The whole file's length in bytes.
    Total,
}

/// Removes all notes about a part file. Blocks.
pub fn remove_sidecars(part: &Path) -> Result<(), FsError> {
    remove_file_if_there(&sidecar(part, Sidecar::Etag))?;
    remove_file_if_there(&sidecar(part, Sidecar::Total))
}

impl OnDisk {
    fn open(path: &Path) -> Result<Self, FsError> {
        if let Some(parent) = path.parent() {
            create_dir_all(parent)?;
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(FsError::at("open", path))?;
        let mut hasher = Sha256::new();
        // Reading to the end leaves the position where writing goes on.
        let size = hash_into(&mut file, &mut hasher).map_err(FsError::at("read", path))?;
        Ok(Self { file, hasher, size })
    }
}

/// Runs disk work off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, FsError> + Send + 'static,
) -> Result<T, FsError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        // The work never panics on purpose, and nothing cancels it but the
        // end of the runtime: pass on what happened there.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(error) => Err(FsError::at("finish work on", Path::new("a download"))(
                std::io::Error::other(error),
            )),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::sha256_bytes;

    #[tokio::test]
    async fn what_has_arrived_is_kept_and_counted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("downloads/x.part");
        let mut part = PartFile::open(&path).await.unwrap();
        part.write(b"hello ").await.unwrap();
        part.flush().await.unwrap();
        drop(part);
        let mut part = PartFile::open(&path).await.unwrap();
        assert_eq!(part.size(), 6);
        part.write(b"world").await.unwrap();
        assert_eq!(part.size(), 11);
        assert_eq!(
            part.complete().await.unwrap(),
            (sha256_bytes(b"hello world"), 11)
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"hello world");
    }

    #[tokio::test]
    async fn large_pieces_and_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.part");
        let mut part = PartFile::open(&path).await.unwrap();
        part.write(&vec![1; 3 * PIECE]).await.unwrap();
        part.write(b"rest").await.unwrap();
        for kind in [Sidecar::Etag, Sidecar::Total] {
            std::fs::write(sidecar(&path, kind), "of the old bytes").unwrap();
        }
        part.restart().await.unwrap();
        assert_eq!(part.size(), 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        let bytes = vec![7; PIECE + 5];
        part.write(&bytes).await.unwrap();
        assert_eq!(
            part.complete().await.unwrap(),
            (sha256_bytes(&bytes), bytes.len() as u64)
        );
    }
}
