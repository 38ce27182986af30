//! The JSON of native tasks, and what failures mean.

use std::borrow::Cow;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use worker_adapters_adapter_api::{ChatMessage, EngineTask, TaskInput, WorkerError};

use crate::settings::Endpoint;

/// How long a server that says it is busy, and not for how long, is left alone.
const BUSY: Duration = Duration::from_secs(1);
/// The longest that a server is left alone for what it says.
const BUSY_AT_MOST: Duration = Duration::from_mins(1);
/// How much of a body that is no error object is repeated.
const QUOTED: usize = 200;

/// The body of a native task. What the task does not name is not sent.
#[derive(Debug, Serialize)]
pub(crate) struct NativeRequest<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    messages: Option<&'a [ChatMessage]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt: Option<Cow<'a, str>>,
    stream: bool,
    stream_options: StreamOptions,
    max_tokens: u32,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    stop: &'a [String],
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    // Not OpenAI's, and known to vLLM, SGLang and llama-server.
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
    /// llama-server's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    repeat_penalty: Option<f64>,
    /// The others' name.
    #[serde(skip_serializing_if = "Option::is_none")]
    repetition_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_format: Option<ResponseFormat<'a>>,
}

#[derive(Debug, Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Debug, Serialize)]
struct ResponseFormat<'a> {
    r#type: &'static str,
    json_schema: NamedSchema<'a>,
}

#[derive(Debug, Serialize)]
struct NamedSchema<'a> {
    name: &'static str,
    schema: &'a serde_json::Value,
    strict: bool,
}

impl<'a> NativeRequest<'a> {
    /// Refuses what OpenAI's API has no words for.
    pub(crate) fn new(task: &'a EngineTask, model: &'a str) -> Result<Self, WorkerError> {
        let sampling = &task.sampling;
        if sampling.grammar.is_some() {
            return Err(WorkerError::NotOffered {
                what: "`grammar`: OpenAI's API knows JSON schemas only".to_owned(),
            });
        }
        let (messages, prompt) = match &task.input {
            TaskInput::Messages(messages) if task.answered.is_empty() => {
                (Some(messages.as_slice()), None)
            }
            TaskInput::Messages(_) => {
                return Err(WorkerError::Reset {
                    reason: "an engine elsewhere cannot go on with a conversation's answer"
                        .to_owned(),
                });
            }
            TaskInput::Prompt(prompt) if task.answered.is_empty() => {
                (None, Some(Cow::Borrowed(prompt.as_str())))
            }
            TaskInput::Prompt(prompt) => (None, Some(format!("{prompt}{}", task.answered).into())),
            TaskInput::Call(_) => {
                return Err(WorkerError::InvalidParams {
                    message: "a call is not a native task".to_owned(),
                });
            }
        };
        Ok(Self {
            model,
            messages,
            prompt,
            stream: true,
            stream_options: StreamOptions {
                include_usage: true,
            },
            max_tokens: task.max_tokens,
            stop: &task.stop,
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            repetition_penalty: sampling.repeat_penalty,
            response_format: sampling.json_schema.as_ref().map(|schema| ResponseFormat {
                r#type: "json_schema",
                json_schema: NamedSchema {
                    name: "answer",
                    schema,
                    strict: true,
                },
            }),
        })
    }
}

/// One token of an answer that nobody reads.
#[derive(Debug, Serialize)]
pub(crate) struct ProbeRequest<'a> {
    model: &'a str,
    messages: [ProbeMessage; 1],
    max_tokens: u32,
}

#[derive(Debug, Serialize)]
struct ProbeMessage {
    role: &'static str,
    content: &'static str,
}

impl<'a> ProbeRequest<'a> {
    pub(crate) fn new(model: &'a str) -> Self {
        Self {
            model,
            messages: [ProbeMessage {
                role: "user",
                content: "a",
            }],
            max_tokens: 1,
        }
    }
}

/// What `GET /v1/models` says, as far as it matters.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct ModelsAnswer {
    #[serde(default)]
    data: Vec<ModelEntry>,
}

#[derive(Debug, Deserialize)]
struct ModelEntry {
    #[serde(default)]
    id: String,
    owned_by: Option<String>,
    /// vLLM's and SGLang's context length.
    max_model_len: Option<u32>,
}

impl ModelsAnswer {
    /// The server's word for itself, and the context length if it tells one.
    pub(crate) fn about(&self, model: &str) -> (Option<String>, Option<u32>) {
        let named = self.data.iter().find(|entry| entry.id == model);
        let Some(entry) = named.or(self.data.first()) else {
            return (None, None);
        };
        (entry.owned_by.clone(), entry.max_model_len)
    }
}

/// What `POST /v2/tasks/{id}/cancel` of another orchestratord says.
#[derive(Debug, Deserialize)]
pub(crate) struct CancelAnswer {
    pub(crate) freed_ms: Option<u64>,
}

/// `{"error": …}`, or the error itself, as a status's body or as an event.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct ErrorObject {
    pub(crate) message: String,
    r#type: Option<String>,
    code: Option<serde_json::Value>,
    n_prompt_tokens: Option<u64>,
    n_ctx: Option<u64>,
}

#[derive(Deserialize)]
struct ErrorBody {
    error: ErrorAs,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ErrorAs {
    Object(ErrorObject),
    Text(String),
}

impl ErrorObject {
    /// What a body says, in one of the shapes that servers use.
    fn read(body: &[u8]) -> Option<Self> {
        let said = match serde_json::from_slice::<ErrorBody>(body) {
            Ok(ErrorBody {
                error: ErrorAs::Object(error),
            }) => error,
            Ok(ErrorBody {
                error: ErrorAs::Text(message),
            }) => Self {
                message,
                ..Self::default()
            },
            Err(_) => serde_json::from_slice(body).ok()?,
        };
        (!said.message.is_empty()).then_some(said)
    }

    fn exceeds_context(&self) -> Option<WorkerError> {
        let exceeds = self.r#type.as_deref() == Some("exceed_context_size_error")
            || self.code.as_ref().and_then(|code| code.as_str()) == Some("context_length_exceeded");
        match (exceeds, self.n_prompt_tokens, self.n_ctx) {
            (true, Some(prompt_tokens), Some(ctx)) => {
                Some(WorkerError::ContextLengthExceeded { prompt_tokens, ctx })
            }
            _ => None,
        }
    }
}

/// What an error in mid-stream means: the server's own failure, since it had taken
/// the request.
pub(crate) fn error_event(error: &ErrorObject) -> WorkerError {
    error
        .exceeds_context()
        .unwrap_or_else(|| WorkerError::Reset {
            reason: error.message.clone(),
        })
}

/// What an answer with a status other than 2xx to a request at `path` means.
/// `retry_after` is the header, in seconds.
pub(crate) fn refusal(
    endpoint: &Endpoint,
    path: &str,
    status: u16,
    retry_after: Option<u64>,
    body: &[u8],
) -> WorkerError {
    let said = ErrorObject::read(body);
    let unsaid = |text: &str| without_token(endpoint, text);
    let message = said.as_ref().map(|said| unsaid(&said.message));
    let in_part = || quoted(status, &unsaid(&String::from_utf8_lossy(body)));
    let unavailable = |reason, retry_after| WorkerError::Unavailable {
        url: endpoint.url.clone(),
        reason,
        retry_after,
    };
    match status {
        401 | 403 => unavailable(denied(endpoint, status), None),
        404 | 405 if said.is_none() => WorkerError::NotOffered {
            what: format!("{path} (the engine elsewhere has no such route)"),
        },
        400..=428 | 430..=499 => said
            .as_ref()
            .and_then(ErrorObject::exceeds_context)
            .unwrap_or_else(|| WorkerError::InvalidParams {
                message: message.unwrap_or_else(in_part),
            }),
        429 | 503 => {
            let pause = retry_after
                .map_or(BUSY, Duration::from_secs)
                .clamp(BUSY, BUSY_AT_MOST);
            let reason = message.unwrap_or_else(|| format!("status {status}"));
            unavailable(reason, Some(pause))
        }
        502 | 504 => unavailable(message.unwrap_or_else(|| format!("status {status}")), None),
        500..=599 => WorkerError::Reset {
            reason: message.unwrap_or_else(in_part),
        },
        // Redirects among them: they are not followed, since the token is not theirs.
        _ => WorkerError::Protocol {
            what: format!("status {status} to {path}"),
        },
    }
}

/// Servers repeat what they were sent, and some of them headers as well.
fn without_token(endpoint: &Endpoint, text: &str) -> String {
    match &endpoint.bearer {
        Some(bearer) if !bearer.reveal().is_empty() => text.replace(bearer.reveal(), "<token>"),
        _ => text.to_owned(),
    }
}

/// Never with the token itself.
fn denied(endpoint: &Endpoint, status: u16) -> String {
    match &endpoint.token_file {
        Some(file) => format!(
            "it does not accept the token in {} (status {status})",
            file.display()
        ),
        None => format!("it wants a token, and the endpoint has no `token_file` (status {status})"),
    }
}

fn quoted(status: u16, body: &str) -> String {
    let text = body[..body.floor_char_boundary(QUOTED)].trim();
    if text.is_empty() {
        format!("status {status}")
    } else {
        format!("status {status}: {}", text.escape_debug())
    }
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
