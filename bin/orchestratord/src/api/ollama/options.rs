//! `options`, `format`, `think` and `logprobs` of a request, in the engine's words.
//!
//! An option that the engine knows under a name of its own is passed on under that
//! name. One that is set when an engine is started is refused with the setting of
//! the pool that does it: a request never changes an engine that serves others.

use llama_orch_types::ErrorCode;
use serde_json::{Map, Value, json};

use crate::services::event_log::Failure;
use crate::services::failure::shortened;

/// What an option's value must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Number,
    Integer,
}

/// Options that are passed on: their name, the engine's, and their kind.
const PASSED: [(&str, &str, Kind); 14] = [
    ("temperature", "temperature", Kind::Number),
    ("top_p", "top_p", Kind::Number),
    ("top_k", "top_k", Kind::Integer),
    ("min_p", "min_p", Kind::Number),
    ("typical_p", "typical_p", Kind::Number),
    ("seed", "seed", Kind::Integer),
    ("repeat_penalty", "repeat_penalty", Kind::Number),
    ("repeat_last_n", "repeat_last_n", Kind::Integer),
    ("presence_penalty", "presence_penalty", Kind::Number),
    ("frequency_penalty", "frequency_penalty", Kind::Number),
    ("mirostat", "mirostat", Kind::Integer),
    ("mirostat_tau", "mirostat_tau", Kind::Number),
    ("mirostat_eta", "mirostat_eta", Kind::Number),
    ("num_keep", "n_keep", Kind::Integer),
];

/// Options that are read here.
const READ: [&str; 3] = ["num_predict", "num_ctx", "stop"];

const BY_FLAGS: &str = "an engine is started with it: set it in the pool's `flags`";
const GONE: &str = "the engine no longer has it; leave it out";

/// Options that are refused, and what to do instead.
const REFUSED: [(&str, &str); 13] = [
    (
        "num_gpu",
        "an engine is started with it: set the pool's `gpu_layers`",
    ),
    (
        "num_thread",
        "an engine is started with it: set the pool's `threads`",
    ),
    (
        "num_batch",
        "an engine is started with it: set `--batch-size` in the pool's `flags`",
    ),
    (
        "embedding_only",
        "an engine is started with it: set the pool's `serves: embeddings`",
    ),
    ("main_gpu", BY_FLAGS),
    ("numa", BY_FLAGS),
    ("use_mmap", BY_FLAGS),
    ("use_mlock", BY_FLAGS),
    ("f16_kv", "set `--cache-type-k` in the pool's `flags`"),
    ("low_vram", GONE),
    ("vocab_only", GONE),
    ("tfs_z", GONE),
    ("penalize_newline", GONE),
];

pub(super) fn invalid(message: impl Into<String>) -> Failure {
    Failure::new(ErrorCode::InvalidParams, message)
}

/// Writes a request's options into the engine's. `ctx` is the pool's context in
/// tokens, which `num_ctx` may not exceed.
///
/// # Errors
/// `INVALID_PARAMS`, naming the option.
pub(super) fn apply(
    options: Map<String, Value>,
    ctx: u32,
    body: &mut Map<String, Value>,
) -> Result<(), Failure> {
    for (name, value) in options {
        if value.is_null() {
            continue;
        }
        if let Some((_, theirs, kind)) = PASSED.iter().find(|(ours, ..)| *ours == name) {
            body.insert((*theirs).to_owned(), number(&name, &value, *kind)?);
            continue;
        }
        match name.as_str() {
            "num_predict" => {
                let most = integer(&name, &value)?;
                // A negative number stands for no bound, which is the engine's default.
                if most >= 0 {
                    body.insert("max_tokens".to_owned(), most.into());
                }
            }
            "num_ctx" => check_ctx(integer(&name, &value)?, ctx)?,
            "stop" => {
                body.insert("stop".to_owned(), stops(value)?);
            }
            _ => return Err(refused(&name)),
        }
    }
    Ok(())
}

/// Whether it is the name of an option, whatever becomes of it.
pub(super) fn is_option(name: &str) -> bool {
    let passed = PASSED.iter().map(|(name, ..)| *name);
    let refused = REFUSED.iter().map(|(name, _)| *name);
    passed.chain(refused).chain(READ).any(|known| known == name)
}

fn refused(name: &str) -> Failure {
    let failure = |message: &str| invalid(format!("`options.{}` {message}", shortened(name)));
    if let Some((_, instead)) = REFUSED.iter().find(|(known, _)| *known == name) {
        return failure("cannot be set by a request").with_hint(*instead);
    }
    let known = PASSED.iter().map(|(name, ..)| *name).chain(READ);
    let failure = failure("is not known");
    if let Some(nearest) = provision_kit::config::nearest(name, known.clone()) {
        return failure.with_hint(format!("did you mean `{nearest}`?"));
    }
    let known: Vec<&str> = known.collect();
    failure.with_hint(format!("the options are: {}", known.join(", ")))
}

fn check_ctx(wanted: i64, ctx: u32) -> Result<(), Failure> {
    if wanted <= i64::from(ctx) {
        return Ok(());
    }
    Err(invalid(format!(
        "`options.num_ctx` is {wanted}, and the pool's context holds {ctx} tokens"
    ))
    .with_hint("leave it out, or raise the pool's `ctx`"))
}

fn number(name: &str, value: &Value, kind: Kind) -> Result<Value, Failure> {
    match kind {
        Kind::Integer => integer(name, value).map(Value::from),
        Kind::Number if value.is_number() => Ok(value.clone()),
        Kind::Number => Err(invalid(format!("`options.{name}` must be a number"))),
    }
}

/// Some clients write whole numbers as `40.0`.
fn integer(name: &str, value: &Value) -> Result<i64, Failure> {
    #[allow(
        clippy::cast_possible_truncation,
        reason = "it is a whole number far within the range"
    )]
    let whole = value.as_f64().and_then(|number| {
        let fits = number.fract() == 0.0 && number.abs() < 9e15;
        fits.then_some(number as i64)
    });
    let found = value.as_i64().or(whole);
    found.ok_or_else(|| invalid(format!("`options.{name}` must be a whole number")))
}

fn stops(value: Value) -> Result<Value, Failure> {
    match value {
        Value::String(one) => Ok(json!([one])),
        Value::Array(all) if all.iter().all(Value::is_string) => Ok(Value::Array(all)),
        _ => Err(invalid("`options.stop` must be a list of texts")),
    }
}

/// Which form an answer must have.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Format {
    Free,
    /// Any JSON object.
    Json,
    Schema(Value),
}

impl Format {
    pub(super) fn read(format: Option<Value>) -> Result<Self, Failure> {
        match format {
            None | Some(Value::Null) => Ok(Self::Free),
            Some(Value::String(word)) if word.is_empty() => Ok(Self::Free),
            Some(Value::String(word)) if word == "json" => Ok(Self::Json),
            Some(schema @ Value::Object(_)) => Ok(Self::Schema(schema)),
            Some(_) => Err(invalid("`format` must be `json` or a JSON schema")),
        }
    }

    /// As a chat asks for it.
    pub(super) fn response_format(self) -> Option<Value> {
        match self {
            Self::Free => None,
            Self::Json => Some(json!({"type": "json_object"})),
            Self::Schema(schema) => Some(json!({
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": schema},
            })),
        }
    }

    /// As a completion asks for it: the engine passes over `response_format` there.
    pub(super) fn json_schema(self) -> Option<Value> {
        match self {
            Self::Free => None,
            Self::Json => Some(json!({"type": "object"})),
            Self::Schema(schema) => Some(schema),
        }
    }
}

/// What a chat template is told of thoughts; whether it heeds that is the model's
/// affair.
pub(super) fn thinking(think: Option<&Value>) -> Result<Option<Value>, Failure> {
    match think {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(on)) => Ok(Some(json!({"enable_thinking": on}))),
        Some(Value::String(level)) if matches!(level.as_str(), "low" | "medium" | "high") => Ok(
            Some(json!({"enable_thinking": true, "reasoning_effort": level})),
        ),
        Some(_) => Err(invalid(
            "`think` must be true, false, `low`, `medium` or `high`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(options: Value) -> Result<Value, Failure> {
        let Value::Object(options) = options else {
            panic!("an object is expected")
        };
        let mut body = Map::new();
        apply(options, 4096, &mut body)?;
        Ok(Value::Object(body))
    }

    #[test]
    fn options_are_called_as_the_engine_calls_them() {
        let applied = applied(json!({
            "temperature": 0.5, "top_k": 40.0, "seed": -1, "num_predict": 7, "num_keep": 4,
            "stop": ["a", "b"], "num_ctx": 4096, "min_p": null,
        }));
        let expected = json!({
            "temperature": 0.5, "top_k": 40, "seed": -1, "max_tokens": 7, "n_keep": 4,
            "stop": ["a", "b"],
        });
        assert_eq!(applied.unwrap(), expected);
        assert_eq!(
            self::applied(json!({"num_predict": -1, "stop": "x"})).unwrap(),
            json!({"stop": ["x"]}),
            "no bound is the engine's default"
        );
    }

    #[test]
    fn what_cannot_be_done_is_refused_by_name_with_what_to_do() {
        for (options, message, hint) in [
            (json!({"num_ctx": 4097}), "holds 4096 tokens", "`ctx`"),
            (json!({"num_gpu": 1}), "options.num_gpu", "`gpu_layers`"),
            (json!({"num_thread": 1}), "options.num_thread", "`threads`"),
            (json!({"use_mmap": true}), "options.use_mmap", "`flags`"),
            (json!({"temprature": 1}), "is not known", "`temperature`"),
            (json!({"xyz": 1}), "is not known", "num_predict"),
        ] {
            let failure = applied(options.clone()).unwrap_err();
            assert_eq!(failure.code, ErrorCode::InvalidParams);
            assert!(failure.message.contains(message), "{failure:?}");
            assert!(failure.hint.unwrap().contains(hint), "{options}");
        }
        for wrong in [
            json!({"top_k": 1.5}),
            json!({"temperature": "hot"}),
            json!({"stop": [1]}),
            json!({"num_predict": "many"}),
        ] {
            assert!(applied(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_format_is_asked_for_as_each_route_knows_it() {
        let schema = json!({"type": "object", "properties": {}});
        let read = |format: Value| Format::read(Some(format)).unwrap();
        let asked = read(schema.clone()).response_format().unwrap();
        assert_eq!(asked["json_schema"]["schema"], schema);
        assert_eq!(read(schema.clone()).json_schema(), Some(schema));
        assert_eq!(read(json!("")).response_format(), None);
        assert_eq!(
            read(json!("json")).json_schema(),
            Some(json!({"type": "object"}))
        );
        assert!(Format::read(Some(json!("xml"))).is_err());
    }

    #[test]
    fn thoughts_are_the_templates_affair() {
        assert_eq!(thinking(None).unwrap(), None);
        let off = thinking(Some(&json!(false))).unwrap().unwrap();
        assert_eq!(off, json!({"enable_thinking": false}));
        let high = thinking(Some(&json!("high"))).unwrap().unwrap();
        assert_eq!(high["reasoning_effort"], "high");
        assert!(thinking(Some(&json!("hard"))).is_err());
    }
}
