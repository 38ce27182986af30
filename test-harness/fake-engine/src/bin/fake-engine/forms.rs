//! How an answer is written, API by API, as recorded from llama-server b11434.

use std::fmt::Write;

use bytes::Bytes;
use serde_json::{Map, Value, json};

const ID: &str = "chatcmpl-fake";

/// The API that an answer is written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// The engine's own `/completion`.
    Native,
    Chat,
    Completions,
    Responses,
    Messages,
}

/// An answer so far.
#[derive(Debug)]
pub(crate) struct Told<'a> {
    pub(crate) model: &'a str,
    pub(crate) request: &'a Map<String, Value>,
    pub(crate) prompt_tokens: u64,
    pub(crate) sent: u64,
    /// All pieces together.
    pub(crate) text: &'a str,
    /// Whether an event was written before.
    pub(crate) begun: bool,
    pub(crate) elapsed_ms: f64,
}

impl Told<'_> {
    /// Whether the answer ends because no more tokens were asked for.
    pub(crate) fn limited(&self, form: Form) -> bool {
        form.most_tokens(self.request) == Some(self.sent)
    }

    pub(crate) fn timings(&self) -> Value {
        json!({
            "cache_n": 0, "prompt_n": self.prompt_tokens, "prompt_ms": 1.0,
            "predicted_n": self.sent, "predicted_ms": self.elapsed_ms,
        })
    }

    fn include_usage(&self) -> bool {
        let options = self.request.get("stream_options");
        options.and_then(|options| options.get("include_usage")) == Some(&json!(true))
    }

    fn openai_usage(&self) -> Value {
        json!({
            "completion_tokens": self.sent, "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.sent + self.prompt_tokens, "prompt_tokens_details": {"cached_tokens": 0},
        })
    }

    fn finish_reason(&self, form: Form) -> &'static str {
        if self.limited(form) { "length" } else { "stop" }
    }

    fn chat_chunk(&self, choices: &Value) -> Value {
        json!({
            "choices": choices, "created": 1, "id": ID, "model": self.model,
            "system_fingerprint": "fake", "object": "chat.completion.chunk",
        })
    }

    fn text_chunk(&self, text: &str, finish_reason: Option<&str>) -> Value {
        json!({
            "choices": [{"text": text, "index": 0, "logprobs": null, "finish_reason": finish_reason}],
            "created": 1, "model": self.model, "system_fingerprint": "fake",
            "object": "text_completion", "id": ID,
        })
    }

    fn role(&self) -> Value {
        self.chat_chunk(&json!([{
            "finish_reason": null, "index": 0, "delta": {"role": "assistant", "content": null},
        }]))
    }

    fn item(&self) -> Value {
        json!({
            "type": "message", "status": "completed", "id": "msg_fake", "role": "assistant",
            "content": [{"type": "output_text", "annotations": [], "logprobs": [], "text": self.text}],
        })
    }

    fn response(&self) -> Value {
        json!({
            "id": "resp_fake", "object": "response", "created_at": 1, "status": "completed",
            "model": self.model, "output": [self.item()],
            "usage": {
                "input_tokens": self.prompt_tokens, "output_tokens": self.sent,
                "total_tokens": self.prompt_tokens + self.sent,
                "input_tokens_details": {"cached_tokens": 0},
            },
        })
    }

    fn stop_reason(&self) -> &'static str {
        if self.limited(Form::Messages) {
            "max_tokens"
        } else {
            "end_turn"
        }
    }

    fn message(&self, content: &Value, stop_reason: Option<&str>, output_tokens: u64) -> Value {
        json!({
            "id": ID, "type": "message", "role": "assistant", "content": content,
            "model": self.model, "stop_reason": stop_reason, "stop_sequence": null,
            "usage": {
                "cache_read_input_tokens": 0, "input_tokens": self.prompt_tokens,
                "output_tokens": output_tokens,
            },
        })
    }
}

impl Form {
    /// The most tokens that the request asks for.
    pub(crate) fn most_tokens(self, request: &Map<String, Value>) -> Option<u64> {
        let keys: &[&str] = match self {
            Self::Native => &["n_predict"],
            Self::Chat => &["max_tokens", "max_completion_tokens", "n_predict"],
            Self::Completions => &["max_tokens", "n_predict"],
            Self::Responses => &["max_output_tokens"],
            Self::Messages => &["max_tokens"],
        };
        keys.iter()
            .find_map(|key| request.get(*key).and_then(Value::as_u64))
    }

    /// A word about the prompt; Anthropic's API has none.
    pub(crate) fn progress(self, told: &Told<'_>, progress: &Value) -> Bytes {
        let with = |mut event: Value| {
            event["prompt_progress"] = progress.clone();
            event
        };
        match self {
            Self::Native => data(&with(json!({
                "index": 0, "content": "", "tokens": [0], "stop": false, "id_slot": -1,
                "tokens_predicted": 0, "tokens_evaluated": told.prompt_tokens,
            }))),
            Self::Chat => data(&with(told.role())),
            Self::Completions => data(&with(told.text_chunk("", None))),
            Self::Responses => {
                let mut events = Vec::new();
                if !told.begun {
                    events.push(response_event("response.created"));
                }
                events.push(with(response_event("response.in_progress")));
                named(&events)
            }
            Self::Messages => Bytes::new(),
        }
    }

    /// One more piece; what goes before the first comes with it.
    pub(crate) fn piece(self, told: &Told<'_>, piece: &str) -> Bytes {
        let mut opening = if told.sent == 1 {
            self.opening(told)
        } else {
            Vec::new()
        };
        match self {
            Self::Native => data(&json!({
                "index": 0, "content": piece, "tokens": [told.sent], "stop": false, "id_slot": -1,
                "tokens_predicted": told.sent, "tokens_evaluated": told.prompt_tokens,
            })),
            Self::Chat => {
                opening.push(told.chat_chunk(&json!([{
                    "finish_reason": null, "index": 0, "delta": {"content": piece},
                }])));
                all(&opening)
            }
            Self::Completions => data(&told.text_chunk(piece, None)),
            Self::Responses => {
                opening.push(json!({
                    "type": "response.output_text.delta", "item_id": "msg_fake", "delta": piece,
                }));
                named(&opening)
            }
            Self::Messages => {
                opening.push(json!({
                    "type": "content_block_delta", "index": 0,
                    "delta": {"type": "text_delta", "text": piece},
                }));
                named(&opening)
            }
        }
    }

    /// The end of a stream. The engine's own API has more to say, and says it itself.
    pub(crate) fn last(self, told: &Told<'_>) -> Bytes {
        let mut events = if told.sent == 0 {
            self.opening(told)
        } else {
            Vec::new()
        };
        let finish_reason = told.finish_reason(self);
        match self {
            Self::Native => Bytes::new(),
            Self::Chat => {
                events.push(told.chat_chunk(
                    &json!([{"finish_reason": finish_reason, "index": 0, "delta": {}}]),
                ));
                if told.include_usage() {
                    let mut usage = told.chat_chunk(&json!([]));
                    usage["usage"] = told.openai_usage();
                    events.push(usage);
                }
                if let Some(last) = events.last_mut() {
                    last["timings"] = told.timings();
                }
                done(&events)
            }
            Self::Completions => {
                let mut last = told.text_chunk("", Some(finish_reason));
                last["usage"] = told.openai_usage();
                last["timings"] = told.timings();
                done(&[last])
            }
            Self::Responses => {
                events.extend([
                    json!({"type": "response.output_text.done", "item_id": "msg_fake", "text": told.text}),
                    json!({"type": "response.output_item.done", "item": told.item()}),
                    json!({
                        "type": "response.completed", "response": told.response(), "timings": told.timings(),
                    }),
                ]);
                named(&events)
            }
            Self::Messages => {
                events.extend([
                    json!({"type": "content_block_stop", "index": 0}),
                    json!({
                        "type": "message_delta", "usage": {"output_tokens": told.sent},
                        "delta": {"stop_reason": told.stop_reason(), "stop_sequence": null},
                    }),
                    json!({"type": "message_stop"}),
                ]);
                named(&events)
            }
        }
    }

    /// An answer that does not stream. The engine's own API writes its own.
    pub(crate) fn whole(self, told: &Told<'_>) -> Value {
        let finish_reason = told.finish_reason(self);
        match self {
            Self::Native => Value::Null,
            Self::Chat => json!({
                "choices": [{
                    "finish_reason": finish_reason, "index": 0,
                    "message": {"role": "assistant", "content": told.text},
                }],
                "created": 1, "model": told.model, "system_fingerprint": "fake",
                "object": "chat.completion", "usage": told.openai_usage(), "id": ID,
                "timings": told.timings(),
            }),
            Self::Completions => {
                let mut answer = told.text_chunk(told.text, Some(finish_reason));
                answer["usage"] = told.openai_usage();
                answer["timings"] = told.timings();
                answer
            }
            Self::Responses => told.response(),
            Self::Messages => told.message(
                &json!([{"type": "text", "text": told.text}]),
                Some(told.stop_reason()),
                told.sent,
            ),
        }
    }

    /// What a stream begins with.
    fn opening(self, told: &Told<'_>) -> Vec<Value> {
        match self {
            Self::Native | Self::Completions => Vec::new(),
            Self::Chat => vec![told.role()],
            Self::Responses => {
                let mut events = Vec::new();
                if !told.begun {
                    events.push(response_event("response.created"));
                    events.push(response_event("response.in_progress"));
                }
                events.push(json!({
                    "type": "response.output_item.added",
                    "item": {"content": [], "id": "msg_fake", "role": "assistant", "status": "in_progress", "type": "message"},
                }));
                events.push(json!({
                    "type": "response.content_part.added", "item_id": "msg_fake",
                    "part": {"type": "output_text", "text": ""},
                }));
                events
            }
            Self::Messages => vec![
                json!({"type": "message_start", "message": told.message(&json!([]), None, 0)}),
                json!({
                    "type": "content_block_start", "index": 0,
                    "content_block": {"type": "text", "text": ""},
                }),
            ],
        }
    }
}

fn response_event(kind: &str) -> Value {
    json!({
        "type": kind,
        "response": {"id": "resp_fake", "object": "response", "status": "in_progress"},
    })
}

pub(crate) fn data(event: &Value) -> Bytes {
    Bytes::from(format!("data: {event}\n\n"))
}

fn all(events: &[Value]) -> Bytes {
    let mut text = String::new();
    for event in events {
        // Writing to a String cannot fail.
        let _ = write!(text, "data: {event}\n\n");
    }
    Bytes::from(text)
}

fn done(events: &[Value]) -> Bytes {
    Bytes::from([&all(events)[..], b"data: [DONE]\n\n"].concat())
}

/// Events that have their type for a name.
fn named(events: &[Value]) -> Bytes {
    let mut text = String::new();
    for event in events {
        let name = event["type"].as_str().unwrap_or_default();
        let _ = write!(text, "event: {name}\ndata: {event}\n\n");
    }
    Bytes::from(text)
}
