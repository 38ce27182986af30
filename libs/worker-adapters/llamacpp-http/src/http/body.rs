//! Taking the framing off an answer's body. Pure: bytes in, bytes out.

use bytes::{Buf, Bytes, BytesMut};
use memchr::memchr;

use super::HttpError;

/// The longest line that tells a chunk's size, in bytes.
const SIZE_LINE_LIMIT: usize = 4 << 10;
/// The most that may come after the last chunk, in bytes.
const TRAILER_LIMIT: usize = 64 << 10;

/// What of a body is still to come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Framing {
    Chunked(Chunked),
    /// So many bytes.
    Length(u64),
    /// All there is until the connection is closed.
    ToEnd,
}

/// What comes next in a body of chunks.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Chunked {
    Size,
    /// So many bytes of a chunk; with none left, the end of its line.
    Data(u64),
    /// Lines after the last chunk, of which there were so many bytes.
    Trailer(usize),
    Over,
}

impl Framing {
    pub(super) fn chunked() -> Self {
        Self::Chunked(Chunked::Size)
    }

    pub(super) fn length(bytes: u64) -> Self {
        Self::Length(bytes)
    }

    pub(super) fn to_end() -> Self {
        Self::ToEnd
    }

    /// Whether the whole body was taken.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Chunked(Chunked::Over) | Self::Length(0))
    }

    /// Whether the body may end where the connection does.
    pub(super) fn may_end(&self) -> bool {
        self.is_over() || *self == Self::ToEnd
    }

    /// Takes the next bytes of the body off the buffer's front, and what frames them;
    /// never none. `None` when more must be read first, or the body is over.
    pub(super) fn take(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, HttpError> {
        match self {
            Self::Chunked(chunked) => chunked.take(buffer),
            Self::Length(left) => Ok(take_up_to(left, buffer)),
            Self::ToEnd => {
                let mut all = u64::MAX;
                Ok(take_up_to(&mut all, buffer))
            }
        }
    }
}

impl Chunked {
    fn take(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, HttpError> {
        loop {
            match self {
                Self::Size => match take_line(buffer, SIZE_LINE_LIMIT)? {
                    None => return Ok(None),
                    Some(line) => {
                        let size = chunk_size(&buffer[..line])?;
                        buffer.advance(line + 2);
                        *self = match size {
                            0 => Self::Trailer(0),
                            size => Self::Data(size),
                        };
                    }
                },
                Self::Data(0) => match buffer.get(..2) {
                    None => return Ok(None),
                    Some(b"\r\n") => {
                        buffer.advance(2);
                        *self = Self::Size;
                    }
                    Some(_) => return Err(framing("a chunk is longer than it says")),
                },
                Self::Data(left) => return Ok(take_up_to(left, buffer)),
                Self::Trailer(seen) => match take_line(buffer, TRAILER_LIMIT - *seen)? {
                    None => return Ok(None),
                    Some(0) => {
                        buffer.advance(2);
                        *self = Self::Over;
                    }
                    Some(line) => {
                        buffer.advance(line + 2);
                        *seen = (*seen + line + 2).min(TRAILER_LIMIT);
                    }
                },
                Self::Over => return Ok(None),
            }
        }
    }
}

fn framing(what: &'static str) -> HttpError {
    HttpError::Framing { what }
}

/// At most `left` bytes, which it is lowered by.
fn take_up_to(left: &mut u64, buffer: &mut BytesMut) -> Option<Bytes> {
    let most = usize::try_from(*left).unwrap_or(usize::MAX);
    let bytes = most.min(buffer.len());
    if bytes == 0 {
        return None;
    }
    *left -= bytes as u64;
    Some(buffer.split_to(bytes).freeze())
}

/// The length of the line at the buffer's front, without its CR LF.
fn take_line(buffer: &BytesMut, limit: usize) -> Result<Option<usize>, HttpError> {
    let within = &buffer[..buffer.len().min(limit)];
    match memchr(b'\n', within) {
        Some(end) if end > 0 && within[end - 1] == b'\r' => Ok(Some(end - 1)),
        Some(_) => Err(framing("a line ends without a CR")),
        None if within.len() == limit => Err(framing("a line is too long")),
        None => Ok(None),
    }
}

/// The number before what may follow it in its line.
fn chunk_size(line: &[u8]) -> Result<u64, HttpError> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit());
    let (mut size, mut count) = (0, 0);
    for &digit in digits {
        let digit = (digit as char).to_digit(16).unwrap_or_default();
        size = size << 4 | u64::from(digit);
        count += 1;
    }
    let follows = line.get(count);
    if !(1..=16).contains(&count) || !matches!(follows, None | Some(b';' | b' ' | b'\t')) {
        return Err(framing("a chunk's size is no number"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The body read in pieces of `read` bytes, whether it is over, and what was wrong.
    fn taken(mut framing: Framing, bytes: &[u8], read: usize) -> (Vec<u8>, bool, Option<String>) {
        let (mut buffer, mut body) = (BytesMut::new(), Vec::new());
        for piece in bytes.chunks(read.max(1)) {
            buffer.extend_from_slice(piece);
            loop {
                match framing.take(&mut buffer) {
                    Ok(Some(bytes)) => {
                        assert!(!bytes.is_empty());
                        body.extend_from_slice(&bytes);
                    }
                    Ok(None) => break,
                    Err(error) => return (body, false, Some(error.to_string())),
                }
            }
            let held = buffer.len();
            assert!(framing.is_over() || held <= TRAILER_LIMIT, "{held} held");
        }
        (body, framing.is_over(), None)
    }

    #[test]
    fn chunks_are_put_together() {
        let bytes = b"5\r\nhello\r\n1;a=b\r\n \r\n00a \r\n0123456789\r\n0\r\nA: b\r\n\r\nrest";
        for read in 1..bytes.len() {
            let (body, over, error) = taken(Framing::chunked(), bytes, read);
            assert_eq!((&body[..], over), (&b"hello 0123456789"[..], true));
            assert_eq!(error, None);
        }
    }

    #[test]
    fn what_is_no_chunk_is_an_error() {
        for bad in [
            "x\r\n",
            "\r\n",
            "-1\r\n",
            "5\nhello",
            "1\r\nabc",
            "11111111111111111\r\n",
            "1g\r\n",
        ] {
            let (_, _, error) = taken(Framing::chunked(), bad.as_bytes(), 3);
            assert!(error.is_some(), "{bad}");
        }
        let long = format!("1;{}", "x".repeat(SIZE_LINE_LIMIT));
        assert!(taken(Framing::chunked(), long.as_bytes(), 1).2.is_some());
        let trailers = format!("0\r\n{}", "a: b\r\n".repeat(TRAILER_LIMIT));
        assert!(
            taken(Framing::chunked(), trailers.as_bytes(), 99)
                .2
                .is_some()
        );
    }

    #[test]
    fn a_body_is_as_long_as_it_says() {
        let (body, over, _) = taken(Framing::length(3), b"hello", 2);
        assert_eq!((&body[..], over), (&b"hel"[..], true));
        let (body, over, _) = taken(Framing::to_end(), b"hello", 2);
        assert_eq!((&body[..], over), (&b"hello"[..], false));
        assert!(Framing::to_end().may_end() && !Framing::length(1).may_end());
    }

    proptest! {
        #[test]
        fn any_chunks_in_any_reads_give_the_body(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..40), 0..8),
            read in 1usize..60,
        ) {
            let mut bytes = Vec::new();
            for chunk in &chunks {
                bytes.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                bytes.extend_from_slice(chunk);
                bytes.extend_from_slice(b"\r\n");
            }
            bytes.extend_from_slice(b"0\r\n\r\n");
            let (body, over, error) = taken(Framing::chunked(), &bytes, read);
            prop_assert_eq!((body, over, error), (chunks.concat(), true, None));
        }

        #[test]
        fn random_bytes_never_panic_and_any_reads_are_alike(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), prop::sample::select(b"0123\r\n\r\n;a".to_vec())],
                0..200,
            ),
            read in 1usize..60,
        ) {
            let whole = taken(Framing::chunked(), &bytes, bytes.len());
            prop_assert_eq!(taken(Framing::chunked(), &bytes, read), whole);
        }
    }
}
