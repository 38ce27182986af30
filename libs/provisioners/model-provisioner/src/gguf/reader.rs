//! Reads the header's little-endian pieces, and counts.

use std::io::{self, BufRead, Read};

use super::GgufError;

/// Longest key or tensor name. The format allows 65,535 bytes.
const MAX_KEY: u64 = 65_535;

/// Longest header. Vocabularies of a million words take a tenth of it; a file
/// of nothing, made large, would otherwise be read to its end.
pub(super) const MAX_HEADER: u64 = 512 * 1024 * 1024;

/// Arrays within arrays within …: nobody goes deeper than this.
const MAX_DEPTH: u32 = 4;

/// A value, as far as anybody here asks.
#[derive(Debug, PartialEq)]
pub(super) enum Scalar {
    Unsigned(u64),
    Text(String),
    /// Stepped over.
    Other,
}

pub(super) struct HeaderReader<R> {
    input: R,
    position: u64,
    /// The file's length: nothing lies beyond.
    size: u64,
    /// What the header may take.
    limit: u64,
}

impl<R: BufRead> HeaderReader<R> {
    pub(super) fn new(input: R, size: u64, limit: u64) -> Self {
        Self {
            input,
            position: 0,
            size,
            limit,
        }
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// The first four bytes; fewer, filled up, if there are no more.
    pub(super) fn start(&mut self) -> Result<[u8; 4], GgufError> {
        if self.size < 4 {
            let mut start = Vec::new();
            (&mut self.input)
                .take(4)
                .read_to_end(&mut start)
                .map_err(GgufError::Read)?;
            return Err(GgufError::NotGguf {
                start: String::from_utf8_lossy(&start).escape_debug().collect(),
            });
        }
        self.bytes()
    }

    fn bytes<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        self.claim(N as u64)?;
        let mut bytes = [0; N];
        self.input
            .read_exact(&mut bytes)
            .map_err(|error| self.failed(error))?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, GgufError> {
        self.bytes().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, GgufError> {
        self.bytes().map(u64::from_le_bytes)
    }

    /// A key or a tensor's name.
    pub(super) fn key(&mut self) -> Result<String, GgufError> {
        let length = self.u64()?;
        if length > MAX_KEY {
            return Err(GgufError::Malformed("a key is longer than 65,535 bytes"));
        }
        self.text(length)
    }

    /// A typed value; a text longer than `max_text` is stepped over.
    pub(super) fn value(&mut self, max_text: u64) -> Result<Scalar, GgufError> {
        let kind = self.u32()?;
        Ok(match kind {
            0 => Scalar::Unsigned(u64::from(self.bytes::<1>()?[0])),
            1 => signed(i64::from(i8::from_le_bytes(self.bytes()?))),
            2 => Scalar::Unsigned(u64::from(u16::from_le_bytes(self.bytes()?))),
            3 => signed(i64::from(i16::from_le_bytes(self.bytes()?))),
            4 => Scalar::Unsigned(u64::from(self.u32()?)),
            5 => signed(i64::from(i32::from_le_bytes(self.bytes()?))),
            10 => Scalar::Unsigned(self.u64()?),
            11 => signed(i64::from_le_bytes(self.bytes()?)),
            8 => {
                let length = self.u64()?;
                if length > max_text {
                    self.skip(length)?;
                    Scalar::Other
                } else {
                    Scalar::Text(self.text(length)?)
                }
            }
            9 => {
                self.skip_array(0)?;
                Scalar::Other
            }
            other => {
                self.skip(fixed_size(other)?)?;
                Scalar::Other
            }
        })
    }

    fn skip_array(&mut self, depth: u32) -> Result<(), GgufError> {
        if depth == MAX_DEPTH {
            return Err(GgufError::Malformed("its arrays are nested too deeply"));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        match kind {
            // Each text and each array takes bytes, so these loops end with the file.
            8 => self.skip_texts(count),
            9 => (0..count).try_for_each(|_| self.skip_array(depth + 1)),
            fixed => {
                let bytes = fixed_size(fixed)?
                    .checked_mul(count)
                    .ok_or(GgufError::HeaderCut { size: self.size })?;
                self.skip(bytes)
            }
        }
    }

    /// A vocabulary is a hundred thousand short texts, and an engine waits for it: those
    /// that lie in the buffer are stepped over there.
    fn skip_texts(&mut self, count: u64) -> Result<(), GgufError> {
        let mut left = count;
        while left > 0 {
            let buffer = self.input.fill_buf().map_err(GgufError::Read)?;
            let mut used = 0;
            while left > 0
                && let Some(length) = buffer[used..].first_chunk()
                && let Ok(length) = usize::try_from(u64::from_le_bytes(*length))
                && let Some(end) = length.checked_add(used + size_of::<u64>())
                && end <= buffer.len()
            {
                used = end;
                left -= 1;
            }
            self.claim(used as u64)?;
            self.input.consume(used);
            if left > 0 {
                // It goes on beyond the buffer.
                let length = self.u64()?;
                self.skip(length)?;
                left -= 1;
            }
        }
        Ok(())
    }

    /// Text of a length that the caller has bounded. Bytes that are no UTF-8
    /// are replaced.
    fn text(&mut self, length: u64) -> Result<String, GgufError> {
        self.claim(length)?;
        let mut bytes = Vec::new();
        let read = (&mut self.input)
            .take(length)
            .read_to_end(&mut bytes)
            .map_err(GgufError::Read)?;
        if (read as u64) < length {
            return Err(GgufError::HeaderCut { size: self.size });
        }
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn skip(&mut self, length: u64) -> Result<(), GgufError> {
        self.claim(length)?;
        let mut left = usize::try_from(length).unwrap_or(usize::MAX);
        while left > 0 {
            let here = match self.input.fill_buf() {
                Ok(buffer) => buffer.len().min(left),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(GgufError::Read(error)),
            };
            if here == 0 {
                return Err(GgufError::HeaderCut { size: self.size });
            }
            self.input.consume(here);
            left -= here;
        }
        Ok(())
    }

    /// Moves the position on, if the file has that many bytes.
    fn claim(&mut self, length: u64) -> Result<(), GgufError> {
        let cut = GgufError::HeaderCut { size: self.size };
        match self.position.checked_add(length) {
            Some(position) if position <= self.size => {
                if position > self.limit {
                    return Err(GgufError::Malformed("it has no end within reason"));
                }
                self.position = position;
                Ok(())
            }
            _ => Err(cut),
        }
    }

    fn failed(&self, error: io::Error) -> GgufError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            GgufError::HeaderCut { size: self.size }
        } else {
            GgufError::Read(error)
        }
    }
}

fn signed(number: i64) -> Scalar {
    u64::try_from(number).map_or(Scalar::Other, Scalar::Unsigned)
}

/// Bytes of a value that is neither text nor array.
fn fixed_size(kind: u32) -> Result<u64, GgufError> {
    Ok(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => {
            return Err(GgufError::Malformed(
                "a value is of a kind that no GGUF version knows",
            ));
        }
    })
}
