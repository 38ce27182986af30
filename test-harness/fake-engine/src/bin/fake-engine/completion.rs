//! `POST /completion`: the answer, and the ways it goes wrong.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt, stream};
use serde_json::{Map, Value, json};
use test_harness_fake_engine::{Fault, orders};
use tokio::time::sleep;

use crate::forms::{Form, Told, data};
use crate::routes::Engine;
use crate::shapes;
use crate::slots::Slot;

/// Between two parts of a cut event, so that the reader sees them apart.
const CUT_PAUSE: Duration = Duration::from_micros(200);
/// Before a fault, so that what was written before has left the process.
const FAULT_PAUSE: Duration = Duration::from_millis(20);

pub(crate) async fn completion(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    engine.remember(request.clone());
    let Value::Object(request) = request else {
        let message = "request body must be a JSON object";
        return shapes::error(400, "invalid_request_error", message);
    };
    let Some(prompt) = request.get("prompt").and_then(Value::as_str) else {
        let message = "[json.exception.out_of_range.403] key 'prompt' not found";
        return shapes::error(400, "invalid_request_error", message);
    };
    let asked = Asked {
        prompt: prompt.to_owned(),
        request,
        form: Form::Native,
    };
    answer(engine, asked).await
}

/// What is asked, in whichever API.
pub(crate) struct Asked {
    /// The text to go on from.
    pub(crate) prompt: String,
    pub(crate) request: Map<String, Value>,
    pub(crate) form: Form,
}

pub(crate) async fn answer(engine: Arc<Engine>, asked: Asked) -> Response {
    let (prompt_tokens, ctx) = (engine.count_tokens(&asked.prompt), engine.args.slot_ctx());
    if prompt_tokens >= ctx {
        return shapes::context_exceeded(prompt_tokens, ctx);
    }
    let fault = next_fault(&engine);
    match fault {
        Some(Fault::Status500) => return shapes::error(500, "server_error", "failed to decode"),
        Some(Fault::Status503) => return shapes::loading(),
        _ => {}
    }
    // As in the real engine, what it does not know of Anthropic's API is lost.
    let params = match asked.form {
        Form::Messages => shapes::generation_settings(&Map::new()),
        _ => shapes::generation_settings(&asked.request),
    };
    let slot = engine.slots.take(params).await;
    engine
        .prompt_tokens
        .fetch_add(prompt_tokens, Ordering::Relaxed);
    let streamed = asked.request.get("stream").and_then(Value::as_bool) == Some(true);
    let (chunk_bytes, late_headers) = (engine.script.chunk_bytes, engine.script.late_headers);
    let mut answer = Answer::new(engine, asked, prompt_tokens, fault, slot);
    if !streamed {
        return answer.whole().await;
    }
    let first = if late_headers {
        answer.next_event().await
    } else {
        None
    };
    let rest = stream::unfold(answer, |mut answer| async {
        Some((answer.next_event().await?, answer))
    });
    let events = stream::iter(first).chain(rest);
    let body = match chunk_bytes {
        0 => Body::from_stream(events),
        size => Body::from_stream(events.flat_map(move |event| cut(event, size))),
    };
    ([(header::CONTENT_TYPE, "text/event-stream")], body).into_response()
}

/// How many pieces of the answer the prompt ends with, where the script goes on
/// from there.
fn pieces_told(engine: &Engine, prompt: &str) -> u64 {
    let script = &engine.script;
    let told = |count: &usize| prompt.ends_with(&script.pieces[..*count].concat());
    let counts = if script.continues {
        script.pieces.len()
    } else {
        0
    };
    (0..=counts).rev().find(told).unwrap_or(0) as u64
}

fn next_fault(engine: &Engine) -> Option<Fault> {
    if let Some(ordered) = orders::take(&engine.home) {
        return Some(ordered);
    }
    let number = engine.completions.fetch_add(1, Ordering::Relaxed);
    let faulty = engine
        .script
        .faulty_completions
        .is_none_or(|limit| number < limit);
    engine.script.fault.clone().filter(|_| faulty)
}

/// Cuts an event into parts that leave the process one by one.
fn cut(event: io::Result<Bytes>, size: usize) -> impl Stream<Item = io::Result<Bytes>> + Send {
    let parts: Vec<io::Result<Bytes>> = match event {
        Ok(event) => event
            .chunks(size)
            .map(|part| Ok(Bytes::copy_from_slice(part)))
            .collect(),
        Err(error) => vec![Err(error)],
    };
    stream::iter(parts).then(async |part| {
        sleep(CUT_PAUSE).await;
        part
    })
}

/// One completion on its way.
struct Answer {
    engine: Arc<Engine>,
    asked: Asked,
    prompt_tokens: u64,
    fault: Option<Fault>,
    slot: Slot,
    limit: u64,
    sent: u64,
    /// All pieces so far.
    text: String,
    /// Whether an event was written.
    begun: bool,
    /// Pieces that were in the prompt already.
    skipped: u64,
    /// Words about the prompt that are still to come.
    progress_left: u64,
    ended: bool,
    started: Instant,
}

impl Answer {
    fn new(
        engine: Arc<Engine>,
        asked: Asked,
        prompt_tokens: u64,
        fault: Option<Fault>,
        slot: Slot,
    ) -> Self {
        let skipped = pieces_told(&engine, &asked.prompt);
        let most = asked.form.most_tokens(&asked.request);
        let own = if engine.script.cycle || engine.script.numbered {
            u64::MAX
        } else {
            engine.script.pieces.len() as u64 - skipped
        };
        let wanted = asked
            .request
            .get("return_progress")
            .and_then(Value::as_bool);
        let progress = wanted == Some(true) && asked.form != Form::Messages;
        Self {
            progress_left: if progress {
                engine.script.progress_events
            } else {
                0
            },
            skipped,
            limit: most.unwrap_or(u64::MAX).min(own),
            engine,
            asked,
            prompt_tokens,
            fault,
            slot,
            sent: 0,
            text: String::new(),
            begun: false,
            ended: false,
            started: Instant::now(),
        }
    }

    /// The next event's bytes, a broken connection, or the stream's end.
    async fn next_event(&mut self) -> Option<io::Result<Bytes>> {
        if self.ended {
            return None;
        }
        if self.strikes() {
            return self.strike().await;
        }
        let event = if self.progress_left > 0 {
            self.progress().await
        } else {
            self.wait().await;
            if self.sent < self.limit {
                let piece = self.take_piece();
                self.asked.form.piece(&self.told(), &piece)
            } else {
                self.ended = true;
                self.slot.finish();
                self.last()
            }
        };
        self.begun = true;
        Some(Ok(event))
    }

    fn strikes(&self) -> bool {
        self.fault.as_ref().and_then(Fault::after_tokens) == Some(self.sent)
    }

    fn told(&self) -> Told<'_> {
        Told {
            model: self.engine.args.model_name(),
            request: &self.asked.request,
            prompt_tokens: self.prompt_tokens,
            sent: self.sent,
            text: &self.text,
            begun: self.begun,
            elapsed_ms: self.started.elapsed().as_secs_f64() * 1000.0,
        }
    }

    /// A word about the prompt, after its share of the time.
    async fn progress(&mut self) -> Bytes {
        let script = &self.engine.script;
        let events = script.progress_events;
        sleep(Duration::from_millis(script.first_token_ms / (events + 1))).await;
        self.progress_left -= 1;
        let processed = self.prompt_tokens * (events - self.progress_left) / events;
        let progress = json!({
            "total": self.prompt_tokens, "cache": 0, "processed": processed, "time_ms": 1,
        });
        self.asked.form.progress(&self.told(), &progress)
    }

    async fn wait(&self) {
        let script = &self.engine.script;
        let pause = match self.sent {
            0 => script.first_token_ms / (script.progress_events + 1),
            sent if sent < self.limit => script.token_ms,
            _ => 0,
        };
        if pause > 0 {
            sleep(Duration::from_millis(pause)).await;
        }
    }

    fn take_piece(&mut self) -> String {
        let script = &self.engine.script;
        let piece = if script.numbered {
            let number = first_number(&self.asked.prompt) + self.sent;
            format!("w{number} ")
        } else {
            let place = (self.skipped + self.sent) as usize % script.pieces.len().max(1);
            script.pieces.get(place).cloned().unwrap_or_default()
        };
        self.sent += 1;
        self.text.push_str(&piece);
        self.slot.show_decoded(self.sent);
        self.engine.tokens_predicted.fetch_add(1, Ordering::Relaxed);
        piece
    }

    async fn strike(&mut self) -> Option<io::Result<Bytes>> {
        sleep(FAULT_PAUSE).await;
        self.ended = true;
        match self.fault.take()? {
            Fault::Crash { exit_code, .. } => std::process::exit(exit_code),
            Fault::Hang { .. } => std::future::pending().await,
            Fault::Cut { .. } => Some(Err(io::Error::other("cut, as the script says"))),
            // The last two never begin a stream.
            Fault::EndWithoutFinal { .. } | Fault::Status500 | Fault::Status503 => None,
            Fault::Garbage { .. } => Some(Ok(Bytes::from_static(b"data: {\"content\": oops\n\n"))),
            Fault::ErrorEvent { .. } => Some(Ok(data(&json!({"error": {
                "code": 500, "message": "failed to get logits", "type": "server_error",
            }})))),
        }
    }

    /// The answer in one piece. A fault strikes before anything of it is written.
    async fn whole(mut self) -> Response {
        while self.sent < self.limit && !self.strikes() {
            self.wait().await;
            self.take_piece();
        }
        if self.strikes() {
            if matches!(self.fault, Some(Fault::ErrorEvent { .. })) {
                return shapes::error(500, "server_error", "failed to get logits");
            }
            let json = [(header::CONTENT_TYPE, "application/json")];
            let body = match self.strike().await {
                Some(bytes) => Body::from_stream(stream::iter([bytes])),
                None => Body::empty(),
            };
            return (json, body).into_response();
        }
        self.slot.finish();
        match self.asked.form {
            Form::Native => Json(self.own_last(&self.text)).into_response(),
            form => Json(form.whole(&self.told())).into_response(),
        }
    }

    fn last(&self) -> Bytes {
        match self.asked.form {
            Form::Native => data(&self.own_last("")),
            form => form.last(&self.told()),
        }
    }

    /// The last event of the engine's own API.
    fn own_last(&self, content: &str) -> Value {
        let (told, request) = (self.told(), &self.asked.request);
        json!({
            "index": 0, "content": content, "tokens": [], "id_slot": 0, "stop": true,
            "model": self.engine.args.model,
            "tokens_predicted": self.sent, "tokens_evaluated": self.prompt_tokens,
            "generation_settings": shapes::generation_settings(request),
            "prompt": request.get("prompt"),
            "has_new_line": false, "truncated": false,
            "stop_type": if told.limited(Form::Native) { "limit" } else { "eos" }, "stopping_word": "",
            "tokens_cached": self.prompt_tokens + self.sent,
            "timings": told.timings(),
        })
    }
}

/// Where a numbered answer to this prompt begins: after the word that the
/// prompt ends with, if it is one of such an answer.
fn first_number(prompt: &str) -> u64 {
    let last = prompt.split_whitespace().next_back();
    let number = last.and_then(|word| word.strip_prefix('w')?.parse::<u64>().ok());
    number.map_or(0, |number| number + 1)
}
