//! Server-sent events out of bytes, whatever the bytes are.
//!
//! `eventsource-stream` does the parsing. It may panic on a byte order mark,
//! takes quadratic time on long lines and on bytes that are not UTF-8, loses
//! the last event of a stream whose lines end in a bare CR, and has no size
//! limit. So a guard stands in front of it and hands it whole lines only: each
//! ends in one LF, is valid UTF-8, and is no longer than the limits allow.

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll};

use eventsource_stream::{EventStream, EventStreamError};
use futures::{Stream, StreamExt};

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

/// Why a stream of events cannot be read on.
#[derive(Debug, thiserror::Error)]
pub enum SseError<E> {
    #[error("the stream of bytes broke")]
    Transport(#[source] E),
    #[error("a line has more than {limit} bytes")]
    LineTooLong { limit: usize },
    #[error("an event has more than {limit} bytes")]
    EventTooLong { limit: usize },
    #[error("a line is not valid UTF-8")]
    NotUtf8,
    #[error("a line is no field of an event stream")]
    NotAField,
}

/// One complete event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SseEvent {
    /// Its `event:` field, if it has one.
    pub name: Option<String>,
    /// Its `data:` fields, joined by line feeds.
    pub data: String,
}

/// The `data` of every complete event, in order, as [`events`] reads them.
pub fn event_data<S, B, E>(
    bytes: S,
    limits: SseLimits,
) -> impl Stream<Item = Result<String, SseError<E>>>
where
    S: Stream<Item = Result<B, E>> + Unpin,
    B: AsRef<[u8]>,
{
    events(bytes, limits).map(|event| event.map(|event| event.data))
}

/// What the parser calls an event that names itself not.
const UNNAMED: &str = "message";

/// Every complete event, in order. Comments and other fields are passed over; an
/// event cut off by the end of the stream is none. The first error is the last
/// item.
pub fn events<S, B, E>(
    bytes: S,
    limits: SseLimits,
) -> impl Stream<Item = Result<SseEvent, SseError<E>>>
where
    S: Stream<Item = Result<B, E>> + Unpin,
    B: AsRef<[u8]>,
{
    let lines = WholeLines {
        bytes,
        splitter: LineSplitter::new(limits),
        ended: false,
        failure: None,
    };
    let events = EventStream::new(lines).map(|event| match event {
        Ok(event) => Ok(SseEvent {
            name: (event.event != UNNAMED).then_some(event.event),
            data: event.data,
        }),
        Err(EventStreamError::Transport(error)) => Err(error),
        Err(EventStreamError::Utf8(_)) => Err(SseError::NotUtf8),
        Err(EventStreamError::Parser(_)) => Err(SseError::NotAField),
    });
    events.scan(false, |failed, event| {
        let item = (!*failed).then_some(event);
        *failed = matches!(item, Some(Err(_)));
        std::future::ready(item)
    })
}

/// The guard as a stream.
struct WholeLines<S, E> {
    bytes: S,
    splitter: LineSplitter,
    /// Nothing more is read from `bytes`.
    ended: bool,
    /// Told once, after the lines that were whole before it.
    failure: Option<SseError<E>>,
}

impl<S, E> Unpin for WholeLines<S, E> where S: Unpin {}

impl<S, B, E> Stream for WholeLines<S, E>
where
    S: Stream<Item = Result<B, E>> + Unpin,
    B: AsRef<[u8]>,
{
    type Item = Result<Vec<u8>, SseError<E>>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(line) = self.splitter.lines.pop_front() {
                return Poll::Ready(Some(Ok(line)));
            }
            if self.ended {
                return Poll::Ready(self.failure.take().map(Err));
            }
            let Poll::Ready(item) = self.bytes.poll_next_unpin(context) else {
                return Poll::Pending;
            };
            let pushed = match item {
                Some(Ok(chunk)) => self.splitter.push(chunk.as_ref()).map_err(SseError::from),
                Some(Err(error)) => Err(SseError::Transport(error)),
                None => {
                    self.ended = true;
                    Ok(())
                }
            };
            if let Err(failure) = pushed {
                self.ended = true;
                self.failure = Some(failure);
            }
        }
    }
}

/// Why a line is not let through.
#[derive(Debug)]
enum LineProblem {
    LineTooLong { limit: usize },
    EventTooLong { limit: usize },
    NotUtf8,
}

impl<E> From<LineProblem> for SseError<E> {
    fn from(problem: LineProblem) -> Self {
        match problem {
            LineProblem::LineTooLong { limit } => Self::LineTooLong { limit },
            LineProblem::EventTooLong { limit } => Self::EventTooLong { limit },
            LineProblem::NotUtf8 => Self::NotUtf8,
        }
    }
}

/// Splits bytes into lines at LF, CR or CR LF; each line let through ends in
/// one LF. Holds at most one unfinished line and the lines of one chunk.
#[derive(Debug)]
struct LineSplitter {
    limits: SseLimits,
    lines: VecDeque<Vec<u8>>,
    unfinished: Vec<u8>,
    event_bytes: usize,
    first_line: bool,
    /// An LF that comes next belongs to the CR before it.
    after_cr: bool,
}

impl LineSplitter {
    fn new(limits: SseLimits) -> Self {
        Self {
            limits,
            // A comment goes first: the parser looks for a byte order mark in
            // the first text it gets, and that is where it may panic.
            lines: VecDeque::from([b":\n".to_vec()]),
            unfinished: Vec::new(),
            event_bytes: 0,
            first_line: true,
            after_cr: false,
        }
    }

    fn push(&mut self, chunk: &[u8]) -> Result<(), LineProblem> {
        let mut rest = chunk;
        if std::mem::take(&mut self.after_cr) {
            match rest.first() {
                Some(b'\n') => rest = &rest[1..],
                Some(_) => {}
                None => self.after_cr = true,
            }
        }
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n' || byte == b'\r') {
            self.extend(&rest[..end])?;
            self.finish_line()?;
            let width = match (rest[end], rest.get(end + 1)) {
                (b'\r', Some(b'\n')) => 2,
                (b'\r', None) => {
                    self.after_cr = true;
                    1
                }
                _ => 1,
            };
            rest = &rest[end + width..];
        }
        self.extend(rest)
    }

    fn extend(&mut self, bytes: &[u8]) -> Result<(), LineProblem> {
        if self.unfinished.len() + bytes.len() > self.limits.line_bytes {
            let limit = self.limits.line_bytes;
            return Err(LineProblem::LineTooLong { limit });
        }
        self.unfinished.extend_from_slice(bytes);
        Ok(())
    }

    fn finish_line(&mut self) -> Result<(), LineProblem> {
        let mut line = std::mem::take(&mut self.unfinished);
        if std::mem::take(&mut self.first_line) && line.starts_with(BYTE_ORDER_MARK) {
            line.drain(..BYTE_ORDER_MARK.len());
        }
        self.event_bytes = if line.is_empty() {
            0
        } else {
            self.event_bytes + line.len()
        };
        if self.event_bytes > self.limits.event_bytes {
            let limit = self.limits.event_bytes;
            return Err(LineProblem::EventTooLong { limit });
        }
        if std::str::from_utf8(&line).is_err() {
            return Err(LineProblem::NotUtf8);
        }
        line.push(b'\n');
        self.lines.push_back(line);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::stream;
    use proptest::prelude::*;
    use std::convert::Infallible;

    type Read = Vec<Result<String, SseError<Infallible>>>;

    fn read(chunks: &[&[u8]], limits: SseLimits) -> Read {
        let bytes = stream::iter(chunks.iter().map(|&chunk| Ok(chunk)));
        block_on(event_data(bytes, limits).collect())
    }

    /// Reads and expects no error.
    fn texts(chunks: &[&[u8]]) -> Vec<String> {
        let events: Result<Vec<_>, _> = read(chunks, SseLimits::default()).into_iter().collect();
        events.expect("the stream is valid")
    }

    fn split<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.sort_unstable();
        let mut chunks = Vec::new();
        let mut start = 0;
        for cut in cuts {
            chunks.push(&bytes[start..cut]);
            start = cut;
        }
        chunks.push(&bytes[start..]);
        chunks
    }

    proptest! {
        #[test]
        fn any_split_of_a_valid_stream_gives_the_same_events(
            events in prop::collection::vec(prop::collection::vec("[^\r\n\0]{0,12}", 1..4), 0..6),
            ending in prop::sample::select(vec!["\n", "\r", "\r\n"]),
            bom: bool,
            comment: bool,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..24),
        ) {
            let mut stream = String::from(if bom { "\u{feff}" } else { "" });
            for lines in &events {
                if comment {
                    stream.extend([": ping", ending]);
                }
                for line in lines {
                    stream.extend(["data: ", line, ending]);
                }
                stream += ending;
            }
            let expected: Vec<String> = events.iter().map(|lines| lines.join("\n")).collect();
            prop_assert_eq!(texts(&split(stream.as_bytes(), &cuts)), expected.clone());
            let bytewise: Vec<&[u8]> = stream.as_bytes().chunks(1).collect();
            prop_assert_eq!(texts(&bytewise), expected);
        }

        #[test]
        fn random_bytes_never_panic_and_any_split_reads_alike(
            bytes in prop::collection::vec(
                prop_oneof![any::<u8>(), prop::sample::select(b"data: \r\n\xEF\xBB\xBF".to_vec())],
                0..200,
            ),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        ) {
            let limits = SseLimits { line_bytes: 40, event_bytes: 60 };
            let outline = |read: Read| -> Vec<Option<String>> { read.into_iter().map(Result::ok).collect() };
            let whole = outline(read(&[&bytes], limits));
            prop_assert_eq!(outline(read(&split(&bytes, &cuts), limits)), whole);
        }
    }

    #[test]
    fn events_keep_their_names() {
        let bytes = b"event: a.b\ndata: x\n\ndata: y\n\n: ping\n\nevent: c\ndata: z\n\n";
        let bytes = stream::iter([Ok::<_, Infallible>(&bytes[..])]);
        let events: Vec<_> = block_on(events(bytes, SseLimits::default()).collect());
        let events: Vec<_> = events
            .into_iter()
            .map(|event| event.map(|event| (event.name, event.data)))
            .collect::<Result<_, _>>()
            .expect("the stream is valid");
        let event = |name: Option<&str>, data: &str| (name.map(str::to_owned), data.to_owned());
        assert_eq!(
            events,
            [
                event(Some("a.b"), "x"),
                event(None, "y"),
                event(Some("c"), "z")
            ]
        );
    }

    #[test]
    fn a_byte_order_mark_is_taken_off_once() {
        assert_eq!(texts(&[b"\xEF\xBB", b"\xBFdata: x\n\n"]), ["x"]);
        // The second one makes the line another field, not a panic.
        let twice = "\u{feff}\u{feff}data: x\n\ndata: y\n\n";
        assert_eq!(texts(&[twice.as_bytes()]), ["y"]);
    }

    #[test]
    fn the_last_event_of_a_cr_only_stream_is_read() {
        assert_eq!(texts(&[b"data: x\r\rdata: y\r\r"]), ["x", "y"]);
    }

    #[test]
    fn an_unfinished_event_is_none() {
        assert_eq!(texts(&[b"data: x\n\ndata: y\n"]), ["x"]);
    }

    #[test]
    fn too_much_is_an_error_after_what_was_whole() {
        let limits = SseLimits {
            line_bytes: 16,
            event_bytes: 20,
        };
        let long_line = read(&[b"data: x\n\ndata: 0123456789012"], limits);
        assert!(
            matches!(&long_line[..], [Ok(x), Err(SseError::LineTooLong { limit: 16 })] if x == "x")
        );
        let long_event = read(&[b"data: 0123456\ndata: 0123456\n\ndata: x\n\n"], limits);
        assert!(matches!(
            &long_event[..],
            [Err(SseError::EventTooLong { limit: 20 })]
        ));
    }

    #[test]
    fn bytes_that_are_no_text_are_an_error() {
        let events = read(&[b"data: x\n\n", b"data: \xFF\n\n"], SseLimits::default());
        assert!(matches!(&events[..], [Ok(x), Err(SseError::NotUtf8)] if x == "x"));
    }

    #[test]
    fn a_broken_transport_is_told_after_the_last_event() {
        let bytes = stream::iter([Ok(&b"data: x\n\ndata"[..]), Err("broken")]);
        let events: Vec<_> = block_on(event_data(bytes, SseLimits::default()).collect());
        assert!(matches!(&events[..], [Ok(x), Err(SseError::Transport("broken"))] if x == "x"));
    }
}
