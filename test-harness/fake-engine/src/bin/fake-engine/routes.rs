//! The routes, and the state behind them.

use std::collections::VecDeque;
use std::fmt::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::args::Args;
use crate::slots::Slots;
use crate::{calls, completion, shapes};

/// How many requests are remembered for `/fake/requests`.
const REMEMBERED: usize = 1000;

#[derive(Debug)]
pub(crate) struct Engine {
    pub(crate) script: Script,
    /// Where the binary lies, and orders for it.
    pub(crate) home: PathBuf,
    pub(crate) args: Args,
    pub(crate) slots: Slots,
    pub(crate) tokens_predicted: AtomicU64,
    pub(crate) prompt_tokens: AtomicU64,
    pub(crate) completions: AtomicU64,
    /// Accepted so far.
    pub(crate) connections: AtomicU64,
    ready: AtomicBool,
    requests: Mutex<VecDeque<Value>>,
}

impl Engine {
    pub(crate) fn new(script: Script, args: Args, home: PathBuf) -> Self {
        let linger = Duration::from_millis(script.slot_free_ms);
        Self {
            slots: Slots::new(args.parallel, linger),
            script,
            args,
            home,
            tokens_predicted: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            completions: AtomicU64::new(0),
            connections: AtomicU64::new(0),
            ready: AtomicBool::new(false),
            requests: Mutex::default(),
        }
    }

    pub(crate) fn set_ready(&self) {
        self.ready.store(true, Ordering::Release);
    }

    pub(crate) fn remember(&self, request: Value) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if requests.len() == REMEMBERED {
            requests.pop_front();
        }
        requests.push_back(request);
    }

    /// What an answer waits for that has no tokens.
    pub(crate) async fn pause_before_first(&self) {
        let pause = Duration::from_millis(self.script.first_token_ms);
        if !pause.is_zero() {
            tokio::time::sleep(pause).await;
        }
    }

    /// One token per word: enough for every limit that a test wants to meet.
    pub(crate) fn count_tokens(&self, text: &str) -> u64 {
        self.script
            .prompt_tokens
            .unwrap_or_else(|| text.split_whitespace().count() as u64)
    }
}

pub(crate) fn router(engine: Arc<Engine>) -> Router {
    Router::new()
        .route("/health", get(async || Json(json!({"status": "ok"}))))
        .route("/props", get(props))
        .route("/slots", get(slots))
        .route("/metrics", get(metrics))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(calls::detokenize))
        .route("/v1/chat/completions", post(calls::chat_completions))
        .route("/v1/completions", post(calls::completions))
        .route("/v1/responses", post(calls::responses))
        .route("/v1/messages", post(calls::messages))
        .route("/v1/messages/count_tokens", post(calls::count_tokens))
        .route("/v1/embeddings", post(calls::embeddings))
        .route("/v1/rerank", post(calls::rerank))
        .route("/apply-template", post(apply_template))
        .route("/completion", post(completion::completion))
        .fallback(async || shapes::error(404, "not_found_error", "File Not Found"))
        .layer(middleware::from_fn_with_state(Arc::clone(&engine), gate))
        // A conversation with pictures is long, and the real one takes it.
        .layer(DefaultBodyLimit::disable())
        // For tests only; the real engine has no such routes.
        .route("/fake/requests", get(requests))
        .route("/fake/busy", get(busy))
        .route("/fake/connections", get(connections))
        .with_state(engine)
}

/// What the real engine checks before any route: loaded, then allowed.
async fn gate(State(engine): State<Arc<Engine>>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if let Some(key) = engine.args.api_key.as_ref().filter(|_| path != "/health") {
        let given = request
            .headers()
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("Bearer "));
        if given != Some(key.as_str()) {
            return shapes::error(401, "authentication_error", "Invalid API Key");
        }
    }
    if !engine.ready.load(Ordering::Acquire) {
        return shapes::loading();
    }
    next.run(request).await
}

async fn props(State(engine): State<Arc<Engine>>) -> Json<Value> {
    let build = format!("b{}-{}", engine.script.build, engine.script.commit);
    let (slots, ctx) = (engine.slots.total(), engine.args.slot_ctx());
    Json(shapes::props(&build, &engine.args.model, slots, ctx))
}

async fn slots(State(engine): State<Arc<Engine>>) -> Response {
    if engine.script.slots_missing || !engine.args.slots {
        let message = "This server does not support slots endpoint. Start it with `--slots`";
        return shapes::error(501, "not_supported_error", message);
    }
    let ctx = engine.args.slot_ctx();
    let tasks = engine.slots.shown().into_iter().enumerate();
    let slots: Vec<Value> = tasks
        .map(|(id, task)| {
            json!({
                "id": id, "n_ctx": ctx, "speculative": false, "is_processing": task.is_some(),
                "next_token": [{"n_decoded": task.as_ref().map_or(0, |task| task.decoded)}],
                "params": task.map_or_else(|| json!({}), |task| task.params),
            })
        })
        .collect();
    Json(slots).into_response()
}

async fn metrics(State(engine): State<Arc<Engine>>) -> Response {
    if engine.script.metrics_missing || !engine.args.metrics {
        let message = "This server does not support metrics endpoint. Start it with `--metrics`";
        return shapes::error(501, "not_supported_error", message);
    }
    let counters = [
        (
            "prompt_tokens_total",
            "counter",
            engine.prompt_tokens.load(Ordering::Relaxed),
        ),
        (
            "tokens_predicted_total",
            "counter",
            engine.tokens_predicted.load(Ordering::Relaxed),
        ),
        ("requests_processing", "gauge", engine.slots.busy() as u64),
    ];
    let mut text = String::new();
    for (name, kind, value) in counters {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "# HELP llamacpp:{name} Of a fake engine\n# TYPE llamacpp:{name} {kind}\nllamacpp:{name} {value}"
        );
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn tokenize(State(engine): State<Arc<Engine>>, Json(request): Json<Value>) -> Json<Value> {
    let content = request
        .get("content")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let tokens: Vec<u64> = (0..engine.count_tokens(content)).collect();
    Json(json!({"tokens": tokens}))
}

async fn apply_template(Json(request): Json<Value>) -> Response {
    match request.get("messages").and_then(Value::as_array) {
        Some(messages) => Json(json!({"prompt": shapes::chat_prompt(messages)})).into_response(),
        None => shapes::error(400, "invalid_request_error", "'messages' is required"),
    }
}

async fn requests(State(engine): State<Arc<Engine>>) -> Json<Vec<Value>> {
    let requests = engine
        .requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    Json(requests.iter().cloned().collect())
}

async fn busy(State(engine): State<Arc<Engine>>) -> String {
    engine.slots.busy().to_string()
}

async fn connections(State(engine): State<Arc<Engine>>) -> String {
    engine.connections.load(Ordering::Relaxed).to_string()
}
