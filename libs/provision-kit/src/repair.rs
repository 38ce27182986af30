//! Mending a part file instead of fetching all of it again.
//!
//! Only the digest of the whole file is trusted. When it does not come out,
//! two things can be found out:
//!
//! ```text
//! on disk ≠ as it arrived    those chunks are fetched again, by Range, and taken
//!                            only if they are what arrived then
//! wrong when they arrived    everything is read a second time; chunks that differ
//!                            are replaced; if the whole is still wrong, a third
//!                            reading of those chunks alone decides each by two to one
//! ```
//!
//! So a byte that is flipped on disk costs one chunk, and one that is flipped
//! on its way one more pass at most. Then the file is refused: there is no
//! further round.

use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use llama_orch_types::Digest;

use crate::blocking::blocking;
use crate::chunks::ChunkRecord;
use crate::fs::{FsError, sha256_bytes, sha256_file};
use crate::part::{PartFile, record_of, replace_chunk, truncate};
use crate::progress::Step;

/// With more chunks than this that differ between two transfers, a third one
/// would not agree with either.
const MOST_DIFFERENCES: usize = 64;

/// What a source answers to a request for a part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// All of it was handed on.
    Sent,
    /// It does not serve parts, or not this one.
    NoSuchPart,
}

/// A source whose bytes can be read again.
pub trait Reread {
    type Error: From<FsError> + Send;

    /// Hands the file's bytes within the range to the sink. Bytes beyond its
    /// end are not looked at. May fail in the middle.
    fn read(
        &mut self,
        range: Range<u64>,
        sink: &mut Sink<'_>,
    ) -> impl Future<Output = Result<Reply, Self::Error>> + Send;

    /// Whether the same request may succeed a little later.
    fn may_pass(error: &Self::Error) -> bool;
}

/// Where bytes go that are read again.
#[derive(Debug)]
pub struct Sink<'a> {
    /// The next byte's place in the file.
    position: u64,
    end: u64,
    chunk: u64,
    /// The bytes since the last chunk's end, or since the start.
    pending: Vec<u8>,
    comparison: Option<Comparison<'a>>,
}

/// What is compared with what.
#[derive(Debug)]
struct Comparison<'a> {
    path: &'a Path,
    record: &'a mut ChunkRecord,
    differences: &'a mut Vec<Difference>,
    step: &'a mut Step,
}

/// A chunk that came differently the second time.
#[derive(Debug, Clone, Copy)]
struct Difference {
    index: u64,
    /// `None`: the first transfer had no such chunk.
    first: Option<Digest>,
    second: Digest,
}

impl Sink<'_> {
    /// Takes the next bytes.
    pub async fn take(&mut self, mut bytes: &[u8]) -> Result<(), FsError> {
        while !bytes.is_empty() && self.position < self.end {
            let chunk_end = (self.position / self.chunk + 1).saturating_mul(self.chunk);
            let room = chunk_end.min(self.end) - self.position;
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let (piece, rest) = bytes.split_at(room.min(bytes.len()));
            self.pending.extend_from_slice(piece);
            self.position += piece.len() as u64;
            bytes = rest;
            if self.comparison.is_some()
                && (self.position == self.end || self.position.is_multiple_of(self.chunk))
            {
                self.compare().await?;
            }
        }
        Ok(())
    }

    /// Whether everything that was asked for is here.
    pub fn is_full(&self) -> bool {
        self.position >= self.end
    }

    /// Whether it is about one chunk and not about the rest of the file.
    pub fn ends_early(&self) -> bool {
        self.comparison.is_none()
    }

    /// Bytes that are still to come.
    pub fn missing(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }

    async fn compare(&mut self) -> Result<(), FsError> {
        let Some(comparison) = &mut self.comparison else {
            return Ok(());
        };
        let bytes = std::mem::take(&mut self.pending);
        let start = self.position - bytes.len() as u64;
        let index = start / self.chunk;
        let (bytes, second) = blocking(move || {
            let digest = sha256_bytes(&bytes);
            Ok((bytes, digest))
        })
        .await?;
        let first = comparison.record.get(index);
        if first == Some((bytes.len() as u64, second)) {
            // Its room is used again.
            self.pending = bytes;
            self.pending.clear();
        } else {
            comparison.differences.push(Difference {
                index,
                first: first.map(|(_, digest)| digest),
                second,
            });
            comparison.record.add(index, bytes.len() as u64, second);
            replace_chunk(comparison.path, comparison.record, start, bytes).await?;
        }
        comparison.step.set(self.position, Some(self.end));
        Ok(())
    }
}

/// What became of a file with a wrong digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The part file is what it should be.
    Mended { size: u64 },
    /// It was read twice and came the same both times: it is another file.
    Same,
    /// These chunks came differently, and no choice among them is right.
    Differs { chunks: Vec<u64> },
}

/// How patiently a file is read again.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Readings in a row that bring nothing.
    pub attempts: u32,
    /// Between two of them.
    pub pause: Duration,
}

impl Patience {
    /// Counts a failure, and waits if another attempt is worth it; the error
    /// back if none is.
    pub(crate) async fn after<E>(
        self,
        error: E,
        may_pass: bool,
        failures: &mut u32,
    ) -> Result<(), E> {
        *failures += 1;
        if !may_pass || *failures >= self.attempts {
            return Err(error);
        }
        tokio::time::sleep(self.pause).await;
        Ok(())
    }
}

/// Opens a part file. Chunks that are on disk otherwise than they arrived are
/// fetched again; where that cannot be done, the file is cut off before them.
pub async fn open<S: Reread>(
    path: &Path,
    chunk: u64,
    patience: Patience,
    source: &mut S,
    step: &Step,
) -> Result<PartFile, S::Error> {
    let part = PartFile::open_in_chunks(path, chunk).await?;
    let damaged = part.damaged();
    let Some(first) = damaged.first().copied() else {
        return Ok(part);
    };
    step.note(format!(
        "{} of the chunks on disk are not what arrived; fetching them again",
        damaged.len()
    ));
    let wanted: Vec<_> = damaged
        .iter()
        .filter_map(|index| Some((*index, part.chunk(*index)?)))
        .collect();
    drop(part);
    let record = record_of(path, chunk).await;
    let mut cut_at = None;
    for (_, (range, digest)) in wanted {
        match read_part(source, range.clone(), chunk, patience).await? {
            Some(bytes) if sha256_bytes(&bytes) == digest => {
                replace_chunk(path, &record, range.start, bytes).await?;
            }
            _ => {
                cut_at = Some(range.start);
                break;
            }
        }
    }
    if let Some(length) = cut_at {
        step.note("they cannot be had any more; going on from before them");
        truncate(path, length).await?;
    }
    let part = PartFile::open_in_chunks(path, chunk).await?;
    if part.damaged().is_empty() {
        return Ok(part);
    }
    // A disk that does not keep what is written to it: the digest will tell.
    drop(part);
    truncate(path, first.saturating_mul(chunk)).await?;
    Ok(PartFile::open_in_chunks(path, chunk).await?)
}

/// Reads a complete file of a wrong digest again, as the module says. `size`
/// is its length as far as it is known.
pub async fn second_look<S: Reread>(
    path: &Path,
    (chunk, size): (u64, u64),
    expected: Digest,
    patience: Patience,
    source: &mut S,
    step: &mut Step,
) -> Result<Outcome, S::Error> {
    let mended = open(path, chunk, patience, source, step).await?;
    if mended.size() == size {
        // Something else than the bytes' way may have spoilt them.
        let (digest, size) = mended.complete().await?;
        if digest == expected {
            return Ok(Outcome::Mended { size });
        }
    } else {
        drop(mended);
    }
    let mut record = record_of(path, chunk).await;
    let mut differences = Vec::new();
    read_all(
        (path, size),
        (&mut record, &mut differences),
        patience,
        source,
        step,
    )
    .await?;
    truncate(path, size).await?;
    if digest_of(path).await? == expected {
        return Ok(Outcome::Mended { size });
    }
    if differences.is_empty() {
        return Ok(Outcome::Same);
    }
    let few = differences.len() <= MOST_DIFFERENCES;
    if few && decide(path, &mut record, &differences, patience, source).await? {
        let digest = digest_of(path).await?;
        if digest == expected {
            return Ok(Outcome::Mended { size });
        }
    }
    let chunks = differences.iter().map(|one| one.index).collect();
    Ok(Outcome::Differs { chunks })
}

/// Reads the whole file, and puts what differs in the place of what was there.
async fn read_all<S: Reread>(
    (path, size): (&Path, u64),
    (record, differences): (&mut ChunkRecord, &mut Vec<Difference>),
    patience: Patience,
    source: &mut S,
    step: &mut Step,
) -> Result<(), S::Error> {
    let chunk = record.size();
    let mut from = 0;
    // Of a source that always begins anew only what lies beyond is progress.
    let mut furthest = 0;
    let mut failures = 0;
    while from < size {
        let mut sink = Sink {
            position: from,
            end: size,
            chunk,
            pending: Vec::new(),
            comparison: Some(Comparison {
                path,
                record,
                differences,
                step,
            }),
        };
        let result = source.read(from..size, &mut sink).await;
        // What came of a chunk that was cut comes again.
        let reached = sink.position - sink.pending.len() as u64;
        let reached = if sink.is_full() { size } else { reached };
        let progress = reached > furthest;
        if progress {
            furthest = reached;
            failures = 0;
        }
        match result {
            Ok(Reply::Sent) => from = reached,
            // From its start a file can always be read.
            Ok(Reply::NoSuchPart) => {
                failures += 1;
                if failures > patience.attempts {
                    break;
                }
                from = 0;
            }
            Err(error) => {
                let may_pass = S::may_pass(&error);
                if progress && may_pass {
                    tokio::time::sleep(patience.pause).await;
                } else {
                    patience.after(error, may_pass, &mut failures).await?;
                }
                from = reached;
            }
        }
    }
    Ok(())
}

/// Reads the chunks that differ a third time. False if a source serves no
/// parts of files.
async fn decide<S: Reread>(
    path: &Path,
    record: &mut ChunkRecord,
    differences: &[Difference],
    patience: Patience,
    source: &mut S,
) -> Result<bool, S::Error> {
    for difference in differences {
        let range = record.range(difference.index);
        let chunk = record.size();
        let Some(bytes) = read_part(source, range.clone(), chunk, patience).await? else {
            return Ok(false);
        };
        let third = sha256_bytes(&bytes);
        if Some(third) == difference.first && third != difference.second {
            record.add(difference.index, bytes.len() as u64, third);
            replace_chunk(path, record, range.start, bytes).await?;
        }
    }
    Ok(true)
}

/// The bytes of one chunk; `None` if the source serves no parts of files.
async fn read_part<S: Reread>(
    source: &mut S,
    range: Range<u64>,
    chunk: u64,
    patience: Patience,
) -> Result<Option<Vec<u8>>, S::Error> {
    let mut failures = 0;
    loop {
        let mut sink = Sink {
            position: range.start,
            end: range.end,
            chunk,
            pending: Vec::new(),
            comparison: None,
        };
        match source.read(range.clone(), &mut sink).await {
            Ok(Reply::Sent) if sink.is_full() => return Ok(Some(sink.pending)),
            Ok(_) => return Ok(None),
            Err(error) => {
                let may_pass = S::may_pass(&error);
                patience.after(error, may_pass, &mut failures).await?;
            }
        }
    }
}

async fn digest_of(path: &Path) -> Result<Digest, FsError> {
    let path = path.to_owned();
    blocking(move || sha256_file(&path).map(|(digest, _)| digest)).await
}
