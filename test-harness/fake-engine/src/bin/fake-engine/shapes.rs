//! The JSON shapes of llama-server b11434, as recorded from the real one.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};

pub(crate) fn error(code: u16, kind: &str, message: &str) -> Response {
    let body = json!({"error": {"code": code, "message": message, "type": kind}});
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(body)).into_response()
}

pub(crate) fn loading() -> Response {
    error(503, "unavailable_error", "Loading model")
}

pub(crate) fn context_exceeded(prompt_tokens: u64, ctx: u64) -> Response {
    let message = format!(
        "request ({prompt_tokens} tokens) exceeds the available context size ({ctx} tokens), try increasing it"
    );
    let body = json!({"error": {
        "code": 400,
        "message": message,
        "type": "exceed_context_size_error",
        "n_prompt_tokens": prompt_tokens,
        "n_ctx": ctx,
    }});
    (StatusCode::BAD_REQUEST, Json(body)).into_response()
}

/// The parameters in force: defaults, overlaid with what was asked for.
pub(crate) fn generation_settings(request: &Map<String, Value>) -> Value {
    let mut settings = json!({
        "seed": u32::MAX, "temperature": 0.8, "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05,
        "repeat_penalty": 1.0, "stop": [], "max_tokens": -1, "n_predict": -1, "grammar": "",
        "stream": false, "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
    });
    if let Some(settings) = settings.as_object_mut() {
        for (key, value) in request {
            if settings.contains_key(key) {
                settings.insert(key.clone(), value.clone());
            }
        }
        if let Some(n_predict) = request.get("n_predict") {
            settings.insert("max_tokens".to_owned(), n_predict.clone());
        }
    }
    settings
}

pub(crate) fn props(build: &str, model: &str, slots: usize, slot_ctx: u64) -> Value {
    let mut params = generation_settings(&Map::new());
    if let Some(params) = params.as_object_mut() {
        // The real engine lists these only in a completion's settings.
        params.remove("stop");
        params.remove("grammar");
    }
    json!({
        "default_generation_settings": {"params": params, "n_ctx": slot_ctx},
        "total_slots": slots,
        "model_alias": model,
        "model_path": model,
        "modalities": {"vision": false, "audio": false},
        "chat_template": "{% for message in messages %}...{% endfor %}",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "build_info": build,
        "is_sleeping": false,
    })
}

/// ChatML, as the small test model has it.
pub(crate) fn chat_prompt(messages: &[Value]) -> String {
    use std::fmt::Write;
    let mut prompt = String::new();
    for message in messages {
        let text = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = write!(
            prompt,
            "<|im_start|>{}\n{}<|im_end|>\n",
            text("role"),
            text("content")
        );
    }
    prompt.push_str("<|im_start|>assistant\n");
    prompt
}
