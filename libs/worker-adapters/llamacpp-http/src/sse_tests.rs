use std::collections::VecDeque;
use std::convert::Infallible;

use eventsource_stream::EventStream;
use futures::executor::block_on;
use futures::stream;
use proptest::prelude::*;

use super::*;

type Read = Vec<Result<String, SseError<Infallible>>>;

fn pieces(chunks: &[&[u8]]) -> impl Stream<Item = Result<Bytes, Infallible>> + Unpin {
    let chunks: VecDeque<_> = chunks
        .iter()
        .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
        .collect();
    stream::iter(chunks)
}

fn read(chunks: &[&[u8]], limits: SseLimits) -> Read {
    let data = event_data(pieces(chunks), limits);
    block_on(data.map(|event| event.map(String::from)).collect())
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

/// What another reader makes of the same stream. It is given whole lines that end in
/// LF: it loses the last event where lines end in a bare CR, and may panic on a byte
/// order mark unless a comment goes first.
fn oracle(stream: &str) -> Vec<(Option<String>, String)> {
    let lines = stream.replace("\r\n", "\n").replace('\r', "\n");
    let lines = format!(
        ":\n{}",
        lines.strip_prefix('\u{feff}').unwrap_or(lines.as_str())
    );
    let whole = stream::iter([Ok::<_, Infallible>(lines)]);
    let events: Vec<_> = block_on(EventStream::new(whole).collect());
    let events = events.into_iter().map(|event| {
        let event = event.expect("every line is a field, a comment or empty");
        let named = event.event != "message";
        (named.then_some(event.event), event.data)
    });
    events.collect()
}

fn owned(event: SseEvent) -> (Option<String>, String) {
    (event.name.map(String::from), event.data.into())
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
    fn another_reader_finds_the_same_events(
        parts in prop::collection::vec(
            prop::sample::select(vec![
                "\n", "\r", "\r\n", "data", "data:", "data: ", "event:", "event: ", "message", "id: 1",
                ":", " ", "x", "é", "\u{feff}", "\n\n", "retry: 5", "\0",
            ]),
            0..40,
        ),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..8),
    ) {
        let stream = parts.concat();
        let chunks = split(stream.as_bytes(), &cuts);
        let read: Result<Vec<_>, _> =
            block_on(events(pieces(&chunks), SseLimits::default()).collect::<Vec<_>>())
                .into_iter()
                .map(|event| event.map(owned))
                .collect();
        prop_assert_eq!(read.expect("it is text, and short"), oracle(&stream));
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
        let outline = |read: Read| -> Vec<Result<String, String>> {
            read.into_iter().map(|item| item.map_err(|error| error.to_string())).collect()
        };
        let whole = outline(read(&[&bytes], limits));
        prop_assert_eq!(outline(read(&split(&bytes, &cuts), limits)), whole);
    }
}

#[test]
fn events_keep_their_names() {
    let bytes = b"event: a.b\ndata: x\n\ndata: y\n\n: ping\n\nevent: c\ndata: z\n\n";
    let events: Vec<_> = block_on(events(pieces(&[bytes]), SseLimits::default()).collect());
    let events: Vec<_> = events
        .into_iter()
        .map(|event| event.map(owned))
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
fn an_event_in_one_piece_is_not_copied() {
    let mut splitter = EventSplitter::new(SseLimits::default());
    splitter.push(Bytes::from_static(b": hello\n"));
    assert_eq!(splitter.next_event(), Ok(None));
    let piece = Bytes::from(b"event: e\ndata: x\n\ndata: y\n\n".to_vec());
    let within = piece.as_ptr_range();
    splitter.push(piece.clone());
    for (name, data) in [(Some("e"), "x"), (None, "y")] {
        let event = splitter.next_event().unwrap().unwrap();
        assert_eq!((event.name.as_deref(), &*event.data), (name, data));
        assert!(within.contains(&event.data.as_ptr()));
    }
    assert!(
        piece.is_unique(),
        "a piece is let go of with its last event"
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
    assert!(matches!(
        &long_line[..],
        [Ok(x), Err(SseError::Malformed(Malformed::LineTooLong { limit: 16 }))] if x == "x"
    ));
    let long_event = read(&[b"data: 0123456\ndata: 0123456\n\ndata: x\n\n"], limits);
    assert!(matches!(
        &long_event[..],
        [Err(SseError::Malformed(Malformed::EventTooLong {
            limit: 20
        }))]
    ));
}

#[test]
fn bytes_that_are_no_text_are_an_error() {
    for no_text in [&b"data: \xFF\n\n"[..], b": \xFF\n\n", b"\xFF\n\n"] {
        let events = read(&[b"data: x\n\n", no_text], SseLimits::default());
        assert!(matches!(
            &events[..],
            [Ok(x), Err(SseError::Malformed(Malformed::NotUtf8))] if x == "x"
        ));
    }
}

#[test]
fn a_broken_transport_is_told_after_the_last_event() {
    let bytes = stream::iter([
        Ok(Bytes::from_static(b"data: x\n\ndata")),
        Err("broken"),
        Ok(Bytes::from_static(b": y\n\n")),
    ]);
    let events: Vec<_> = block_on(event_data(bytes, SseLimits::default()).collect());
    assert!(matches!(&events[..], [Ok(x), Err(SseError::Transport("broken"))] if x == "x"));
}
