//! A part file on disk: bytes are appended, hashed, and written down chunk by
//! chunk; what is there already is compared with what was written down.
//!
//! Everything here blocks.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{Sidecar, sidecar};
use crate::chunks::ChunkRecord;
use crate::fs::{FsError, create_dir_all, finish};

/// The file, and what is known about what is in it.
#[derive(Debug)]
pub(super) struct OnDisk {
    pub(super) file: File,
    pub(super) hasher: Sha256,
    pub(super) size: u64,
    pub(super) record: ChunkRecord,
    /// Where the record is written down; made with its first line.
    notes: Option<File>,
    notes_path: PathBuf,
    /// The chunk that is growing: its digest so far, and its bytes.
    growing: (Sha256, u64),
    pub(super) damaged: Vec<u64>,
    /// Whether all that was there when it was opened was compared with what was written down.
    pub(super) is_known: bool,
}

impl OnDisk {
    pub(super) fn open(path: &Path, chunk: u64) -> Result<Self, FsError> {
        if let Some(parent) = path.parent() {
            create_dir_all(parent)?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            // Nobody's other file is written through a link.
            .custom_flags(nix::libc::O_NOFOLLOW)
            .open(path)
            .map_err(FsError::at("open", path))?;
        let notes_path = sidecar(path, Sidecar::Chunks);
        let known = std::fs::read_to_string(&notes_path)
            .ok()
            .and_then(|text| ChunkRecord::parse(&text, chunk));
        let mut on_disk = Self {
            file,
            hasher: Sha256::new(),
            size: 0,
            record: ChunkRecord::new(chunk),
            notes: None,
            notes_path,
            growing: (Sha256::new(), 0),
            damaged: Vec::new(),
            is_known: known.is_some(),
        };
        on_disk
            .take_stock(known.as_ref())
            .map_err(FsError::at("read", path))?;
        on_disk.is_known |= on_disk.size == 0;
        Ok(on_disk)
    }

    /// Reads what is there and compares it with what is known. Without any
    /// knowledge all of it is taken; the whole file's digest will tell.
    fn take_stock(&mut self, known: Option<&ChunkRecord>) -> std::io::Result<()> {
        let chunk = self.record.size();
        let mut bytes = Vec::new();
        for index in 0.. {
            let expected = match known {
                Some(known) => match known.get(index) {
                    Some(expected) => Some(expected),
                    None => break,
                },
                None => None,
            };
            let length = expected.map_or(chunk, |(length, _)| length);
            bytes.clear();
            (&mut self.file).take(length).read_to_end(&mut bytes)?;
            let digest = crate::fs::sha256_bytes(&bytes);
            let cut = expected.is_some_and(|_| (bytes.len() as u64) < length);
            let other = expected.is_some_and(|(_, expected)| expected != digest);
            // Of a chunk that was still growing nothing is worth a repair.
            if bytes.is_empty() || cut || other && length < chunk {
                break;
            }
            if other {
                self.damaged.push(index);
            }
            self.hasher.update(&bytes);
            self.size += bytes.len() as u64;
            let true_digest = expected.map_or(digest, |(_, expected)| expected);
            self.record.add(index, bytes.len() as u64, true_digest);
            if (bytes.len() as u64) < chunk {
                self.growing = (Sha256::new_with_prefix(&bytes), bytes.len() as u64);
                break;
            }
        }
        self.file.set_len(self.size)?;
        self.file.seek(SeekFrom::Start(self.size))?;
        // What was dropped must not come back as known.
        if self.size > 0 {
            crate::fs::write_atomic(&self.notes_path, self.record.text().as_bytes())
                .map_err(|error| error.source)?;
        }
        Ok(())
    }

    pub(super) fn append(&mut self, mut bytes: &[u8]) -> std::io::Result<()> {
        let chunk = self.record.size();
        while !bytes.is_empty() {
            let room = usize::try_from(chunk - self.growing.1).unwrap_or(usize::MAX);
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            self.file.write_all(piece)?;
            self.hasher.update(piece);
            self.growing.0.update(piece);
            self.growing.1 += piece.len() as u64;
            self.size += piece.len() as u64;
            if self.growing.1 == chunk {
                self.note()?;
            }
            bytes = rest;
        }
        Ok(())
    }

    /// Writes down the digest of the chunk that is growing, and begins the
    /// next one if it is whole.
    fn note(&mut self) -> std::io::Result<()> {
        let (hasher, length) = self.growing.clone();
        if length == 0 {
            return Ok(());
        }
        let chunk = self.record.size();
        let index = (self.size - length) / chunk;
        let digest = finish(hasher);
        if self.record.get(index) == Some((length, digest)) {
            return Ok(());
        }
        let line = self.record.add(index, length, digest);
        if length == chunk {
            self.growing = (Sha256::new(), 0);
        }
        if let Some(notes) = &mut self.notes {
            return notes.write_all(line.as_bytes());
        }
        let mut notes = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&self.notes_path)?;
        if notes.metadata()?.len() == 0 {
            notes.write_all(self.record.text().as_bytes())?;
        } else {
            notes.write_all(line.as_bytes())?;
        }
        self.notes = Some(notes);
        Ok(())
    }
}

impl Drop for OnDisk {
    /// So that a transfer that is given up keeps its last bytes, too.
    fn drop(&mut self) {
        if let Err(error) = self.note() {
            tracing::debug!(path = %self.notes_path.display(), %error, "the last bytes of a download will be fetched again");
        }
    }
}
