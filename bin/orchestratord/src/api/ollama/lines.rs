//! An answer as lines of JSON, one for each piece, and as one object.
//!
//! Pure: what time it is, and how long it took, is given.

use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use jiff::Timestamp;
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::answer::{Figures, Piece, ToolCall};
use super::errors::OllamaError;
use crate::services::event_log::Failure;

/// Which request is answered; they differ in where the text stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Chat,
    Generate,
}

/// What every line of one answer has in common.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    pub(super) form: Form,
    /// As the client calls it.
    pub(super) model: String,
}

#[derive(Debug, Serialize)]
struct Line<'a> {
    model: &'a str,
    #[serde(serialize_with = "write_time")]
    created_at: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Option<Message<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    logprobs: &'a [Value],
    done: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    done_reason: Option<&'static str>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    figures: Option<Shown>,
}

#[derive(Debug, Serialize)]
struct Message<'a> {
    role: &'static str,
    content: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    thinking: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tool_calls: &'a [ToolCall],
}

/// Times in nanoseconds.
#[derive(Debug, Serialize)]
struct Shown {
    total_duration: u64,
    load_duration: u64,
    prompt_eval_count: u64,
    prompt_eval_duration: u64,
    eval_count: u64,
    eval_duration: u64,
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// A time as these clients read it, to the microsecond.
pub(super) fn written(time: Timestamp) -> String {
    format!("{time:.6}")
}

/// As [`written`], straight into the line.
fn write_time<S: Serializer>(time: &Timestamp, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{time:.6}"))
}

impl Lines {
    /// A line of a stream.
    pub(super) fn piece(&self, out: &mut BytesMut, piece: &Piece<'_>, now: Timestamp) {
        end_line(out, &self.line(piece, now));
    }

    /// The last line of a stream. What was held back until then has a line before.
    pub(super) fn done(
        &self,
        out: &mut BytesMut,
        held_back: &Piece<'_>,
        figures: &Figures,
        total: Duration,
        now: Timestamp,
    ) {
        if !held_back.is_empty() {
            self.piece(out, held_back, now);
        }
        end_line(out, &self.ended(&Piece::default(), figures, total, now));
    }

    /// The last line of a stream that failed.
    pub(super) fn failed(out: &mut BytesMut, failure: &Failure) {
        end_line(out, &OllamaError::of(failure));
    }

    /// A whole answer.
    pub(super) fn whole(
        &self,
        piece: &Piece<'_>,
        figures: &Figures,
        total: Duration,
        now: Timestamp,
    ) -> Bytes {
        let mut out = BytesMut::new();
        end_line(&mut out, &self.ended(piece, figures, total, now));
        out.freeze()
    }

    /// The answer to a request without words: that the model is in memory, or is not.
    pub(super) fn without_words(
        &self,
        done_reason: &'static str,
        load: Duration,
        now: Timestamp,
    ) -> Bytes {
        #[derive(Serialize)]
        struct Loaded<'a> {
            #[serde(flatten)]
            line: Line<'a>,
            total_duration: u64,
            load_duration: u64,
        }
        let nothing = Piece::default();
        let mut line = self.line(&nothing, now);
        (line.done, line.done_reason) = (true, Some(done_reason));
        let loaded = Loaded {
            line,
            total_duration: nanos(load),
            load_duration: nanos(load),
        };
        let mut out = BytesMut::new();
        end_line(&mut out, &loaded);
        out.freeze()
    }

    fn line<'a>(&'a self, piece: &'a Piece<'_>, now: Timestamp) -> Line<'a> {
        let thinking = Some(&*piece.thinking).filter(|thinking| !thinking.is_empty());
        let chat = self.form == Form::Chat;
        let message = Message {
            role: "assistant",
            content: &piece.text,
            thinking,
            tool_calls: &piece.tool_calls,
        };
        Line {
            model: &self.model,
            created_at: now,
            message: chat.then_some(message),
            response: (!chat).then_some(&*piece.text),
            thinking: thinking.filter(|_| !chat),
            logprobs: &piece.logprobs,
            done: false,
            done_reason: None,
            figures: None,
        }
    }

    fn ended<'a>(
        &'a self,
        piece: &'a Piece<'_>,
        figures: &Figures,
        total: Duration,
        now: Timestamp,
    ) -> Line<'a> {
        Line {
            done: true,
            done_reason: Some(figures.done_reason),
            figures: Some(Shown {
                total_duration: nanos(total),
                load_duration: nanos(figures.load),
                prompt_eval_count: figures.prompt_tokens,
                prompt_eval_duration: nanos(figures.prompt),
                eval_count: figures.tokens,
                eval_duration: nanos(figures.decode),
            }),
            ..self.line(piece, now)
        }
    }
}

/// JSON holds no raw line break, so it is always one line.
fn end_line<T: Serialize>(out: &mut BytesMut, line: &T) {
    // Writing to memory cannot fail, and these types hold no map with keys
    // other than strings, which is all that JSON could refuse.
    let written = serde_json::to_writer(out.writer(), line);
    debug_assert!(written.is_ok(), "a line that JSON cannot hold");
    out.put_u8(b'\n');
}

#[cfg(test)]
mod tests {
    use super::super::answer::tests::{delta, end, started};
    use super::super::answer::{Reading, Step};
    use super::*;
    use crate::services::event_log::TaskEvent;
    use proptest::prelude::*;
    use serde_json::json;
    use worker_adapters_adapter_api::FinishReason;

    const CHAT: Form = Form::Chat;

    fn lines(form: Form) -> Lines {
        let model = "haiku:latest".to_owned();
        Lines { form, model }
    }

    /// As a stream is written, with a clock that stands.
    fn rendered(form: Form, events: &[TaskEvent]) -> String {
        let (lines, mut reading, mut out) = (lines(form), Reading::default(), BytesMut::new());
        let now = Timestamp::UNIX_EPOCH;
        for event in events {
            match reading.step(event.view()) {
                Step::Nothing => {}
                Step::Piece(piece) => lines.piece(&mut out, &piece, now),
                Step::Done(held_back, figures) => {
                    lines.done(&mut out, &held_back, &figures, Duration::from_secs(1), now);
                }
                Step::Failed(failure) => Lines::failed(&mut out, &failure),
            }
        }
        String::from_utf8(out.to_vec()).unwrap()
    }

    #[test]
    fn a_stream_as_clients_see_it() {
        let tool =
            json!({"tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]});
        let events = [
            started(2),
            delta(&json!({"role": "assistant", "content": null})),
            delta(&json!({"reasoning_content": "hm"})),
            delta(&json!({"content": "a\nb"})),
            delta(&tool),
            delta(&json!({})),
            end(FinishReason::Stop),
        ];
        insta::assert_snapshot!(rendered(CHAT, &events), @r#"
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","message":{"role":"assistant","content":"","thinking":"hm"},"done":false}
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","message":{"role":"assistant","content":"a\nb"},"done":false}
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","message":{"role":"assistant","content":"","tool_calls":[{"id":"x","function":{"index":0,"name":"f","arguments":{}}}]},"done":false}
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"stop","total_duration":1000000000,"load_duration":2000000,"prompt_eval_count":5,"prompt_eval_duration":3000000,"eval_count":2,"eval_duration":12500000}
        "#);
        let generated = rendered(Form::Generate, &events[2..4]);
        insta::assert_snapshot!(generated, @r#"
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","response":"","thinking":"hm","done":false}
        {"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","response":"a\nb","done":false}
        "#);
    }

    #[test]
    fn what_goes_wrong_is_a_line() {
        let failure = Failure::cancelled().with_hint("ask again");
        let failed = [TaskEvent::Error(Box::new(failure))];
        insta::assert_snapshot!(rendered(CHAT, &failed), @r#"{"error":"the task was cancelled; ask again"}"#);
        let loaded =
            lines(CHAT).without_words("load", Duration::from_nanos(7), Timestamp::UNIX_EPOCH);
        insta::assert_snapshot!(String::from_utf8(loaded.to_vec()).unwrap(), @r#"{"model":"haiku:latest","created_at":"1970-01-01T00:00:00.000000Z","message":{"role":"assistant","content":""},"done":true,"done_reason":"load","total_duration":7,"load_duration":7}"#);
    }

    /// Any event that an engine may send, and some that none should.
    fn events() -> impl Strategy<Value = Vec<TaskEvent>> {
        let text = prop_oneof![Just(Value::Null), ".*".prop_map(Value::from)];
        let call = (0_u64..3, "[a-z]{0,3}", "[{}\":a]{0,4}").prop_map(|(index, name, arguments)| {
            json!([{"index": index, "function": {"name": name, "arguments": arguments}}])
        });
        let call = proptest::option::of(call);
        let one = (text.clone(), text, call).prop_map(|(content, thinking, calls)| {
            delta(&json!({
                "content": content, "reasoning_content": thinking, "tool_calls": calls,
            }))
        });
        let last = prop_oneof![
            Just(end(FinishReason::Stop)),
            Just(end(FinishReason::Length)),
            Just(end(FinishReason::Cancelled)),
        ];
        (proptest::collection::vec(one, 0..20), last).prop_map(|(mut events, last)| {
            events.push(last);
            events
        })
    }

    proptest! {
        /// Lines are JSON, none is empty, the last alone is the end, and nothing is lost.
        #[test]
        fn any_answer_is_lines_of_json_that_hold_all_of_it(events in events()) {
            let text = |key: &str| -> String {
                events.iter().filter_map(|event| match event {
                    TaskEvent::Chunk(chunk) => {
                        let data: Value = serde_json::from_str(&chunk.data).unwrap();
                        data["choices"][0]["delta"][key].as_str().map(str::to_owned)
                    }
                    _ => None,
                }).collect()
            };
            for form in [CHAT, Form::Generate] {
                let rendered = rendered(form, &events);
                prop_assert!(rendered.ends_with('\n'));
                let lines: Vec<Value> = rendered
                    .split_terminator('\n')
                    .map(|line| serde_json::from_str(line).unwrap())
                    .collect();
                let (last, before) = lines.split_last().unwrap();
                prop_assert!(last["done"] == true || last["error"].is_string());
                prop_assert!(before.iter().all(|line| line["done"] == false));
                let told = |line: &Value, chat: &str, generate: &str| match form {
                    Form::Chat => line["message"][chat].as_str().unwrap_or_default().to_owned(),
                    Form::Generate => line[generate].as_str().unwrap_or_default().to_owned(),
                };
                let content: String = lines.iter().map(|line| told(line, "content", "response")).collect();
                let thinking: String = lines.iter().map(|line| told(line, "thinking", "thinking")).collect();
                prop_assert_eq!(content, text("content"));
                prop_assert_eq!(thinking, text("reasoning_content"));
            }
        }
    }
}
