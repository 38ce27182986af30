//! Takes server-sent events apart. Pure; shares no code with the daemon.

use serde_json::Value;

/// One event of a task's stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub id: u64,
    pub name: String,
    pub data: Value,
}

/// What a stream holds that it must not hold.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SseError {
    #[error("a stream holds bytes that are no text")]
    NotText,
    #[error("an event has no `{field}`: {block:?}")]
    Missing { field: &'static str, block: String },
    #[error("an event's id is no number: {id:?}")]
    Id { id: String },
    #[error("an event's data is no JSON: {data:?}")]
    Data { data: String },
}

/// Collects bytes until they make up events. Comments are passed over.
#[derive(Debug, Default)]
pub struct Parser {
    bytes: Vec<u8>,
}

impl Parser {
    /// The events that these bytes complete.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Event>, SseError> {
        self.bytes.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.bytes.windows(2).position(|two| two == b"\n\n") {
            let block: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let block = std::str::from_utf8(&block[..end]).map_err(|_| SseError::NotText)?;
            let comment = block.lines().all(|line| line.starts_with(':'));
            if !comment {
                events.push(parse(block)?);
            }
        }
        Ok(events)
    }
}

fn parse(block: &str) -> Result<Event, SseError> {
    let field = |field: &'static str| {
        let line = block.lines().find_map(|line| line.strip_prefix(field));
        line.map(str::trim_start).ok_or_else(|| SseError::Missing {
            field,
            block: block.to_owned(),
        })
    };
    let (id, data) = (field("id:")?, field("data:")?);
    Ok(Event {
        id: id.parse().map_err(|_| SseError::Id { id: id.to_owned() })?,
        name: field("event:")?.to_owned(),
        data: serde_json::from_str(data).map_err(|_| SseError::Data {
            data: data.to_owned(),
        })?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const STREAM: &str = ": preparing\n\nid: 1\nevent: started\ndata: {\"waited_ms\":3}\n\n\
        id: 2\nevent: token\ndata: {\"t\":\"ä\\n\",\"i\":0}\n\n: keep-alive\n\n\
        id: 3\nevent: end\ndata: {}\n\n";

    #[test]
    fn events_are_taken_apart() {
        let events = Parser::default().push(STREAM.as_bytes()).unwrap();
        assert_eq!(events.len(), 3);
        assert_eq!(events[1].id, 2);
        assert_eq!(events[1].name, "token");
        assert_eq!(events[1].data, json!({"t": "ä\n", "i": 0}));
    }

    #[test]
    fn what_is_no_event_is_said() {
        let push = |text: &str| Parser::default().push(text.as_bytes()).unwrap_err();
        assert!(matches!(
            push("event: token\ndata: {}\n\n"),
            SseError::Missing { field: "id:", .. }
        ));
        assert!(matches!(
            push("id: x\nevent: a\ndata: {}\n\n"),
            SseError::Id { .. }
        ));
        assert!(matches!(
            push("id: 1\nevent: a\ndata: {\n\n"),
            SseError::Data { .. }
        ));
        assert_eq!(Parser::default().push(b"\xff\n\n"), Err(SseError::NotText));
    }

    proptest! {
        #[test]
        fn cuts_change_nothing(cuts in proptest::collection::vec(0usize..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let mut parser = Parser::default();
            let mut events = Vec::new();
            for cut in cuts.windows(2) {
                events.extend(parser.push(&STREAM.as_bytes()[cut[0]..cut[1]]).unwrap());
            }
            prop_assert_eq!(events, Parser::default().push(STREAM.as_bytes()).unwrap());
        }
    }
}
