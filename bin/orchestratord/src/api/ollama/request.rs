//! Requests to `/api/chat` and `/api/generate`, and what is asked of the engine for
//! them. What decides is pure; a large body is read away from the serving thread.

use bytes::Bytes;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use worker_adapters_adapter_api::{CallApi, EngineCall};

use super::keep_alive::KeepAlive;
use super::messages::{Message, conversation};
use super::options::{self, Format, invalid};
use crate::runtimes::computed;
use crate::services::event_log::Failure;

/// What both requests have in common.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Common {
    pub(super) model: String,
    /// Default: true.
    pub(super) stream: Option<bool>,
    pub(super) options: Option<Map<String, Value>>,
    pub(super) format: Option<Value>,
    pub(super) keep_alive: Option<Value>,
    pub(super) think: Option<Value>,
    pub(super) logprobs: Option<bool>,
    pub(super) top_logprobs: Option<u32>,
    // What follows is known so that it is not refused. Neither is done: a
    // conversation that does not fit the context is refused, never cut.
    #[serde(rename = "truncate")]
    _truncate: Option<bool>,
    #[serde(rename = "shift")]
    _shift: Option<bool>,
    /// Whatever is not known.
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// Body of `POST /api/chat`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ChatRequest {
    pub(super) messages: Option<Vec<Message>>,
    tools: Option<Vec<Value>>,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// Body of `POST /api/generate`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct GenerateRequest {
    prompt: Option<String>,
    system: Option<String>,
    images: Option<Vec<String>>,
    raw: Option<bool>,
    suffix: Option<String>,
    template: Option<String>,
    context: Option<Vec<Value>>,
    #[serde(flatten)]
    pub(super) common: Common,
}

/// A JSON object as a request.
///
/// # Errors
/// `INVALID_PARAMS`, saying what cannot be read.
pub(super) async fn parse<T: DeserializeOwned + Send + 'static>(body: Bytes) -> Result<T, Failure> {
    computed(body.len(), move || read(&body)).await
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    // A list would otherwise be taken for the keys in their order.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(invalid("the body must be a JSON object"));
    }
    serde_json::from_slice(body)
        .map_err(|error| invalid(format!("the body cannot be read: {error}")))
}

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Wanted {
    Call(EngineCall),
    /// Nothing but that the model is in memory, or is not.
    Load,
}

impl Common {
    pub(super) fn streams(&self) -> bool {
        self.stream.unwrap_or(true)
    }

    pub(super) fn keep_alive(&self) -> Result<KeepAlive, Failure> {
        KeepAlive::read(self.keep_alive.as_ref())
    }

    fn check(&self) -> Result<(), Failure> {
        check_model(&self.model)?;
        // Options that are given beside `options` would be passed over in silence.
        match self.unknown.iter().find(|(_, value)| !value.is_null()) {
            None => Ok(()),
            Some((key, _)) => Err(not_known(key)),
        }
    }

    /// What the engine is asked, but for the words.
    fn body(&mut self, model: &str, ctx: u32) -> Result<Map<String, Value>, Failure> {
        let mut body = Map::new();
        options::apply(self.options.take().unwrap_or_default(), ctx, &mut body)?;
        body.insert("model".to_owned(), model.into());
        body.insert("stream".to_owned(), true.into());
        // The figures of the last line come with it.
        body.insert("stream_options".to_owned(), json!({"include_usage": true}));
        Ok(body)
    }
}

pub(super) fn check_model(model: &str) -> Result<(), Failure> {
    if model.is_empty() {
        return Err(invalid("`model` is missing").with_hint("GET /api/tags lists the models"));
    }
    Ok(())
}

fn not_known(key: &str) -> Failure {
    let failure = invalid(format!(
        "`{}` is not known here",
        crate::services::failure::shortened(key)
    ));
    if options::is_option(key) {
        failure.with_hint(format!("it belongs into `options`: {{\"{key}\": …}}"))
    } else {
        failure.with_hint("leave it out")
    }
}

fn call(api: CallApi, body: Map<String, Value>) -> EngineCall {
    EngineCall {
        api,
        body: Bytes::from(Value::Object(body).to_string()),
        stream: true,
    }
}

impl ChatRequest {
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.common.check()
    }

    /// `model` is what the engine knows its model by, `ctx` its context in tokens.
    pub(super) fn wanted(mut self, model: &str, ctx: u32) -> Result<Wanted, Failure> {
        let messages = self.messages.unwrap_or_default();
        if messages.is_empty() {
            return Ok(Wanted::Load);
        }
        let mut body = self.common.body(model, ctx)?;
        body.insert("messages".to_owned(), conversation(messages)?.into());
        if let Some(tools) = self.tools.filter(|tools| !tools.is_empty()) {
            body.insert("tools".to_owned(), tools.into());
        }
        self.common.into_chat(body)
    }
}

impl Common {
    fn into_chat(self, mut body: Map<String, Value>) -> Result<Wanted, Failure> {
        if let Some(format) = Format::read(self.format)?.response_format() {
            body.insert("response_format".to_owned(), format);
        }
        if let Some(thinking) = options::thinking(self.think.as_ref())? {
            body.insert("chat_template_kwargs".to_owned(), thinking);
        }
        if self.logprobs == Some(true) {
            body.insert("logprobs".to_owned(), true.into());
            let alternatives = self.top_logprobs.unwrap_or_default();
            body.insert("top_logprobs".to_owned(), alternatives.into());
        }
        Ok(Wanted::Call(call(CallApi::ChatCompletions, body)))
    }

    fn into_completion(self, mut body: Map<String, Value>) -> Result<Wanted, Failure> {
        if let Some(schema) = Format::read(self.format)?.json_schema() {
            body.insert("json_schema".to_owned(), schema);
        }
        if self.logprobs == Some(true) {
            // The number of alternatives; with none there would be no figures at all.
            let alternatives = self.top_logprobs.unwrap_or_default().max(1);
            body.insert("logprobs".to_owned(), alternatives.into());
        }
        Ok(Wanted::Call(call(CallApi::Completions, body)))
    }
}

impl GenerateRequest {
    pub(super) fn check(&self) -> Result<(), Failure> {
        self.common.check()?;
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        if given(&self.suffix) {
            return Err(invalid("`suffix` is not offered: text is not filled in")
                .with_hint("put what follows into the prompt, as the model's own tokens have it, with `raw`"));
        }
        if given(&self.template) {
            return Err(
                invalid("`template` is not offered: the model's own template is used")
                    .with_hint("write the prompt out and send it with `raw`, or set `--chat-template` in the pool's `flags`"),
            );
        }
        if self
            .context
            .as_ref()
            .is_some_and(|tokens| !tokens.is_empty())
        {
            return Err(
                invalid("`context` is not offered: nothing is kept between requests")
                    .with_hint("send the conversation as `messages` to /api/chat"),
            );
        }
        if self.raw == Some(true) && (given(&self.system) || self.images.is_some()) {
            return Err(invalid("`raw` takes the prompt alone")
                .with_hint("leave out `system` and `images`, or leave out `raw`"));
        }
        Ok(())
    }

    /// `model` is what the engine knows its model by, `ctx` its context in tokens.
    pub(super) fn wanted(mut self, model: &str, ctx: u32) -> Result<Wanted, Failure> {
        let prompt = self.prompt.unwrap_or_default();
        let images = self.images.filter(|images| !images.is_empty());
        if prompt.is_empty() && images.is_none() {
            return Ok(Wanted::Load);
        }
        let mut body = self.common.body(model, ctx)?;
        if self.raw == Some(true) {
            body.insert("prompt".to_owned(), prompt.into());
            return self.common.into_completion(body);
        }
        let system = self.system.filter(|system| !system.is_empty());
        let system = system.map(|system| Message::new("system", system, None));
        let user = Message::new("user", prompt, images);
        let messages = system.into_iter().chain([user]).collect();
        body.insert("messages".to_owned(), conversation(messages)?.into());
        self.common.into_chat(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(request: &Value) -> Result<Value, Failure> {
        let request: ChatRequest = read(request.to_string().as_bytes())?;
        request.check()?;
        asked(request.wanted("the-model", 4096)?)
    }

    fn generate(request: &Value) -> Result<(CallApi, Value), Failure> {
        let request: GenerateRequest = read(request.to_string().as_bytes())?;
        request.check()?;
        match request.wanted("the-model", 4096)? {
            Wanted::Call(call) => Ok((call.api, serde_json::from_slice(&call.body).unwrap())),
            Wanted::Load => Err(Failure::internal("load")),
        }
    }

    fn asked(wanted: Wanted) -> Result<Value, Failure> {
        match wanted {
            Wanted::Call(call) => {
                assert_eq!(call.api, CallApi::ChatCompletions);
                assert!(call.stream);
                Ok(serde_json::from_slice(&call.body).unwrap())
            }
            Wanted::Load => Err(Failure::internal("load")),
        }
    }

    #[test]
    fn a_chat_is_asked_for_in_the_engines_words() {
        let tool = json!({"type": "function", "function": {"name": "f", "parameters": {}}});
        let asked = chat(&json!({
            "model": "haiku", "stream": false, "keep_alive": "5m", "think": false,
            "messages": [{"role": "user", "content": "hi"}], "tools": [tool],
            "options": {"temperature": 0, "num_predict": 3}, "format": "json",
            "logprobs": true, "top_logprobs": 2, "truncate": true,
        }));
        let expected = json!({
            "model": "the-model", "stream": true, "stream_options": {"include_usage": true},
            "messages": [{"role": "user", "content": "hi"}], "tools": [tool],
            "temperature": 0, "max_tokens": 3, "response_format": {"type": "json_object"},
            "chat_template_kwargs": {"enable_thinking": false},
            "logprobs": true, "top_logprobs": 2,
        });
        assert_eq!(asked.unwrap(), expected);
    }

    #[test]
    fn what_is_not_known_is_refused_and_told_where_it_belongs() {
        let message = json!([{"role": "user", "content": "hi"}]);
        let failure = chat(&json!({"model": "m", "messages": message, "temperature": 1}));
        let failure = failure.unwrap_err();
        assert!(failure.message.contains("`temperature`"), "{failure:?}");
        assert!(failure.hint.unwrap().contains("`options`"));
        assert!(chat(&json!({"messages": message})).is_err(), "no model");
        assert!(chat(&json!({"model": "m", "messages": message, "x": null})).is_ok());
        assert!(read::<ChatRequest>(b"[]").is_err());
        assert!(read::<ChatRequest>(b"{\"model\": 1}").is_err());
    }

    #[test]
    fn a_prompt_is_a_message_or_goes_as_it_is() {
        let (api, body) =
            generate(&json!({"model": "m", "prompt": "p", "system": "s", "suffix": ""})).unwrap();
        assert_eq!(api, CallApi::ChatCompletions);
        let expected = json!([
            {"role": "system", "content": "s"}, {"role": "user", "content": "p"},
        ]);
        assert_eq!(body["messages"], expected);
        let schema = json!({"type": "object"});
        let raw =
            json!({"model": "m", "prompt": "p", "raw": true, "format": schema, "logprobs": true});
        let (api, body) = generate(&raw).unwrap();
        assert_eq!(api, CallApi::Completions);
        assert_eq!(
            (&body["prompt"], &body["json_schema"]),
            (&json!("p"), &schema)
        );
        assert_eq!(body["logprobs"], 1);
        assert!(body.get("messages").is_none());
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        for (key, value, hint) in [
            ("suffix", json!("}"), "raw"),
            ("template", json!("{{ .Prompt }}"), "raw"),
            ("context", json!([1, 2]), "/api/chat"),
        ] {
            let mut request = json!({"model": "m", "prompt": "p"});
            request[key] = value;
            let failure = generate(&request).unwrap_err();
            assert!(failure.message.contains(key), "{failure:?}");
            assert!(failure.hint.unwrap().contains(hint), "{key}");
        }
        assert!(
            generate(&json!({"model": "m", "prompt": "p", "raw": true, "system": "s"})).is_err()
        );
    }

    #[test]
    fn without_words_the_model_is_loaded() {
        let load = |request: &str| {
            let request: GenerateRequest = read(request.as_bytes()).unwrap();
            matches!(request.wanted("m", 1), Ok(Wanted::Load))
        };
        assert!(load(r#"{"model": "m"}"#));
        assert!(load(r#"{"model": "m", "prompt": "", "keep_alive": 0}"#));
        let chat: ChatRequest = read(br#"{"model": "m", "messages": []}"#).unwrap();
        assert!(matches!(chat.wanted("m", 1), Ok(Wanted::Load)));
    }
}
