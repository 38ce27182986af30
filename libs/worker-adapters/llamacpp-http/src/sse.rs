//! Server-sent events out of bytes, whatever the bytes are.
//!
//! Events are found in place: where an event's data lies in one piece of what was
//! read, it is handed out as a part of that piece and nothing is copied. Lines may
//! end in LF, CR or CR LF, and memory is bounded by limits on lines and events.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf, Bytes};
use bytestring::ByteString;
use futures::{Stream, StreamExt};
use memchr::{memchr, memchr2};

const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// The most that a stream may make us hold, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct SseLimits {
    pub line_bytes: usize,
    /// All lines of one event together.
    pub event_bytes: usize,
}

impl Default for SseLimits {
    /// Roomy: an engine's last event may repeat the whole prompt.
    fn default() -> Self {
        Self {
            line_bytes: 16 << 20,
            event_bytes: 16 << 20,
        }
    }
}

/// Why bytes are no stream of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a line has more than {limit} bytes")]
    LineTooLong { limit: usize },
    #[error("an event has more than {limit} bytes")]
    EventTooLong { limit: usize },
    #[error("a line is not valid UTF-8")]
    NotUtf8,
}

/// Why a stream of events cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum SseError<E> {
    #[error("the stream of bytes broke")]
    Transport(#[source] E),
    #[error(transparent)]
    Malformed(Malformed),
}

/// One complete event. Its texts may be parts of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SseEvent {
    /// Its `event:` field, if it has one.
    pub name: Option<ByteString>,
    /// Its `data:` fields, joined by line feeds.
    pub data: ByteString,
}

/// The `data` of every complete event, in order, as [`events`] reads them.
pub fn event_data<S, E>(
    bytes: S,
    limits: SseLimits,
) -> impl Stream<Item = Result<ByteString, SseError<E>>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    events(bytes, limits).map(|event| event.map(|event| event.data))
}

/// Every complete event, in order. Comments and other fields are passed over; an
/// event cut off by the end of the stream is none. The first error is the last
/// item.
pub fn events<S, E>(
    bytes: S,
    limits: SseLimits,
) -> impl Stream<Item = Result<SseEvent, SseError<E>>>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    Events {
        bytes: Some(bytes),
        splitter: EventSplitter::new(limits),
    }
}

/// A splitter and what it is fed from.
struct Events<S> {
    /// Gone after the stream's end or the first error.
    bytes: Option<S>,
    splitter: EventSplitter,
}

impl<S, E> Stream for Events<S>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
{
    type Item = Result<SseEvent, SseError<E>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        while let Some(bytes) = &mut this.bytes {
            let failure = match this.splitter.next_event() {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Err(malformed) => SseError::Malformed(malformed),
                Ok(None) => match std::task::ready!(bytes.poll_next_unpin(context)) {
                    Some(Ok(chunk)) => {
                        this.splitter.push(chunk);
                        continue;
                    }
                    Some(Err(error)) => SseError::Transport(error),
                    None => break,
                },
            };
            this.bytes = None;
            return Poll::Ready(Some(Err(failure)));
        }
        this.bytes = None;
        Poll::Ready(None)
    }
}

/// The `data` fields of the event that is being read.
#[derive(Debug)]
enum Data {
    None,
    /// The usual case.
    One(ByteString),
    Several(String),
}

/// Finds events in the pieces of a stream. Holds one piece, one unfinished line and
/// the fields of one unfinished event.
#[derive(Debug)]
pub(crate) struct EventSplitter {
    limits: SseLimits,
    /// What is left of the latest piece.
    rest: Bytes,
    /// The beginning of a line that goes on in the next piece.
    unfinished: Vec<u8>,
    /// Of all lines since the last empty one.
    event_bytes: usize,
    first_line: bool,
    /// An LF that comes next belongs to the CR before it.
    after_cr: bool,
    name: Option<ByteString>,
    data: Data,
}

impl EventSplitter {
    pub(crate) fn new(limits: SseLimits) -> Self {
        Self {
            limits,
            rest: Bytes::new(),
            unfinished: Vec::new(),
            event_bytes: 0,
            first_line: true,
            after_cr: false,
            name: None,
            data: Data::None,
        }
    }

    /// Takes the next piece, once [`Self::next_event`] has nothing left in the one
    /// before.
    pub(crate) fn push(&mut self, piece: Bytes) {
        debug_assert!(self.rest.is_empty(), "a piece is passed over");
        self.rest = piece;
    }

    /// The next event in the latest piece; `None` when another piece is needed.
    /// After an error nothing more is to be asked.
    pub(crate) fn next_event(&mut self) -> Result<Option<SseEvent>, Malformed> {
        while !self.rest.is_empty() {
            if std::mem::take(&mut self.after_cr) && self.rest[0] == b'\n' {
                self.rest.advance(1);
                continue;
            }
            let Some(end) = memchr2(b'\n', b'\r', &self.rest) else {
                self.check_line(self.unfinished.len() + self.rest.len())?;
                self.unfinished.extend_from_slice(&self.rest);
                break;
            };
            self.after_cr = self.rest[end] == b'\r';
            let over = if self.unfinished.is_empty() && !self.first_line {
                self.line_in_place(end)?
            } else {
                self.line_in_pieces(end)?
            };
            self.rest.advance(end + 1);
            if over && let Some(event) = self.dispatch() {
                self.release();
                return Ok(Some(event));
            }
        }
        self.rest = Bytes::new();
        Ok(None)
    }

    /// Lets go of a piece that has been read to its end, so that its memory can be
    /// used again as soon as its events are.
    fn release(&mut self) {
        if self.rest.is_empty() {
            self.rest = Bytes::new();
        }
    }

    fn check_line(&self, bytes: usize) -> Result<(), Malformed> {
        let limit = self.limits.line_bytes;
        if bytes > limit {
            return Err(Malformed::LineTooLong { limit });
        }
        Ok(())
    }

    /// Takes note of a line's length; whether it is empty and so ends an event.
    fn count_line(&mut self, bytes: usize) -> Result<bool, Malformed> {
        if bytes == 0 {
            self.event_bytes = 0;
            return Ok(true);
        }
        self.event_bytes += bytes;
        let limit = self.limits.event_bytes;
        if self.event_bytes > limit {
            return Err(Malformed::EventTooLong { limit });
        }
        Ok(false)
    }

    /// A line that is the first `end` bytes of the piece; whether it ends an event.
    fn line_in_place(&mut self, end: usize) -> Result<bool, Malformed> {
        self.check_line(end)?;
        if self.count_line(end)? {
            return Ok(true);
        }
        match Field::of(&self.rest[..end]) {
            Field::Data(start) => {
                let value = text(self.rest.slice(start..end))?;
                self.add_data(value);
            }
            Field::Name(start) => self.name = Some(text(self.rest.slice(start..end))?),
            Field::Other => check_text(&self.rest[..end])?,
        }
        Ok(false)
    }

    /// A line that has begun in an earlier piece, or is the stream's first.
    fn line_in_pieces(&mut self, end: usize) -> Result<bool, Malformed> {
        self.check_line(self.unfinished.len() + end)?;
        let mut line = std::mem::take(&mut self.unfinished);
        line.extend_from_slice(&self.rest[..end]);
        let mut line = Bytes::from(line);
        if std::mem::take(&mut self.first_line) && line.starts_with(BYTE_ORDER_MARK) {
            line.advance(BYTE_ORDER_MARK.len());
        }
        if self.count_line(line.len())? {
            return Ok(true);
        }
        match Field::of(&line) {
            Field::Data(start) => {
                line.advance(start);
                self.add_data(text(line)?);
            }
            Field::Name(start) => {
                line.advance(start);
                self.name = Some(text(line)?);
            }
            Field::Other => check_text(&line)?,
        }
        Ok(false)
    }

    fn add_data(&mut self, value: ByteString) {
        self.data = match std::mem::replace(&mut self.data, Data::None) {
            Data::None => Data::One(value),
            Data::One(first) => Data::Several([&*first, &*value].join("\n")),
            Data::Several(mut lines) => {
                lines.push('\n');
                lines.push_str(&value);
                Data::Several(lines)
            }
        };
    }

    /// The event that an empty line has ended; one without data is none.
    fn dispatch(&mut self) -> Option<SseEvent> {
        let name = self.name.take();
        let data = match std::mem::replace(&mut self.data, Data::None) {
            Data::None => return None,
            Data::One(data) => data,
            Data::Several(lines) => lines.into(),
        };
        // What an event is called that names itself not.
        let name = name.filter(|name| !matches!(&**name, "" | "message"));
        Some(SseEvent { name, data })
    }
}

/// What a line that is not empty holds, and where its value begins.
enum Field {
    Data(usize),
    Name(usize),
    /// A comment, or a field that means nothing to us.
    Other,
}

impl Field {
    fn of(line: &[u8]) -> Self {
        let colon = if line.starts_with(b"data:") {
            4
        } else {
            memchr(b':', line).unwrap_or(line.len())
        };
        let value = match line.get(colon + 1) {
            Some(b' ') => colon + 2,
            Some(_) => colon + 1,
            None => line.len(),
        };
        match &line[..colon] {
            b"data" => Self::Data(value),
            b"event" => Self::Name(value),
            _ => Self::Other,
        }
    }
}

fn text(bytes: Bytes) -> Result<ByteString, Malformed> {
    ByteString::try_from(bytes).map_err(|_| Malformed::NotUtf8)
}

fn check_text(bytes: &[u8]) -> Result<(), Malformed> {
    match std::str::from_utf8(bytes) {
        Ok(_) => Ok(()),
        Err(_) => Err(Malformed::NotUtf8),
    }
}

#[cfg(test)]
#[path = "sse_tests.rs"]
mod tests;
