//! The routes of OpenAI's and Anthropic's APIs. What generates text is answered
//! as `/completion` is, faults and all, and only written another way.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::completion::{Asked, answer};
use crate::forms::Form;
use crate::routes::Engine;
use crate::shapes;

/// Numbers that an embedding has.
const DIMENSIONS: usize = 8;

pub(crate) async fn chat_completions(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    generate(engine, request, Form::Chat, "messages").await
}

pub(crate) async fn completions(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    generate(engine, request, Form::Completions, "prompt").await
}

pub(crate) async fn responses(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    generate(engine, request, Form::Responses, "input").await
}

pub(crate) async fn messages(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    generate(engine, request, Form::Messages, "messages").await
}

async fn generate(engine: Arc<Engine>, request: Value, form: Form, input: &str) -> Response {
    engine.remember(request.clone());
    let message = format!("'{input}' is required");
    let Some(text) = request.get(input).map(text_of) else {
        // The real engine counts this as its own fault in Anthropic's API.
        return match form {
            Form::Messages => shapes::error(500, "server_error", &message),
            _ => shapes::error(400, "invalid_request_error", &message),
        };
    };
    if request.get("grammar").and_then(Value::as_str) == Some("(") {
        let message = "Failed to initialize samplers: failed to parse grammar";
        return shapes::error(400, "invalid_request_error", message);
    }
    let Value::Object(request) = request else {
        return shapes::error(400, "invalid_request_error", &message);
    };
    let asked = Asked {
        prompt: text,
        request,
        form,
    };
    answer(engine, asked).await
}

pub(crate) async fn count_tokens(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    match request.get("messages").map(text_of) {
        Some(text) => Json(json!({"input_tokens": engine.count_tokens(&text)})).into_response(),
        None => shapes::error(500, "server_error", "'messages' is required"),
    }
}

pub(crate) async fn detokenize(Json(request): Json<Value>) -> Json<Value> {
    let tokens = request.get("tokens").and_then(Value::as_array);
    let words: Vec<String> = tokens
        .into_iter()
        .flatten()
        .map(|token| format!("t{token}"))
        .collect();
    Json(json!({"content": words.join(" ")}))
}

pub(crate) async fn embeddings(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    engine.remember(request.clone());
    if !engine.args.embeddings {
        let message = "This server does not support embeddings. Start it with `--embeddings`";
        return shapes::error(501, "not_supported_error", message);
    }
    let inputs = match request.get("input") {
        Some(Value::Array(inputs)) => inputs.iter().map(text_of).collect(),
        Some(input) => vec![text_of(input)],
        None => {
            let message = "\"input\" or \"content\" must be provided";
            return shapes::error(400, "invalid_request_error", message);
        }
    };
    let _slot = engine.slots.take(json!({})).await;
    engine.pause_before_first().await;
    let tokens: u64 = inputs.iter().map(|text| engine.count_tokens(text)).sum();
    let data: Vec<Value> = inputs
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"embedding": embedding(text), "index": index, "object": "embedding"}))
        .collect();
    Json(json!({
        "model": engine.args.model_name(), "object": "list", "data": data,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }))
    .into_response()
}

pub(crate) async fn rerank(
    State(engine): State<Arc<Engine>>,
    Json(request): Json<Value>,
) -> Response {
    engine.remember(request.clone());
    if !engine.args.reranking {
        let message = "This server does not support reranking. Start it with `--reranking`";
        return shapes::error(501, "not_supported_error", message);
    }
    let Some(documents) = request.get("documents").and_then(Value::as_array) else {
        let message = "\"documents\" must be a non-empty string array";
        return shapes::error(400, "invalid_request_error", message);
    };
    let _slot = engine.slots.take(json!({})).await;
    engine.pause_before_first().await;
    let texts: Vec<String> = documents.iter().map(text_of).collect();
    let tokens: u64 = texts.iter().map(|text| engine.count_tokens(text)).sum();
    let results: Vec<Value> = texts
        .iter()
        .enumerate()
        .map(|(index, text)| json!({"index": index, "relevance_score": -(text.len() as f64)}))
        .collect();
    Json(json!({
        "model": engine.args.model_name(), "object": "list", "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }))
    .into_response()
}

/// All texts in a prompt, an input or messages, however deep.
fn text_of(input: &Value) -> String {
    match input {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(text_of).collect::<Vec<_>>().join(" "),
        Value::Object(item) => ["content", "text"]
            .iter()
            .find_map(|key| item.get(*key))
            .map(text_of)
            .unwrap_or_default(),
        _ => String::new(),
    }
}

/// The same text has the same one, and another most likely another.
fn embedding(text: &str) -> Vec<f64> {
    let mut numbers = vec![0.0; DIMENSIONS];
    for (place, byte) in text.bytes().enumerate() {
        numbers[place % DIMENSIONS] += f64::from(byte) / 256.0;
    }
    numbers
}
