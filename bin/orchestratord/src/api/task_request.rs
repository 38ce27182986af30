//! What a client asks for, and what of it is refused before anything else
//! happens. Pure.

use std::time::Duration;

use llama_orch_types::ErrorCode;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::ToSchema;
use worker_adapters_adapter_api::{ChatMessage, SamplingParams, TaskInput};

use crate::services::admission::Priority;
use crate::services::event_log::Failure;

const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 256;
/// A grammar, or a JSON schema written as JSON.
const MAX_GRAMMAR_BYTES: usize = 64 * 1024;

/// Body of `POST /v2/tasks`. Unknown keys are refused.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TaskRequest {
    /// The pool to use. Default: the one that serves `model`, else `default`.
    pub pool_id: Option<String>,
    /// The model, as the configuration names it.
    pub model: Option<String>,
    /// A text to continue. Exactly one of `prompt` and `messages` is needed.
    pub prompt: Option<String>,
    /// A conversation to answer, put through the model's chat template.
    #[schema(value_type = Option<Vec<Object>>)]
    pub messages: Option<Vec<ChatMessage>>,
    /// The most tokens to generate. Default: the pool's `default_max_tokens`.
    #[schema(minimum = 1)]
    pub max_tokens: Option<u32>,
    /// The same seed gives the same answer on a deterministic pool.
    pub seed: Option<u32>,
    /// 0 always takes the likeliest token.
    #[schema(minimum = 0, maximum = 5)]
    pub temperature: Option<f64>,
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f64>,
    /// 0 is off.
    pub top_k: Option<u32>,
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f64>,
    /// 1 is off.
    #[schema(minimum = 0.01, maximum = 10)]
    pub repeat_penalty: Option<f64>,
    /// Texts that end the answer: one, or a list of at most 16, each at most
    /// 256 bytes.
    #[serde(deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// A GBNF grammar that the answer must follow.
    pub grammar: Option<String>,
    /// A JSON schema that the answer must follow.
    #[schema(value_type = Option<Object>)]
    pub json_schema: Option<serde_json::Value>,
    /// `interactive` goes before `batch`.
    pub priority: Priority,
    /// The task must start within so many milliseconds. One that cannot is
    /// refused; one whose turn does not come in time ends with
    /// `DEADLINE_UNMET`. It is never run late.
    #[schema(minimum = 1)]
    pub deadline_ms: Option<u64>,
    /// Cancel the task when its last reader goes away. Default: false.
    pub cancel_on_disconnect: bool,
    /// What becomes of the task if its engine is lost in mid-stream.
    pub on_worker_reset: OnWorkerReset,
}

/// What becomes of a task whose engine is lost in mid-stream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnWorkerReset {
    /// It ends with `WORKER_RESET` or `DECODE_TIMEOUT`.
    #[default]
    Fail,
    /// The next engine goes on from the text that was sent, at most three times.
    /// Not for `grammar` and `json_schema`, which cannot be gone on with.
    Resume,
}

fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::InvalidParams, message)
}

impl TaskRequest {
    pub fn parse(body: &[u8]) -> Result<Self, Failure> {
        // A list would otherwise be taken for the fields in their order.
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(invalid("the body is no task: a JSON object is expected"));
        }
        serde_json::from_slice(body).map_err(|error| {
            invalid(format!("the body is no task: {error}"))
                .with_hint("GET /openapi.json describes it")
        })
    }

    /// Refuses a text that is too long before anything is tokenised.
    pub fn check_length(&self, max_prompt_bytes: u64) -> Result<(), Failure> {
        let prompt = self.prompt.iter().map(String::len);
        let messages = self.messages.iter().flatten();
        let bytes: usize = prompt
            .chain(messages.map(|message| message.role.len() + message.content.len()))
            .sum();
        if bytes as u64 <= max_prompt_bytes {
            return Ok(());
        }
        Err(invalid(format!(
            "the prompt has {bytes} bytes; at most {max_prompt_bytes} are taken"
        ))
        .with_hint("shorten it, or raise `limits.max_prompt_bytes`"))
    }

    fn check_grammar(&self) -> Result<(), Failure> {
        let grammar = self.grammar.as_ref().map_or(0, String::len);
        let schema = self
            .json_schema
            .as_ref()
            .map_or(0, |schema| schema.to_string().len());
        if grammar.max(schema) > MAX_GRAMMAR_BYTES {
            return Err(invalid(format!(
                "`grammar` and `json_schema` may have {MAX_GRAMMAR_BYTES} bytes"
            )));
        }
        Ok(())
    }

    /// The text to work on.
    pub fn input(&self) -> Result<TaskInput, Failure> {
        match (&self.prompt, &self.messages) {
            (Some(_), Some(_)) => Err(invalid("`prompt` and `messages` exclude each other")),
            (None, None) => Err(invalid("one of `prompt` and `messages` is needed")),
            (Some(prompt), None) if prompt.is_empty() => Err(invalid("`prompt` is empty")),
            (Some(prompt), None) => Ok(TaskInput::Prompt(prompt.clone())),
            (None, Some(messages)) => {
                check_messages(messages)?;
                Ok(TaskInput::Messages(messages.clone()))
            }
        }
    }

    pub fn sampling(&self) -> Result<SamplingParams, Failure> {
        check_range("temperature", self.temperature, 0.0, 5.0)?;
        check_range("top_p", self.top_p, 0.0, 1.0)?;
        check_range("min_p", self.min_p, 0.0, 1.0)?;
        check_range("repeat_penalty", self.repeat_penalty, 0.01, 10.0)?;
        if self.seed == Some(u32::MAX) {
            // llama.cpp's word for "choose one".
            return Err(invalid(format!("`seed` must be below {}", u32::MAX)));
        }
        if self.grammar.is_some() && self.json_schema.is_some() {
            return Err(invalid("`grammar` and `json_schema` exclude each other"));
        }
        self.check_grammar()?;
        Ok(SamplingParams {
            seed: self.seed,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            grammar: self.grammar.clone(),
            json_schema: self.json_schema.clone(),
        })
    }

    /// The texts that end the answer.
    pub fn stops(&self) -> Result<Vec<String>, Failure> {
        if self.stop.len() > MAX_STOPS {
            return Err(invalid(format!(
                "`stop` has {} texts; at most {MAX_STOPS} are taken",
                self.stop.len()
            )));
        }
        if self
            .stop
            .iter()
            .any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
        {
            return Err(invalid(format!(
                "each text of `stop` must have 1 to {MAX_STOP_BYTES} bytes"
            )));
        }
        Ok(self.stop.clone())
    }

    /// Whether the task is gone on with if its engine is lost.
    pub fn resumes(&self) -> Result<bool, Failure> {
        let resume = self.on_worker_reset == OnWorkerReset::Resume;
        if resume && (self.grammar.is_some() || self.json_schema.is_some()) {
            return Err(invalid(
                "`on_worker_reset: resume` excludes `grammar` and `json_schema`: an engine cannot go on in the middle of one",
            )
            .with_hint("leave out `on_worker_reset`, and send the task again if it ends with WORKER_RESET"));
        }
        Ok(resume)
    }

    /// How long the task may wait for the engine.
    pub fn start_within(&self) -> Result<Option<Duration>, Failure> {
        match self.deadline_ms {
            Some(0) => Err(invalid("`deadline_ms` must be at least 1")),
            other => Ok(other.map(Duration::from_millis)),
        }
    }

    /// The client's own limit, if it names one.
    pub fn max_tokens(&self) -> Result<Option<u32>, Failure> {
        match self.max_tokens {
            Some(0) => Err(invalid("`max_tokens` must be at least 1")),
            other => Ok(other),
        }
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "`stop` must be a text or a list of texts")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }
    Ok(match OneOrMany::deserialize(deserializer)? {
        OneOrMany::One(text) => vec![text],
        OneOrMany::Many(texts) => texts,
    })
}

fn check_messages(messages: &[ChatMessage]) -> Result<(), Failure> {
    if messages.is_empty() {
        return Err(invalid("`messages` is empty"));
    }
    for (index, message) in messages.iter().enumerate() {
        if !matches!(message.role.as_str(), "system" | "user" | "assistant") {
            return Err(invalid(format!(
                "messages[{index}].role is `{}`; it must be system, user or assistant",
                message.role.chars().take(40).collect::<String>()
            )));
        }
    }
    Ok(())
}

fn check_range(name: &str, value: Option<f64>, min: f64, max: f64) -> Result<(), Failure> {
    match value {
        Some(value) if !(min..=max).contains(&value) => Err(invalid(format!(
            "`{name}` is {value}; it must be from {min} to {max}"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(body: &str) -> Result<(), Failure> {
        let request = TaskRequest::parse(body.as_bytes())?;
        request.input()?;
        request.sampling()?;
        request.stops()?;
        request.max_tokens()?;
        request.start_within()?;
        request.resumes()?;
        Ok(())
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (body, word) in [
            ("{}", "needed"),
            ("[]", "no task"),
            (r#"{"prompt":"a","messages":[]}"#, "exclude"),
            (r#"{"prompt":""}"#, "empty"),
            (r#"{"messages":[]}"#, "empty"),
            (r#"{"messages":[{"role":"robot","content":"x"}]}"#, "robot"),
            (r#"{"prompt":"a","max_tokens":0}"#, "max_tokens"),
            (r#"{"prompt":"a","temperature":-1}"#, "temperature"),
            (r#"{"prompt":"a","top_p":1.5}"#, "top_p"),
            (r#"{"prompt":"a","tempreature":1}"#, "tempreature"),
            (r#"{"prompt":"a","stop":[""]}"#, "stop"),
            (
                r#"{"prompt":"a","grammar":"x","json_schema":{}}"#,
                "exclude",
            ),
            (r#"{"prompt":"a","on_worker_reset":"retry"}"#, "resume"),
            (
                r#"{"prompt":"a","on_worker_reset":"resume","grammar":"x"}"#,
                "on_worker_reset",
            ),
            (r#"{"prompt":"a","deadline_ms":0}"#, "deadline_ms"),
            (r#"{"prompt":"a","repeat_penalty":0}"#, "repeat_penalty"),
            (r#"{"prompt":"a","seed":4294967295}"#, "seed"),
            (r#"{"prompt":"a","seed":-1}"#, "seed"),
        ] {
            let failure = check(body).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidParams);
            // serde names the key by its place for wrong types.
            assert!(
                failure.message.contains(word) || word == "seed",
                "{body}: {}",
                failure.message
            );
        }
    }

    #[test]
    fn what_is_right_is_taken() {
        check(r#"{"prompt":"a","seed":1,"temperature":0,"stop":["\n"],"priority":"batch"}"#)
            .unwrap();
        check(r#"{"prompt":"a","stop":"\n"}"#).unwrap();
        check(r#"{"messages":[{"role":"user","content":""}],"json_schema":{"type":"object"}}"#)
            .unwrap();
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_tokenised() {
        let request = TaskRequest::parse(br#"{"prompt":"12345678"}"#).unwrap();
        request.check_length(8).unwrap();
        assert!(request.check_length(7).is_err());
        let body =
            br#"{"messages":[{"role":"user","content":"1234"},{"role":"user","content":""}]}"#;
        let request = TaskRequest::parse(body).unwrap();
        request.check_length(12).unwrap();
        assert!(request.check_length(11).is_err());
        let long = "x".repeat(MAX_GRAMMAR_BYTES + 1);
        assert!(check(&format!(r#"{{"prompt":"a","grammar":"{long}"}}"#)).is_err());
        assert!(check(&format!(r#"{{"prompt":"a","json_schema":{{"{long}":1}}}}"#)).is_err());
        let deep = "[".repeat(100_000);
        assert!(check(&format!(r#"{{"prompt":"a","json_schema":{deep}"#)).is_err());
    }

    proptest! {
        #[test]
        fn any_body_is_answered(body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(request) = TaskRequest::parse(&body) {
                let _ = (request.input(), request.sampling(), request.stops());
            }
        }
    }
}
