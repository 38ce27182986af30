//! A file that is still arriving: written, hashed and counted as bytes come.
//!
//! What has arrived stays when a transfer is cut, and a later one goes on
//! where it ended. A part file has a name of its own; only a complete and
//! checked one is renamed to its final name. Beside it lie the digests of its
//! chunks ([`crate::chunks`]): bytes that are not those that arrived, or that
//! nothing is known about, are found out when a later transfer opens it.

mod disk;

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::blocking::blocking;
use crate::chunks::{CHUNK, ChunkRecord};
use crate::fs::{FsError, finish, remove_file_if_there};
use disk::OnDisk;
use llama_orch_types::Digest;

/// Bytes are handed to the disk in pieces of about this size.
const PIECE: usize = 1024 * 1024;

/// The arriving file.
#[derive(Debug)]
pub struct PartFile {
    path: PathBuf,
    /// Bytes in one chunk.
    chunk: u64,
    /// Away only while a blocking thread writes.
    on_disk: Option<OnDisk>,
    /// Arrived, not yet handed to the disk.
    buffer: Vec<u8>,
}

impl PartFile {
    /// Opens the part file, and hashes what an earlier transfer left in it.
    /// What arrived without its digest having been written down is dropped.
    pub async fn open(path: &Path) -> Result<Self, FsError> {
        Self::open_in_chunks(path, CHUNK).await
    }

    /// As [`PartFile::open`], with chunks of this many bytes.
    pub async fn open_in_chunks(path: &Path, chunk: u64) -> Result<Self, FsError> {
        let owned = path.to_owned();
        let on_disk = blocking(move || OnDisk::open(&owned, chunk)).await?;
        Ok(Self {
            path: path.to_owned(),
            chunk,
            on_disk: Some(on_disk),
            buffer: Vec::with_capacity(PIECE),
        })
    }

    /// Chunks, by number, that are on disk otherwise than they arrived. Until
    /// they are mended the digest of the whole cannot be right.
    pub(crate) fn damaged(&self) -> Vec<u64> {
        self.on_disk
            .as_ref()
            .map(|on_disk| on_disk.damaged.clone())
            .unwrap_or_default()
    }

    /// Whether what an earlier transfer left was compared with what it wrote
    /// down. If not, as after a crash of the machine, only a digest of the
    /// whole file can tell whether it is what arrived.
    pub fn is_known(&self) -> bool {
        self.on_disk
            .as_ref()
            .is_some_and(|on_disk| on_disk.is_known)
    }

    /// Where a chunk lies, and what it was when it arrived.
    pub(crate) fn chunk(&self, index: u64) -> Option<(Range<u64>, Digest)> {
        let record = &self.on_disk.as_ref()?.record;
        Some((record.range(index), record.get(index)?.1))
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
                .append(&buffer)
                .map_err(FsError::at("write", &path))?;
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
        let old = self.on_disk.take();
        let (path, chunk) = (self.path.clone(), self.chunk);
        let on_disk = blocking(move || {
            // It writes down what it knows when it goes.
            drop(old);
            remove_sidecars(&path)?;
            File::create(&path).map_err(FsError::at("empty", &path))?;
            OnDisk::open(&path, chunk)
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
            Ok((finish(on_disk.hasher.clone()), on_disk.size))
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
        Sidecar::Chunks => ".chunks",
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
    /// The digests of its chunks.
    Chunks,
}

impl Sidecar {
    /// All that may lie beside a part file.
    pub const ALL: [Self; 3] = [Self::Etag, Self::Total, Self::Chunks];
}

/// Removes all notes about a part file. Blocks.
pub fn remove_sidecars(part: &Path) -> Result<(), FsError> {
    Sidecar::ALL
        .into_iter()
        .try_for_each(|kind| remove_file_if_there(&sidecar(part, kind)))
}

/// Ends the notes about a complete part file: they are removed, and the digests
/// of its chunks, where there are any, handed on as text. Blocks.
pub fn take_notes(part: &Path) -> Result<Option<String>, FsError> {
    let chunks = std::fs::read_to_string(sidecar(part, Sidecar::Chunks)).ok();
    remove_sidecars(part)?;
    Ok(chunks)
}

/// Writes bytes into the middle of a part file. Blocks.
fn write_at(path: &Path, start: u64, bytes: &[u8]) -> Result<(), FsError> {
    OpenOptions::new()
        .write(true)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .and_then(|file| std::os::unix::fs::FileExt::write_all_at(&file, bytes, start))
        .map_err(FsError::at("mend", path))
}

/// Writes bytes into the middle of a part file, and notes that they are now
/// what the chunk is.
pub(crate) async fn replace_chunk(
    path: &Path,
    record: &ChunkRecord,
    start: u64,
    bytes: Vec<u8>,
) -> Result<(), FsError> {
    let (path, text) = (path.to_owned(), record.text());
    blocking(move || {
        write_at(&path, start, &bytes)?;
        crate::fs::write_atomic(&sidecar(&path, Sidecar::Chunks), text.as_bytes())
    })
    .await
}

/// Cuts a part file off, and what is known about it.
pub(crate) async fn truncate(path: &Path, length: u64) -> Result<(), FsError> {
    let path = path.to_owned();
    blocking(move || {
        OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| file.set_len(length))
            .map_err(FsError::at("shorten", &path))
    })
    .await
}

/// What is known about a part file's chunks.
pub(crate) async fn record_of(path: &Path, chunk: u64) -> ChunkRecord {
    let path = sidecar(path, Sidecar::Chunks);
    let text = tokio::fs::read_to_string(&path).await.unwrap_or_default();
    ChunkRecord::parse(&text, chunk).unwrap_or_else(|| ChunkRecord::new(chunk))
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
        assert!(sidecar(&path, Sidecar::Chunks).exists());
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
        for kind in Sidecar::ALL {
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

    /// 25 bytes in chunks of ten, as a transfer that was given up leaves them.
    async fn left(path: &Path) {
        let mut part = PartFile::open_in_chunks(path, 10).await.unwrap();
        part.write(b"0123456789abcdefghijABCDE").await.unwrap();
        part.flush().await.unwrap();
    }

    #[tokio::test]
    async fn bytes_that_are_not_those_that_arrived_are_found_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.part");
        for (at, damaged, size) in [(3, vec![0], 25), (19, vec![1], 25), (20, vec![], 20)] {
            let _ = std::fs::remove_file(&path);
            remove_sidecars(&path).unwrap();
            left(&path).await;
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[at] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            let part = PartFile::open_in_chunks(&path, 10).await.unwrap();
            // Of the chunk that was growing nothing is kept.
            assert_eq!((part.damaged(), part.size()), (damaged, size), "{at}");
        }
    }

    #[tokio::test]
    async fn what_nothing_is_known_about_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.part");
        left(&path).await;
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], b"torn"].concat()).unwrap();
        let part = PartFile::open_in_chunks(&path, 10).await.unwrap();
        assert_eq!((part.size(), part.damaged()), (25, vec![]));
        drop(part);
        // Shorter than what is known: as after a crash of the machine.
        std::fs::write(&path, &whole[..17]).unwrap();
        let part = PartFile::open_in_chunks(&path, 10).await.unwrap();
        assert_eq!(part.size(), 10);
        assert_eq!(part.complete().await.unwrap().0, sha256_bytes(&whole[..10]));
    }

    #[tokio::test]
    async fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("x.part"), dir.path().join("other"));
        std::fs::write(&other, "somebody's").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(PartFile::open(&path).await.is_err());
        assert_eq!(std::fs::read(&other).unwrap(), b"somebody's");
    }
}
