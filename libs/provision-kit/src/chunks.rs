//! The digests of a part file's chunks, written down while the bytes arrive.
//!
//! ```text
//! chunks 8388608          the size of a chunk
//! 0 8388608 <sha256>      which chunk, how many bytes of it, their digest
//! 1 8388608 <sha256>
//! 2 1204224 <sha256>      the last one grows: of two lines for a chunk the later counts
//! ```
//!
//! A line is appended after its bytes were written. After a crash a line may
//! be there without its bytes, or torn, or missing: then the digest does not
//! fit, the line is no line, or the bytes have none; in each case they are
//! fetched again. What these digests can tell is whether the bytes on disk are
//! those that arrived. Whether those were the right ones only the digest of
//! the whole file can tell.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use llama_orch_types::Digest;

/// Bytes in one chunk, unless a test says otherwise.
pub const CHUNK: u64 = 8 * 1024 * 1024;

/// What is known about the chunks of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ChunkRecord {
    /// Bytes in one chunk.
    chunk: u64,
    known: BTreeMap<u64, (u64, Digest)>,
}

impl ChunkRecord {
    pub(crate) fn new(chunk: u64) -> Self {
        Self {
            chunk: chunk.max(1),
            known: BTreeMap::new(),
        }
    }

    /// Reads what was written down; nothing of it if it is about chunks of
    /// another size. The first line that is none ends it.
    pub(crate) fn parse(text: &str, chunk: u64) -> Option<Self> {
        let mut record = Self::new(chunk);
        let mut lines = text.split_inclusive('\n');
        if lines.next()? != record.head() {
            return None;
        }
        for line in lines {
            let Some((index, length, digest)) = parse_line(line) else {
                break;
            };
            if length == 0 || length > record.chunk {
                break;
            }
            record.known.insert(index, (length, digest));
        }
        Some(record)
    }

    pub(crate) fn head(&self) -> String {
        format!("chunks {}\n", self.chunk)
    }

    /// Everything, as it is written down.
    pub(crate) fn text(&self) -> String {
        let mut text = self.head();
        for (index, (length, digest)) in &self.known {
            // Writing to a text never fails.
            let _ = writeln!(text, "{index} {length} {}", digest.hex());
        }
        text
    }

    /// Notes a chunk; the line to append.
    pub(crate) fn add(&mut self, index: u64, length: u64, digest: Digest) -> String {
        self.known.insert(index, (length, digest));
        format!("{index} {length} {}\n", digest.hex())
    }

    pub(crate) fn get(&self, index: u64) -> Option<(u64, Digest)> {
        self.known.get(&index).copied()
    }

    /// Where a chunk lies.
    pub(crate) fn range(&self, index: u64) -> Range<u64> {
        let start = index.saturating_mul(self.chunk);
        let length = self.get(index).map_or(self.chunk, |(length, _)| length);
        start..start.saturating_add(length)
    }

    pub(crate) fn size(&self) -> u64 {
        self.chunk
    }
}

fn parse_line(line: &str) -> Option<(u64, u64, Digest)> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let index = words.next()?.parse().ok()?;
    let length = words.next()?.parse().ok()?;
    let digest = words.next()?;
    let whole = digest.len() == 64 && words.next().is_none();
    Some((index, length, digest.parse().ok().filter(|_| whole)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::sha256_bytes;
    use proptest::prelude::*;

    #[test]
    fn the_later_line_counts_and_other_sizes_do_not() {
        let (one, two) = (sha256_bytes(b"1"), sha256_bytes(b"2"));
        let mut record = ChunkRecord::new(10);
        let lines = [record.head(), record.add(1, 4, one), record.add(1, 10, two)];
        let read = ChunkRecord::parse(&lines.concat(), 10).unwrap();
        assert_eq!(read.get(1), Some((10, two)));
        assert_eq!((read.range(1), read.range(2)), (10..20, 20..30));
        assert_eq!(ChunkRecord::parse(&lines.concat(), 11), None);
    }

    proptest! {
        #[test]
        fn a_torn_or_spoilt_record_only_knows_less(
            lengths in prop::collection::vec(1u64..=10, 0..8),
            cut in any::<prop::sample::Index>(),
            noise in "[ -~\n]{0,40}",
        ) {
            let mut record = ChunkRecord::new(10);
            for (index, length) in (0..).zip(&lengths) {
                record.add(index, *length, sha256_bytes(&[*length as u8]));
            }
            let text = record.text();
            prop_assert_eq!(ChunkRecord::parse(&text, 10), Some(record.clone()));
            let torn = &text[..cut.index(text.len())];
            if let Some(read) = ChunkRecord::parse(torn, 10) {
                prop_assert!(read.known.iter().all(|(index, known)| record.known.get(index) == Some(known)));
            }
            // Whatever stands there, no chunk is longer than a chunk.
            let mut spoilt = torn.to_owned();
            spoilt.push_str(&noise);
            if let Some(read) = ChunkRecord::parse(&spoilt, 10) {
                prop_assert!(read.known.values().all(|(length, _)| (1..=10).contains(length)));
            }
        }
    }
}
