//! A task's log as the events of the API that was asked.
//!
//! The engine's events are passed on as they are; all that is unread is written
//! in one piece. Made here are only the end and what goes wrong: an error in
//! mid-stream is an event of the API's own kind, and then the stream has no
//! `[DONE]`, so that nobody takes half an answer for a whole one. A task that was
//! cancelled by somebody else ends so, too: none of these APIs has a reason to
//! finish that means it.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use serde::Deserialize;
use serde::de::IgnoredAny;
use worker_adapters_adapter_api::{CallApi, FinishReason};

use crate::api::dialect::Dialect;
use crate::api::error::status_of;
use crate::services::event_log::{ChunkRef, Cursor, EventRef, Failure};
use crate::services::streaming::LogBody;

/// How a log is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rendering {
    pub(super) api: CallApi,
    /// Whether a chunk that says only what was used is shown.
    pub(super) include_usage: bool,
    /// How long nothing may be written before a comment is.
    pub(super) keep_alive: Duration,
}

/// The body of an event stream. If there is nothing to show yet, a comment is the
/// first that the client sees. While nothing happens, comments say what is waited
/// for, by `status`. Dropping the stream drops `reader`.
pub(super) fn render<R: Send + 'static>(
    cursor: Cursor,
    rendering: Rendering,
    correlation: String,
    reader: R,
    status: impl Fn() -> Option<String> + Send + 'static,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let write = move |out: &mut BytesMut, _, event: EventRef<'_>| {
        rendering.event(out, event, &correlation);
        ControlFlow::Continue(())
    };
    LogBody::new(cursor, reader, write, status)
        .kept_alive(rendering.keep_alive)
        .greeting()
}

impl Rendering {
    fn event(self, out: &mut BytesMut, event: EventRef<'_>, correlation: &str) {
        match event {
            EventRef::Chunk(chunk) => self.chunk(out, chunk),
            EventRef::Answer(answer) => {
                frame(out, None, &String::from_utf8_lossy(&answer.body));
            }
            EventRef::End(end) if end.finish_reason == FinishReason::Cancelled => {
                self.failure(out, &Failure::cancelled(), correlation);
            }
            EventRef::End(_) => self.done(out),
            EventRef::Error(failure) => self.failure(out, failure, correlation),
            // The words of our own API.
            EventRef::Started(_) | EventRef::Token(_) | EventRef::Metrics(_) => {}
        }
    }

    fn chunk(self, out: &mut BytesMut, chunk: ChunkRef<'_>) {
        // A chunk with text is never the one that is left out.
        let looked_at = !self.include_usage && self.is_openais_first() && chunk.token.t.is_empty();
        if looked_at && is_usage_alone(chunk.data) {
            return;
        }
        frame(out, chunk.name, chunk.data);
    }

    /// The APIs that have `stream_options` and `[DONE]`.
    fn is_openais_first(self) -> bool {
        matches!(self.api, CallApi::ChatCompletions | CallApi::Completions)
    }

    fn done(self, out: &mut BytesMut) {
        if self.is_openais_first() {
            frame(out, None, "[DONE]");
        }
    }

    fn failure(self, out: &mut BytesMut, failure: &Failure, correlation: &str) {
        let mut failure = failure.clone();
        failure
            .correlation_id
            .get_or_insert_with(|| correlation.to_owned());
        let dialect = Dialect::of(self.api.path());
        let body = dialect.error_body(status_of(failure.code), &failure);
        let body = String::from_utf8_lossy(&body);
        match self.api {
            CallApi::Responses => {
                // As that API has it, and with the member that its libraries look
                // for in any event.
                let mut event = serde_json::json!({
                    "type": "error",
                    "code": failure.code.as_str().to_ascii_lowercase(),
                    "message": failure.message,
                    "param": null,
                    "sequence_number": 0,
                });
                if let Ok(serde_json::Value::Object(mut shape)) = serde_json::from_str(&body) {
                    event["error"] = shape.remove("error").unwrap_or_default();
                }
                frame(out, Some("error"), &event.to_string());
            }
            CallApi::Messages => frame(out, Some("error"), &body),
            _ => frame(out, None, &body),
        }
    }
}

/// One event. Data of several lines is written as such; a name is one line, whatever
/// an engine says, so that it cannot begin another field.
fn frame(out: &mut BytesMut, name: Option<&str>, data: &str) {
    if let Some(name) = name.filter(|name| is_one_line(name)) {
        for part in ["event: ", name, "\n"] {
            out.extend_from_slice(part.as_bytes());
        }
    }
    if is_one_line(data) {
        return data_line(out, data, b"\n\n");
    }
    for line in data.split(['\n', '\r']) {
        data_line(out, line, b"\n");
    }
    out.extend_from_slice(b"\n");
}

fn data_line(out: &mut BytesMut, line: &str, end: &[u8]) {
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(line.as_bytes());
    out.extend_from_slice(end);
}

fn is_one_line(text: &str) -> bool {
    memchr::memchr2(b'\n', b'\r', text.as_bytes()).is_none()
}

/// Whether a chunk says what was used and nothing of the answer.
fn is_usage_alone(data: &str) -> bool {
    #[derive(Deserialize)]
    struct Look {
        choices: Option<Vec<IgnoredAny>>,
        usage: Option<IgnoredAny>,
    }
    data.contains("\"usage\"")
        && serde_json::from_str::<Look>(data).is_ok_and(|look| {
            look.usage.is_some() && look.choices.is_some_and(|choices| choices.is_empty())
        })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::services::event_log::{Chunk, End, EventLog, Started, TaskEvent, Token};
    use bytestring::ByteString;
    use futures::StreamExt;
    use llama_orch_types::ErrorCode;

    fn chunk(name: Option<&str>, data: &str) -> TaskEvent {
        TaskEvent::Chunk(Chunk {
            name: name.map(Into::into),
            data: data.into(),
            token: Token {
                t: ByteString::new(),
                i: 0,
            },
        })
    }

    fn end(finish_reason: FinishReason) -> TaskEvent {
        TaskEvent::End(Box::new(End {
            tokens_in: None,
            tokens_out: 0,
            decode_time_ms: 0.0,
            finish_reason,
            resumed: 0,
            receipt: None,
        }))
    }

    fn started() -> TaskEvent {
        TaskEvent::Started(Started {
            queue_position: 0,
            predicted_start_ms: 0,
            waited_ms: 0,
        })
    }

    fn rendering(api: CallApi) -> Rendering {
        Rendering {
            api,
            include_usage: false,
            keep_alive: Duration::from_secs(10),
        }
    }

    async fn shown(rendering: Rendering, events: Vec<TaskEvent>) -> String {
        let log = EventLog::new();
        for event in events {
            log.append(event).unwrap();
        }
        let stream = render(log.cursor(0), rendering, "c-1".to_owned(), (), || None);
        let pieces: Vec<_> = stream.collect().await;
        pieces
            .into_iter()
            .map(|piece| String::from_utf8(piece.unwrap().to_vec()).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn nothing_that_an_engine_says_becomes_a_field_of_its_own() {
        let log = EventLog::new();
        log.append(chunk(Some("x\rdata: [DONE]\n"), "{\r\"a\":1}"))
            .unwrap();
        let messages = rendering(CallApi::Messages);
        let stream = render(log.cursor(0), messages, String::new(), (), || None);
        let first = Box::pin(stream).next().await.unwrap().unwrap();
        assert_eq!(first, "data: {\ndata: \"a\":1}\n\n");
    }

    const USAGE: &str = r#"{"choices":[],"usage":{"total_tokens":3}}"#;

    #[tokio::test]
    async fn chunks_are_passed_on_and_done_is_said_where_the_api_says_it() {
        let events = || {
            vec![
                started(),
                chunk(None, r#"{"a":1}"#),
                chunk(Some("x.y"), "1\n2"),
                end(FinishReason::Stop),
            ]
        };
        let text = "data: {\"a\":1}\n\nevent: x.y\ndata: 1\ndata: 2\n\n";
        for api in [CallApi::ChatCompletions, CallApi::Completions] {
            let done = format!("{text}data: [DONE]\n\n");
            assert_eq!(shown(rendering(api), events()).await, done);
        }
        for api in [CallApi::Responses, CallApi::Messages] {
            assert_eq!(shown(rendering(api), events()).await, text);
        }
    }

    #[tokio::test]
    async fn what_was_used_is_told_only_to_who_asks() {
        let with_choice = r#"{"choices":[{"text":""}],"usage":{}}"#;
        let events = || {
            vec![
                chunk(None, with_choice),
                chunk(None, USAGE),
                end(FinishReason::Stop),
            ]
        };
        let silent = rendering(CallApi::ChatCompletions);
        let text = shown(silent, events()).await;
        assert!(
            text.contains(with_choice) && !text.contains(USAGE),
            "{text}"
        );
        let asking = Rendering {
            include_usage: true,
            ..silent
        };
        assert!(shown(asking, events()).await.contains(USAGE));
    }

    #[tokio::test]
    async fn an_error_in_mid_stream_has_the_apis_own_form_and_no_done() {
        let failure = Failure::new(ErrorCode::WorkerReset, "it broke");
        let events = |last: TaskEvent| vec![chunk(None, "{}"), last];
        let broken = || TaskEvent::Error(Box::new(failure.clone()));
        let error = |text: &str| -> serde_json::Value {
            assert!(!text.contains("[DONE]"), "{text}");
            let last = text.trim_end().rsplit("data: ").next().unwrap();
            serde_json::from_str(last).unwrap()
        };
        let text = shown(rendering(CallApi::ChatCompletions), events(broken())).await;
        assert!(text.starts_with("data: {}\n\ndata: {\"error\":"), "{text}");
        let value = error(&text);
        assert_eq!(value["error"]["code"], "worker_reset");
        assert_eq!(value["error"]["correlation_id"], "c-1");
        let text = shown(rendering(CallApi::Messages), events(broken())).await;
        assert!(text.contains("\n\nevent: error\ndata: "), "{text}");
        let value = error(&text);
        assert_eq!(
            (&value["type"], &value["error"]["type"]),
            (&"error".into(), &"api_error".into())
        );
        let text = shown(rendering(CallApi::Responses), events(broken())).await;
        assert!(text.contains("\n\nevent: error\ndata: "), "{text}");
        let value = error(&text);
        assert_eq!(
            (&value["type"], &value["code"]),
            (&"error".into(), &"worker_reset".into())
        );
        assert_eq!(value["error"]["message"], "it broke");
        for api in [CallApi::ChatCompletions, CallApi::Messages] {
            let text = shown(rendering(api), events(end(FinishReason::Cancelled))).await;
            assert_eq!(error(&text)["error"]["message"], "the task was cancelled");
        }
    }

    #[tokio::test]
    async fn a_stream_that_has_nothing_yet_begins_with_a_comment_and_is_kept_alive() {
        let log = EventLog::new();
        log.append(started()).unwrap();
        let hasty = Rendering {
            keep_alive: Duration::from_millis(1),
            ..rendering(CallApi::ChatCompletions)
        };
        let reader = Arc::new(());
        let held = Arc::clone(&reader);
        let status = || Some("preparing: x".to_owned());
        let stream = render(log.cursor(0), hasty, String::new(), held, status);
        let mut stream = Box::pin(stream);
        for _ in 0..3 {
            assert_eq!(stream.next().await.unwrap().unwrap(), ": preparing: x\n\n");
        }
        assert_eq!(Arc::strong_count(&reader), 2, "the reader is there");
        drop(stream);
        assert_eq!(Arc::strong_count(&reader), 1, "and leaves with its stream");
    }
}
