//! Answers to calls, in OpenAI's form.

use bytestring::ByteString;
use serde_json::{Value, json};
use worker_adapters_adapter_api::{
    CallAnswer, CallApi, CallChunk, EngineCall, TokenEvent, WorkerError,
};

/// Chats and completions are all that a script answers.
pub(crate) fn offered(api: CallApi) -> Result<(), WorkerError> {
    match api {
        CallApi::ChatCompletions | CallApi::Completions => Ok(()),
        other => Err(WorkerError::NotOffered {
            what: format!("{} (a scripted engine)", other.path()),
        }),
    }
}

/// One piece of a streamed answer.
pub(crate) fn piece(api: CallApi, text: String, tokens_out: u64) -> CallChunk {
    let choice = match api {
        CallApi::Completions => json!({"index": 0, "text": text, "finish_reason": null}),
        _ => json!({"index": 0, "delta": {"content": text}, "finish_reason": null}),
    };
    CallChunk {
        name: None,
        data: chunk(api, &choice).to_string().into(),
        text: text.into(),
        tokens_out,
    }
}

/// What comes before the end: the last event of a stream, or the whole answer.
pub(crate) fn last(call: &EngineCall, text: String, tokens_out: u64, limited: bool) -> TokenEvent {
    let reason = if limited { "length" } else { "stop" };
    if call.stream {
        let choice = match call.api {
            CallApi::Completions => json!({"index": 0, "text": "", "finish_reason": reason}),
            _ => json!({"index": 0, "delta": {}, "finish_reason": reason}),
        };
        return TokenEvent::Chunk(CallChunk {
            name: None,
            data: chunk(call.api, &choice).to_string().into(),
            text: ByteString::new(),
            tokens_out,
        });
    }
    let (object, choice) = match call.api {
        CallApi::Completions => (
            "text_completion",
            json!({"index": 0, "text": text, "finish_reason": reason}),
        ),
        _ => (
            "chat.completion",
            json!({
                "index": 0, "finish_reason": reason,
                "message": {"role": "assistant", "content": text},
            }),
        ),
    };
    let usage = json!({
        "prompt_tokens": 0, "completion_tokens": tokens_out, "total_tokens": tokens_out,
    });
    let body = json!({
        "id": "mock", "created": 0, "model": "mock", "object": object, "choices": [choice], "usage": usage,
    });
    TokenEvent::Answer(CallAnswer {
        body: body.to_string().into(),
        text,
    })
}

fn chunk(api: CallApi, choice: &Value) -> Value {
    let object = match api {
        CallApi::Completions => "text_completion",
        _ => "chat.completion.chunk",
    };
    json!({"id": "mock", "created": 0, "model": "mock", "object": object, "choices": [choice]})
}
