//! The JSON that llama-server takes and gives.

use std::borrow::Cow;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use worker_adapters_adapter_api::{
    ChatMessage, EndSummary, EngineProps, EngineTask, FinishReason, WorkerError,
};

/// What the last event shall hold. Without this list it repeats the prompt.
const RESPONSE_FIELDS: &[&str] = &[
    "content",
    "stop",
    "tokens_predicted",
    "tokens_evaluated",
    "generation_settings",
    "timings",
    "stop_type",
    "truncated",
];

/// The body of `POST /completion`.
#[derive(Debug, Serialize)]
pub(crate) struct CompletionRequest<'a> {
    prompt: &'a str,
    stream: bool,
    /// Measured: the bytes of the answer are the same with and without it.
    cache_prompt: bool,
    /// A word after each batch of the prompt: a sign of life, and where the
    /// engine looks for its client.
    return_progress: bool,
    n_predict: u32,
    stop: &'a [String],
    response_fields: &'static [&'static str],
    #[serde(skip_serializing_if = "Option::is_none")]
    dynatemp_exponent: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    top_k: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    min_p: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    repeat_penalty: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grammar: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    json_schema: Option<&'a serde_json::Value>,
}

impl<'a> CompletionRequest<'a> {
    /// `tag` makes the task known among several; see [`crate::tagging`].
    pub(crate) fn new(task: &'a EngineTask, prompt: &'a str, tag: Option<u32>) -> Self {
        let sampling = &task.sampling;
        Self {
            prompt,
            stream: true,
            cache_prompt: true,
            return_progress: true,
            n_predict: task.max_tokens,
            dynatemp_exponent: tag,
            stop: &task.stop,
            response_fields: RESPONSE_FIELDS,
            seed: sampling.seed,
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            repeat_penalty: sampling.repeat_penalty,
            grammar: sampling.grammar.as_deref(),
            json_schema: sampling.json_schema.as_ref(),
        }
    }
}

/// The body of `POST /completion` for a sign of life: one token that nobody
/// reads, past the cache.
#[derive(Debug, Serialize)]
pub(crate) struct ProbeRequest {
    pub(crate) prompt: &'static str,
    pub(crate) n_predict: u32,
    pub(crate) cache_prompt: bool,
}

/// The body of `POST /embedding` for a sign of life.
#[derive(Debug, Serialize)]
pub(crate) struct ProbeEmbedding {
    pub(crate) content: &'static str,
}

/// What a probe is answered, as far as it matters.
#[derive(Debug, Deserialize)]
pub(crate) struct ProbeAnswer {
    pub(crate) stop: bool,
}

/// The body of `POST /apply-template`.
#[derive(Debug, Serialize)]
pub(crate) struct TemplateRequest<'a> {
    pub(crate) messages: &'a [ChatMessage],
}

#[derive(Debug, Deserialize)]
pub(crate) struct TemplateAnswer {
    pub(crate) prompt: String,
}

/// The body of `POST /tokenize`, with the flags that `/completion` uses.
#[derive(Debug, Serialize)]
pub(crate) struct TokenizeRequest<'a> {
    pub(crate) content: &'a str,
    pub(crate) add_special: bool,
    pub(crate) parse_special: bool,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TokenizeAnswer {
    /// Only their number matters.
    pub(crate) tokens: Vec<IgnoredAny>,
}

/// One entry of `GET /slots`.
#[derive(Debug, Deserialize)]
pub(crate) struct SlotAnswer {
    pub(crate) is_processing: bool,
    #[serde(default)]
    pub(crate) params: SlotParams,
    #[serde(default)]
    id_task: i64,
    #[serde(default)]
    n_prompt_tokens: u64,
    #[serde(default)]
    n_prompt_tokens_processed: u64,
    #[serde(default)]
    next_token: Vec<NextToken>,
}

#[derive(Debug, Deserialize)]
struct NextToken {
    #[serde(default)]
    n_decoded: u64,
}

/// How far a slot is; any change is a sign of life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SlotProgress {
    id_task: i64,
    pub(crate) prompt_tokens: u64,
    pub(crate) processed: u64,
    pub(crate) decoded: u64,
}

impl SlotAnswer {
    pub(crate) fn progress(&self) -> SlotProgress {
        SlotProgress {
            id_task: self.id_task,
            prompt_tokens: self.n_prompt_tokens,
            processed: self.n_prompt_tokens_processed,
            decoded: self.next_token.first().map_or(0, |next| next.n_decoded),
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct SlotParams {
    pub(crate) dynatemp_exponent: f64,
}

/// The answer to `GET /props`.
#[derive(Debug, Deserialize)]
pub(crate) struct PropsAnswer {
    default_generation_settings: DefaultSettings,
    total_slots: u32,
    model_path: Option<String>,
    build_info: String,
}

#[derive(Debug, Deserialize)]
struct DefaultSettings {
    n_ctx: u32,
    params: Option<serde_json::Value>,
}

impl PropsAnswer {
    pub(crate) fn slots(&self) -> u32 {
        self.total_slots
    }

    /// The sampling parameters of a task that names none.
    pub(crate) fn default_params(&self) -> Option<&serde_json::Value> {
        self.default_generation_settings.params.as_ref()
    }
}

impl From<PropsAnswer> for EngineProps {
    fn from(answer: PropsAnswer) -> Self {
        Self {
            version: version_of(&answer.build_info),
            model_path: answer.model_path.filter(|path| !path.is_empty()),
            ctx: answer.default_generation_settings.n_ctx,
            slots: answer.total_slots,
        }
    }
}

/// `b11434-fa4ee61` is version `b11434`. A build that was made without its
/// number says `b0`, which names nothing, so its text is kept whole.
fn version_of(build_info: &str) -> String {
    match build_info.split_once('-') {
        Some((number, _)) if number != "b0" && !number.is_empty() => number.to_owned(),
        _ => build_info.to_owned(),
    }
}

/// One event of a completion's stream. Borrows from the event's text.
#[derive(Debug, Deserialize)]
pub(crate) struct Chunk<'a> {
    #[serde(borrow, default)]
    pub(crate) content: Cow<'a, str>,
    #[serde(default)]
    pub(crate) stop: bool,
    #[serde(default)]
    pub(crate) tokens_predicted: u64,
    #[serde(default)]
    pub(crate) tokens_evaluated: u64,
    #[serde(borrow)]
    generation_settings: Option<&'a RawValue>,
    timings: Option<Timings>,
    #[serde(borrow)]
    stop_type: Option<Cow<'a, str>>,
    #[serde(default)]
    truncated: bool,
    /// How far the engine is in the prompt; such an event is no token.
    pub(crate) prompt_progress: Option<PromptProgress>,
    pub(crate) error: Option<EngineError>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct PromptProgress {
    pub(crate) total: u64,
    pub(crate) processed: u64,
}

impl PromptProgress {
    /// Tokens still to work on.
    pub(crate) fn left(&self) -> u64 {
        self.total.saturating_sub(self.processed)
    }
}

/// What a task cost, by the engine's own clock and count.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Timings {
    pub(crate) cache_n: u64,
    pub(crate) prompt_n: u64,
    pub(crate) prompt_ms: f64,
    pub(crate) predicted_n: u64,
    pub(crate) predicted_ms: f64,
}

impl Chunk<'_> {
    /// Prompt tokens that were really worked on, and the milliseconds it took.
    pub(crate) fn prompt_work(&self) -> Option<(u64, f64)> {
        let timings = self.timings.as_ref()?;
        Some((timings.prompt_n, timings.prompt_ms))
    }

    /// What the last event says of the whole task.
    pub(crate) fn summary(&self) -> Result<EndSummary, WorkerError> {
        let effective = self
            .generation_settings
            .map(|settings| serde_json::from_str(settings.get()))
            .transpose()
            .map_err(|error| WorkerError::Protocol {
                what: format!("generation_settings that are no JSON: {error}"),
            })?
            .unwrap_or_default();
        let timings = self.timings.as_ref();
        let limited = self.truncated || self.stop_type.as_deref() == Some("limit");
        Ok(EndSummary {
            tokens_in: self.tokens_evaluated,
            tokens_cached: timings.map_or(0, |timings| timings.cache_n),
            tokens_out: self.tokens_predicted,
            prompt_time_ms: timings.map_or(0.0, |timings| timings.prompt_ms),
            decode_time_ms: timings.map_or(0.0, |timings| timings.predicted_ms),
            finish_reason: if limited {
                FinishReason::Length
            } else {
                FinishReason::Stop
            },
            effective,
        })
    }
}

/// `{"error": …}`, as a status's body or as an event in mid-stream.
#[derive(Debug, Deserialize)]
pub(crate) struct ErrorAnswer {
    error: EngineError,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct EngineError {
    code: u16,
    message: String,
    r#type: String,
    n_prompt_tokens: u64,
    n_ctx: u64,
}

impl EngineError {
    /// `url` is the engine's.
    pub(crate) fn into_worker_error(self, url: &str) -> WorkerError {
        match self.r#type.as_str() {
            "exceed_context_size_error" => WorkerError::ContextLengthExceeded {
                prompt_tokens: self.n_prompt_tokens,
                ctx: self.n_ctx,
            },
            "unavailable_error" => WorkerError::Loading {
                url: url.to_owned(),
            },
            "invalid_request_error" | "not_supported_error" | "not_found_error" => {
                WorkerError::InvalidParams {
                    message: self.message,
                }
            }
            // The engine itself failed, and may be better after a restart.
            "server_error" => WorkerError::Reset {
                reason: self.message,
            },
            kind => WorkerError::Protocol {
                what: format!("error {} of type `{kind}`: {}", self.code, self.message),
            },
        }
    }
}

/// What an answer with a status other than 2xx means.
pub(crate) fn refusal(status: u16, body: &[u8], url: &str) -> WorkerError {
    if let Ok(answer) = serde_json::from_slice::<ErrorAnswer>(body) {
        return answer.error.into_worker_error(url);
    }
    match status {
        503 => WorkerError::Loading {
            url: url.to_owned(),
        },
        _ => WorkerError::Protocol {
            what: format!("status {status} without llama-server's error body"),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARTIAL: &str = r#"{"index":0,"content":"by","tokens":[1717],"stop":false,"id_slot":-1,"tokens_predicted":2,"tokens_evaluated":1}"#;
    const LAST: &str = r#"{"content":"","stop":true,"tokens_predicted":4,"tokens_evaluated":5,"generation_settings":{"seed":7,"temperature":0.0},"timings":{"cache_n":4,"prompt_n":1,"prompt_ms":7.822,"predicted_n":4,"predicted_ms":23.131},"stop_type":"limit","truncated":false}"#;

    const PROGRESS: &str = r#"{"index":0,"content":"","tokens":[0],"stop":false,"id_slot":-1,"tokens_predicted":0,"tokens_evaluated":1240,"prompt_progress":{"total":1240,"cache":0,"processed":256,"time_ms":1470}}"#;

    #[test]
    fn recorded_progress_is_told_from_a_token() {
        let chunk: Chunk<'_> = serde_json::from_str(PROGRESS).unwrap();
        let progress = chunk.prompt_progress.unwrap();
        assert_eq!((progress.processed, progress.total), (256, 1240));
        assert!(chunk.content.is_empty() && !chunk.stop);
    }

    #[test]
    fn a_recorded_partial_event_is_read_without_copying_its_text() {
        let chunk: Chunk<'_> = serde_json::from_str(PARTIAL).unwrap();
        assert!(matches!(chunk.content, Cow::Borrowed("by")));
        assert!(!chunk.stop);
        assert_eq!((chunk.tokens_predicted, chunk.tokens_evaluated), (2, 1));
    }

    #[test]
    fn a_recorded_last_event_gives_the_summary() {
        let chunk: Chunk<'_> = serde_json::from_str(LAST).unwrap();
        let summary = chunk.summary().unwrap();
        assert_eq!(
            (summary.tokens_in, summary.tokens_cached, summary.tokens_out),
            (5, 4, 4)
        );
        assert_eq!(summary.finish_reason, FinishReason::Length);
        assert_eq!(summary.effective["seed"], 7);
        assert!((summary.decode_time_ms - 23.131).abs() < 1e-9);
    }

    #[test]
    fn build_info_is_cut_to_the_version() {
        assert_eq!(version_of("b11434-fa4ee61"), "b11434");
        assert_eq!(version_of("b0-unknown"), "b0-unknown");
        assert_eq!(version_of("custom"), "custom");
    }

    #[test]
    fn recorded_errors_are_told_apart() {
        let exceeded = br#"{"error":{"code":400,"message":"request (3001 tokens) exceeds the available context size (1024 tokens), try increasing it","type":"exceed_context_size_error","n_prompt_tokens":3001,"n_ctx":1024}}"#;
        let WorkerError::ContextLengthExceeded { prompt_tokens, ctx } = refusal(400, exceeded, "u")
        else {
            panic!("not told apart");
        };
        assert_eq!((prompt_tokens, ctx), (3001, 1024));
        let grammar = br#"{"error":{"code":400,"message":"Failed to initialize samplers: failed to parse grammar","type":"invalid_request_error"}}"#;
        assert!(matches!(
            refusal(400, grammar, "u"),
            WorkerError::InvalidParams { .. }
        ));
        let loading =
            br#"{"error":{"message":"Loading model","type":"unavailable_error","code":503}}"#;
        assert!(matches!(
            refusal(503, loading, "u"),
            WorkerError::Loading { .. }
        ));
        assert!(matches!(
            refusal(502, b"<html>", "u"),
            WorkerError::Protocol { .. }
        ));
    }

    #[test]
    fn what_is_not_asked_for_is_not_sent() {
        let task = EngineTask {
            id: llama_orch_types::TaskId::generate(),
            input: worker_adapters_adapter_api::TaskInput::Prompt("x".into()),
            answered: String::new(),
            max_tokens: 3,
            stop: vec![],
            sampling: worker_adapters_adapter_api::SamplingParams {
                seed: Some(1),
                ..Default::default()
            },
        };
        let body = serde_json::to_value(CompletionRequest::new(&task, "x", None)).unwrap();
        let keys: Vec<&str> = body
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(
            keys,
            [
                "cache_prompt",
                "n_predict",
                "prompt",
                "response_fields",
                "return_progress",
                "seed",
                "stop",
                "stream"
            ]
        );
    }
}
