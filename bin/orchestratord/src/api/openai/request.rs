//! What is read of a request: the few keys that routing needs, and our own wishes
//! in headers. Everything else is the engine's business.

use std::time::Duration;

use axum::http::HeaderMap;
use llama_orch_types::ErrorCode;
use serde::Deserialize;

use super::measure::measure;
use crate::services::admission::Priority;
use crate::services::event_log::Failure;
use crate::services::failure::shortened;

/// As deep as the parser of our own API goes.
const MAX_DEPTH: usize = 127;

/// The keys of a body that are read here; what it holds besides is passed over
/// without being built.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Asked {
    pub(super) model: Option<String>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
}

#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::InvalidParams, message)
}

impl Asked {
    pub(super) fn read(body: &[u8], max_text_bytes: u64) -> Result<Self, Failure> {
        // A list would otherwise be taken for the keys in their order.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(invalid("the body must be a JSON object"));
        }
        // Strings that are passed over are not looked at by the parser.
        let text = std::str::from_utf8(body)
            .map_err(|error| invalid(format!("the body is no UTF-8: {error}")))?;
        let measured = measure(body);
        if measured.depth > MAX_DEPTH {
            return Err(invalid(format!(
                "the body is nested {} deep; at most {MAX_DEPTH} is taken",
                measured.depth
            )));
        }
        if measured.text_bytes as u64 > max_text_bytes {
            return Err(invalid(format!(
                "the body has {} bytes without images and the like; at most {max_text_bytes} are taken",
                measured.text_bytes
            ))
            .with_hint("shorten it, or raise `limits.max_prompt_bytes`"));
        }
        let mut asked: Self = serde_json::from_str(text)
            .map_err(|error| invalid(format!("the body cannot be read: {error}")))?;
        // Some clients send it empty for "any".
        asked.model = asked.model.filter(|model| !model.is_empty());
        Ok(asked)
    }

    /// Whether a chunk that says only what was used is wanted.
    pub(super) fn include_usage(&self) -> bool {
        let options = self.stream_options.as_ref();
        options.and_then(|options| options.include_usage) == Some(true)
    }
}

/// What no body of these APIs has a place for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wishes {
    pub(super) priority: Priority,
    pub(super) start_within: Option<Duration>,
    pub(super) cancel_on_disconnect: bool,
}

impl Wishes {
    pub(super) fn read(headers: &HeaderMap) -> Result<Self, Failure> {
        let priority = match header(headers, "x-priority")? {
            None | Some("interactive") => Priority::Interactive,
            Some("batch") => Priority::Batch,
            Some(other) => return Err(wrong("X-Priority", other, "`interactive` or `batch`")),
        };
        let start_within = match header(headers, "x-deadline-ms")? {
            None => None,
            Some(text) => match text.parse() {
                Ok(0) | Err(_) => {
                    return Err(wrong("X-Deadline-Ms", text, "a number of milliseconds"));
                }
                Ok(millis) => Some(Duration::from_millis(millis)),
            },
        };
        let cancel_on_disconnect = match header(headers, "x-cancel-on-disconnect")? {
            None | Some("true") => true,
            Some("false") => false,
            Some(other) => return Err(wrong("X-Cancel-On-Disconnect", other, "`true` or `false`")),
        };
        Ok(Self {
            priority,
            start_within,
            cancel_on_disconnect,
        })
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Result<Option<&'a str>, Failure> {
    let value = headers.get(name).map(|value| value.to_str());
    let text = value
        .transpose()
        .map_err(|_| invalid(format!("the header `{name}` is no text")))?;
    Ok(text.map(str::trim))
}

fn wrong(name: &str, given: &str, expected: &str) -> Failure {
    invalid(format!(
        "the header `{name}` is `{}`; it must be {expected}",
        shortened(given)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(body: &str) -> Result<Asked, Failure> {
        Asked::read(body.as_bytes(), 1000)
    }

    #[test]
    fn only_what_routing_needs_is_read() {
        let asked = read(
            r#"{"model":"m","stream":true,"stream_options":{"include_usage":true,"other":1},
                "messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],"tools":null}"#,
        )
        .unwrap();
        assert_eq!(asked.model.as_deref(), Some("m"));
        assert_eq!(asked.stream, Some(true));
        assert!(asked.include_usage());
        let asked = read(r#"{"model":"","stream":null,"stream_options":null}"#).unwrap();
        assert_eq!((asked.model.as_deref(), asked.stream), (None, None));
        assert!(!asked.include_usage());
        assert_eq!(read("{}").unwrap(), Asked::default());
    }

    #[test]
    fn what_cannot_be_passed_on_is_refused() {
        let deep = format!(r#"{{"a":{}{}}}"#, "[".repeat(200), "]".repeat(200));
        let long = format!(r#"{{"prompt":"{}"}}"#, "a b".repeat(1000));
        for (body, word) in [
            ("", "object"),
            ("[]", "object"),
            ("\"x\"", "object"),
            ("{", "cannot be read"),
            (r#"{"a":1} x"#, "cannot be read"),
            (r#"{"model":1}"#, "cannot be read"),
            (r#"{"model":"a","model":"b"}"#, "duplicate"),
            (r#"{"stream":"yes"}"#, "cannot be read"),
            (deep.as_str(), "nested"),
            (long.as_str(), "bytes"),
        ] {
            let failure = read(body).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidParams);
            assert!(
                failure.message.contains(word),
                "{body}: {}",
                failure.message
            );
        }
        let failure = Asked::read(b"{\"prompt\":\"\xff\"}", 1000).unwrap_err();
        assert!(failure.message.contains("UTF-8"), "{}", failure.message);
    }

    #[test]
    fn wishes_are_read_from_headers_and_wrong_ones_named() {
        let read = |name: &'static str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            Wishes::read(&headers)
        };
        let none = Wishes::read(&HeaderMap::new()).unwrap();
        assert_eq!(none.priority, Priority::Interactive);
        assert!(none.cancel_on_disconnect && none.start_within.is_none());
        assert_eq!(
            read("x-priority", "batch").unwrap().priority,
            Priority::Batch
        );
        let wishes = read("x-deadline-ms", "250").unwrap();
        assert_eq!(wishes.start_within, Some(Duration::from_millis(250)));
        let wishes = read("x-cancel-on-disconnect", "false").unwrap();
        assert!(!wishes.cancel_on_disconnect);
        for (name, value) in [
            ("x-priority", "urgent"),
            ("x-deadline-ms", "0"),
            ("x-deadline-ms", "-1"),
            ("x-deadline-ms", "soon"),
            ("x-cancel-on-disconnect", "no"),
        ] {
            let failure = read(name, value).unwrap_err();
            assert!(failure.message.contains(value), "{}", failure.message);
        }
    }

    proptest! {
        #[test]
        fn any_body_is_answered(body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Asked::read(&body, 1000);
        }
    }
}
