//! Reads an event stream and keeps the time at which each event arrived.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::{Duration, Instant};

use reqwest::Response;
use serde::Serialize;
use serde_json::Value;

/// How long a whole stream may take.
const STREAM_LIMIT: Duration = Duration::from_mins(2);

/// One event as the daemon sent it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Event {
    pub id: u64,
    pub name: String,
    pub data: Value,
}

/// An event and when it came.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Arrived {
    pub event: Event,
    /// Since the stream was asked for.
    pub after: Duration,
    /// Which read from the network brought its last byte, counted from 1.
    pub read: usize,
}

impl Event {
    /// The piece of text that a `token` event holds.
    pub fn text(&self) -> Option<&str> {
        (self.name == "token")
            .then(|| self.data["t"].as_str())
            .flatten()
    }
}

/// The answer that a stream's tokens make up.
pub fn text(events: &[Arrived]) -> String {
    events
        .iter()
        .filter_map(|arrived| arrived.event.text())
        .collect()
}

/// The stream as it came, each event with its time as a comment before it, so
/// that the file is still a valid stream.
pub fn render(events: &[Arrived]) -> String {
    let mut out = String::new();
    for Arrived { event, after, read } in events {
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            ": +{:.3} s, read {read}\nid: {}\nevent: {}\ndata: {}\n\n",
            after.as_secs_f64(),
            event.id,
            event.name,
            event.data
        );
    }
    out
}

/// A stream that is being read.
#[derive(Debug)]
pub struct Reader {
    response: Response,
    asked: Instant,
    bytes: Vec<u8>,
    reads: usize,
    ready: VecDeque<Arrived>,
}

impl Reader {
    /// `asked` is when the request was sent.
    pub fn new(response: Response, asked: Instant) -> Self {
        Self {
            response,
            asked,
            bytes: Vec::new(),
            reads: 0,
            ready: VecDeque::new(),
        }
    }

    /// The next event; `None` at the stream's end.
    pub async fn next(&mut self) -> Option<Arrived> {
        while self.ready.is_empty() {
            let left = STREAM_LIMIT.saturating_sub(self.asked.elapsed());
            let chunk = tokio::time::timeout(left, self.response.chunk())
                .await
                .unwrap_or_else(|_| {
                    panic!(
                        "the stream was not over within {} s",
                        STREAM_LIMIT.as_secs()
                    )
                })
                .unwrap_or_else(|error| panic!("the stream broke: {error:?}"));
            let Some(chunk) = chunk else {
                let rest = String::from_utf8_lossy(&self.bytes);
                assert!(
                    rest.is_empty(),
                    "the stream ended inside an event: {rest:?}"
                );
                return None;
            };
            self.reads += 1;
            self.take(&chunk);
        }
        self.ready.pop_front()
    }

    /// Everything up to the stream's end.
    pub async fn rest(&mut self) -> Vec<Arrived> {
        let mut events = Vec::new();
        while let Some(arrived) = self.next().await {
            events.push(arrived);
        }
        events
    }

    /// The next `count` tokens and what came before and between them.
    pub async fn tokens(&mut self, count: usize) -> Vec<Arrived> {
        let mut events = Vec::new();
        let mut tokens = 0;
        while tokens < count {
            let arrived = self.next().await;
            let arrived = arrived
                .unwrap_or_else(|| panic!("the stream ended after {tokens} tokens: {events:#?}"));
            tokens += usize::from(arrived.event.name == "token");
            events.push(arrived);
        }
        events
    }

    fn take(&mut self, chunk: &[u8]) {
        let after = self.asked.elapsed();
        self.bytes.extend_from_slice(chunk);
        while let Some(end) = self.bytes.windows(2).position(|pair| pair == b"\n\n") {
            let block: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let block = String::from_utf8(block).expect("the daemon sends UTF-8");
            match parse(block.trim_end()) {
                Ok(Some(event)) => self.ready.push_back(Arrived {
                    event,
                    after,
                    read: self.reads,
                }),
                Ok(None) => {}
                Err(problem) => panic!("{problem} in {block:?}"),
            }
        }
    }
}

/// One block between blank lines; `None` if it holds comments only.
fn parse(block: &str) -> Result<Option<Event>, String> {
    let (mut id, mut name, mut data) = (None, None, None);
    for line in block.lines() {
        let (field, value) = line
            .split_once(':')
            .ok_or_else(|| format!("a line without colon: {line:?}"))?;
        let value = value.strip_prefix(' ').unwrap_or(value).to_owned();
        let place = match field {
            "" => continue,
            "id" => &mut id,
            "event" => &mut name,
            "data" => &mut data,
            other => return Err(format!("an unknown field `{other}`")),
        };
        if place.replace(value).is_some() {
            return Err(format!("the field `{field}` twice"));
        }
    }
    match (id, name, data) {
        (None, None, None) => Ok(None),
        (Some(id), Some(name), Some(data)) => Ok(Some(Event {
            id: id
                .parse()
                .map_err(|error| format!("the id {id:?}: {error}"))?,
            data: serde_json::from_str(&data)
                .map_err(|error| format!("data that is no JSON ({error})"))?,
            name,
        })),
        parts => Err(format!("an event without id, name or data: {parts:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_and_a_comment() {
        let event = parse("id: 3\nevent: token\ndata: {\"t\":\" a: b\",\"i\":1}")
            .unwrap()
            .unwrap();
        assert_eq!((event.id, event.text()), (3, Some(" a: b")));
        assert_eq!(parse(": keep-alive"), Ok(None));
        let arrived = Arrived {
            event,
            after: Duration::from_millis(1500),
            read: 2,
        };
        let rendered = render(std::slice::from_ref(&arrived));
        assert!(rendered.starts_with(": +1.500 s, read 2\n"), "{rendered}");
        assert_eq!(parse(rendered.trim_end()), Ok(Some(arrived.event)));
    }

    #[test]
    fn what_is_no_event_is_refused() {
        for block in [
            "event: token\ndata: {}",
            "id: 1\nevent: token",
            "id: 1\nid: 2\nevent: token\ndata: {}",
            "id: x\nevent: token\ndata: {}",
            "id: 1\nevent: token\ndata: {",
            "id: 1\nevent: token\ndata: {}\nretry: 5",
            "nonsense",
        ] {
            assert!(parse(block).is_err(), "{block}");
        }
    }
}
