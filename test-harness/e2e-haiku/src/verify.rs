//! The checks over a transcript. Pure: what was seen comes in, judgements go
//! out.

use std::fmt::Debug;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::sse::{Arrived, text};
use crate::words::Minute;

/// One thing that must hold, and what was seen.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub passed: bool,
    pub seen: String,
}

impl Check {
    pub fn new(name: &'static str, passed: bool, seen: impl Into<String>) -> Self {
        Self {
            name,
            passed,
            seen: seen.into(),
        }
    }

    /// That two things seen in different places are the same.
    pub fn same<T: PartialEq + Debug + ?Sized>(name: &'static str, here: &T, there: &T) -> Self {
        let passed = here == there;
        let seen = if passed {
            format!("{here:?}")
        } else {
            format!("{here:?} and {there:?}")
        };
        Self::new(name, passed, seen)
    }

    /// The same for two JSON values; two that are missing agree on nothing.
    pub fn same_value(name: &'static str, here: &Value, there: &Value) -> Self {
        let passed = here == there && !here.is_null();
        let seen = if passed {
            here.to_string()
        } else {
            format!("{here} and {there}")
        };
        Self::new(name, passed, seen)
    }
}

/// The one check that a small model may fail without any fault of ours.
pub const NAMES_THE_MINUTE: &str = "the answer names the minute exactly once";

/// What the transcript is held against.
#[derive(Debug, Clone)]
pub struct Expected<'a> {
    pub minute: Minute,
    pub nonce: &'a str,
    /// How long it may take from the request to the end.
    pub limit: Duration,
}

/// Checks a whole transcript.
pub fn transcript(events: &[Arrived], expected: &Expected<'_>) -> Vec<Check> {
    vec![
        order(events),
        ids(events),
        indices(events),
        real(events),
        finished(events),
        over_time(events),
        in_time(events, expected.limit),
        minute(events, expected.minute),
        nonce(events, expected.nonce),
    ]
}

fn named<'a>(events: &'a [Arrived], name: &'a str) -> impl Iterator<Item = &'a Arrived> + Clone {
    events
        .iter()
        .filter(move |arrived| arrived.event.name == name)
}

fn order(events: &[Arrived]) -> Check {
    let names: Vec<&str> = events
        .iter()
        .map(|arrived| arrived.event.name.as_str())
        .collect();
    let passed = match names[..] {
        ["started", ref tokens @ .., "end"] => {
            !tokens.is_empty() && tokens.iter().all(|name| *name == "token")
        }
        _ => false,
    };
    let mut shape = names.clone();
    shape.dedup();
    let seen = format!("{} in {} events", shape.join(" → "), names.len());
    Check::new("started → token* → end", passed, seen)
}

fn ids(events: &[Arrived]) -> Check {
    let ids: Vec<u64> = events.iter().map(|arrived| arrived.event.id).collect();
    let rising = ids.windows(2).all(|pair| pair[0] < pair[1]);
    let seen = format!(
        "{} to {}",
        ids.first().unwrap_or(&0),
        ids.last().unwrap_or(&0)
    );
    Check::new("event ids rise", rising && !ids.is_empty(), seen)
}

fn indices(events: &[Arrived]) -> Check {
    let indices: Vec<Option<u64>> = named(events, "token")
        .map(|arrived| arrived.event.data["i"].as_u64())
        .collect();
    let counted = (0..indices.len() as u64).map(Some);
    let passed = !indices.is_empty() && indices.iter().copied().eq(counted);
    let seen = if passed {
        format!("0 to {}", indices.len() - 1)
    } else {
        format!("{indices:?}")
    };
    Check::new("token indices are 0, 1, 2, …", passed, seen)
}

fn real(events: &[Arrived]) -> Check {
    let marked = events
        .iter()
        .filter(|arrived| arrived.event.data.get("fallback").is_some());
    let marked = marked.count();
    Check::new(
        "no event is a fallback",
        marked == 0,
        format!("{marked} marked"),
    )
}

fn finished(events: &[Arrived]) -> Check {
    let end = named(events, "end")
        .next()
        .map_or(&Value::Null, |arrived| &arrived.event.data);
    let (pieces, out) = (
        named(events, "token").count() as u64,
        end["tokens_out"].as_u64(),
    );
    // Several tokens may make one piece, and the last may have no text.
    let counted = out.is_some_and(|out| out >= pieces && pieces > 0);
    let reason = end["finish_reason"].as_str();
    let passed =
        counted && end["tokens_in"].as_u64() > Some(0) && matches!(reason, Some("stop" | "length"));
    let seen = format!(
        "{pieces} pieces, tokens_in {}, tokens_out {}, finish_reason {}",
        end["tokens_in"], end["tokens_out"], end["finish_reason"]
    );
    Check::new("end counts the tokens and says why it ended", passed, seen)
}

/// A canned answer comes at once; a decoded one takes the time that decoding
/// takes. A busy machine may hold some reads up, hence a quarter.
fn over_time(events: &[Arrived]) -> Check {
    const READS: usize = 3;
    let tokens = named(events, "token");
    let mut reads: Vec<usize> = tokens.clone().map(|arrived| arrived.read).collect();
    reads.dedup();
    let span = match (tokens.clone().next(), tokens.last()) {
        (Some(first), Some(last)) => last.after.saturating_sub(first.after),
        _ => Duration::ZERO,
    };
    let end = named(events, "end")
        .next()
        .map_or(&Value::Null, |arrived| &arrived.event.data);
    let decode_ms = end["decode_time_ms"].as_f64().unwrap_or(0.0);
    let span_ms = span.as_secs_f64() * 1000.0;
    let passed = reads.len() >= READS && decode_ms > 0.0 && span_ms >= decode_ms / 4.0;
    let seen = format!(
        "{} reads over {span_ms:.0} ms, decoded in {decode_ms:.0} ms",
        reads.len()
    );
    Check::new("the text arrives over time", passed, seen)
}

fn in_time(events: &[Arrived], limit: Duration) -> Check {
    let last = events.last().map(|arrived| arrived.after);
    let passed = last.is_some_and(|last| last <= limit);
    Check::new(
        "the answer comes in time",
        passed,
        format!("{:?}, at most {limit:?}", last.unwrap_or_default()),
    )
}

fn minute(events: &[Arrived], minute: Minute) -> Check {
    let text = text(events);
    let times = minute.occurrences(&text);
    let seen = format!("`{}` {times} times in {text:?}", minute.words());
    Check::new(NAMES_THE_MINUTE, times == 1, seen)
}

fn nonce(events: &[Arrived], nonce: &str) -> Check {
    let text = text(events).to_lowercase();
    // Looked for behind any punctuation too.
    let bare: String = text
        .chars()
        .filter(|character| character.is_alphanumeric())
        .collect();
    let nonce = nonce.to_lowercase();
    let seen = text.contains(&nonce) || bare.contains(&nonce);
    Check::new(
        "the answer never holds the nonce",
        !seen,
        if seen { text } else { "absent".to_owned() },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sse::Event;
    use serde_json::json;

    const PIECES: [&str; 6] = ["Minute", " forty", "-two", "—\nrain", " again", "."];

    fn arrived(id: u64, name: &str, data: Value, ms: u64) -> Arrived {
        Arrived {
            event: Event {
                id,
                name: name.to_owned(),
                data,
            },
            after: Duration::from_millis(ms),
            read: id as usize,
        }
    }

    fn answer(pieces: &[&str]) -> Vec<Arrived> {
        let mut events = vec![arrived(
            1,
            "started",
            json!({ "queue_position": 0, "predicted_start_ms": 0 }),
            10,
        )];
        let mut at = 40;
        for (index, piece) in pieces.iter().enumerate() {
            let id = index as u64 + 2;
            events.push(arrived(id, "token", json!({ "t": piece, "i": index }), at));
            at += 12;
        }
        let end = json!({
            "tokens_in": 100, "tokens_out": pieces.len() + 1,
            "decode_time_ms": 12.0 * pieces.len() as f64, "finish_reason": "stop"
        });
        events.push(arrived(pieces.len() as u64 + 2, "end", end, at));
        events
    }

    /// The checks that a transcript does not pass.
    fn failing(events: &[Arrived]) -> Vec<&'static str> {
        let expected = Expected {
            minute: Minute::new(42).unwrap(),
            nonce: "a1b2c3d4",
            limit: Duration::from_secs(30),
        };
        let checks = transcript(events, &expected);
        checks
            .iter()
            .filter(|check| !check.passed)
            .map(|check| check.name)
            .collect()
    }

    /// A good transcript, spoilt, and the one check that must notice.
    fn spoilt(name: &str, spoil: impl FnOnce(&mut Vec<Arrived>)) {
        let mut events = answer(&PIECES);
        spoil(&mut events);
        let failing = failing(&events);
        assert!(
            failing.iter().any(|check| check.contains(name)),
            "`{name}` is not among {failing:?}"
        );
    }

    #[test]
    fn a_good_transcript_passes() {
        assert_eq!(failing(&answer(&PIECES)), Vec::<&str>::new());
    }

    #[test]
    fn an_empty_transcript_passes_nothing_that_matters() {
        assert_eq!(failing(&[]).len(), 7, "{:?}", failing(&[]));
    }

    #[test]
    fn the_order_is_checked() {
        spoilt("started →", |events| events.swap(0, 1));
        spoilt("started →", |events| drop(events.remove(0)));
        spoilt("started →", |events| drop(events.pop()));
        spoilt("started →", |events| drop(events.drain(1..7)));
        spoilt("started →", |events| events.insert(3, events[0].clone()));
        spoilt("started →", |events| events.push(events[7].clone()));
        spoilt("started →", |events| events.push(events[3].clone()));
        spoilt("started →", |events| {
            events[7].event.name = "error".to_owned();
        });
    }

    #[test]
    fn ids_and_indices_are_checked() {
        spoilt("ids", |events| events[3].event.id = 3);
        spoilt("indices", |events| drop(events.remove(2)));
        spoilt("indices", |events| events[1].event.data["i"] = json!(1));
        spoilt("indices", |events| events[4].event.data["i"] = json!("3"));
        spoilt("fallback", |events| {
            events[4].event.data["fallback"] = json!(true);
        });
    }

    #[test]
    fn the_end_is_checked() {
        spoilt("end counts", |events| {
            events[7].event.data["tokens_out"] = json!(5);
        });
        spoilt("end counts", |events| {
            events[7].event.data["tokens_in"] = json!(0);
        });
        spoilt("end counts", |events| {
            events[7].event.data["finish_reason"] = json!("cancelled");
        });
    }

    #[test]
    fn time_is_checked() {
        let at_once = |events: &mut Vec<Arrived>| {
            for event in events {
                event.read = 1;
            }
        };
        spoilt("over time", at_once);
        spoilt("over time", |events| {
            for event in events {
                event.after = Duration::from_millis(50);
            }
        });
        spoilt("over time", |events| {
            events[7].event.data["decode_time_ms"] = json!(0.0);
        });
        spoilt("in time", |events| {
            events[7].after = Duration::from_secs(31);
        });
    }

    #[test]
    fn the_words_are_checked() {
        let say = |text: &'static str| {
            move |events: &mut Vec<Arrived>| events[6].event.data["t"] = json!(text)
        };
        spoilt("names the minute", say(" forty-two"));
        spoilt("names the minute", |events| {
            events[3].event.data["t"] = json!("-three");
        });
        spoilt("names the minute", |events| {
            events[2].event.data["t"] = json!(" forty,");
        });
        spoilt("nonce", say(" a1b2c3d4"));
        spoilt("nonce", say(" A1B2-C3D4"));
    }

    #[test]
    fn two_places_must_agree() {
        assert!(Check::same("x", &1, &1).passed);
        let check = Check::same("x", &1, &2);
        assert!(!check.passed && check.seen == "1 and 2", "{check:?}");
        assert!(Check::same_value("x", &json!("a"), &json!("a")).passed);
        assert!(!Check::same_value("x", &json!("a"), &json!("b")).passed);
        assert!(!Check::same_value("x", &Value::Null, &Value::Null).passed);
    }
}
