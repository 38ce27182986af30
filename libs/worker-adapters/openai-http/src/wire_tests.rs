use llama_orch_types::{ErrorCode, TaskId};
use provision_kit::secret::Secret;
use serde_json::json;
use worker_adapters_adapter_api::SamplingParams;

use super::*;

fn endpoint(token_file: Option<&str>) -> Endpoint {
    Endpoint {
        url: "http://far:8000".to_owned(),
        model: "m".to_owned(),
        bearer: None,
        token_file: token_file.map(Into::into),
        slots: 1,
    }
}

fn task(input: TaskInput) -> EngineTask {
    EngineTask {
        id: TaskId::generate(),
        input,
        answered: String::new(),
        max_tokens: 7,
        stop: vec![],
        sampling: SamplingParams::default(),
    }
}

#[test]
fn what_is_not_asked_for_is_not_sent() {
    let task = task(TaskInput::Prompt("hi".to_owned()));
    let body = serde_json::to_value(NativeRequest::new(&task, "m").unwrap()).unwrap();
    assert_eq!(
        body,
        json!({
            "model": "m", "prompt": "hi", "stream": true,
            "stream_options": { "include_usage": true }, "max_tokens": 7,
        })
    );
}

#[test]
fn what_is_asked_for_has_the_servers_names() {
    let mut task = task(TaskInput::Messages(vec![]));
    let schema = json!({ "type": "object" });
    task.sampling = SamplingParams {
        repeat_penalty: Some(1.5),
        top_k: Some(3),
        json_schema: Some(schema.clone()),
        ..SamplingParams::default()
    };
    let body = serde_json::to_value(NativeRequest::new(&task, "m").unwrap()).unwrap();
    assert_eq!(body["top_k"], 3);
    assert_eq!(body["repeat_penalty"], body["repetition_penalty"]);
    assert_eq!(body["response_format"]["type"], "json_schema");
    assert_eq!(body["response_format"]["json_schema"]["schema"], schema);
    task.sampling.grammar = Some("root ::= \"x\"".to_owned());
    assert!(matches!(
        NativeRequest::new(&task, "m"),
        Err(WorkerError::NotOffered { .. })
    ));
}

#[test]
fn an_answer_is_gone_on_with_only_where_it_can_be() {
    let mut prompt = task(TaskInput::Prompt("one".to_owned()));
    prompt.answered = " two".to_owned();
    let body = serde_json::to_value(NativeRequest::new(&prompt, "m").unwrap()).unwrap();
    assert_eq!(body["prompt"], "one two");
    let mut chat = task(TaskInput::Messages(vec![]));
    chat.answered = "two".to_owned();
    let refused = NativeRequest::new(&chat, "m").unwrap_err();
    assert_eq!(refused.code(), ErrorCode::WorkerReset);
}

#[test]
fn a_denied_token_is_named_by_its_file() {
    let denied = refusal(&endpoint(Some("/keys/far")), "/v1/models", 401, None, b"");
    assert!(denied.to_string().contains("/keys/far"), "{denied}");
    assert_eq!(denied.code(), ErrorCode::PoolUnavailable);
    let wanting = refusal(&endpoint(None), "/v1/models", 401, None, b"");
    assert!(wanting.to_string().contains("token_file"), "{wanting}");
}

#[test]
fn a_token_that_a_server_repeats_is_left_out() {
    let mut endpoint = endpoint(Some("/keys/far"));
    endpoint.bearer = Some(Secret::new("s3cret-token"));
    let long = format!("{}s3cret-token", "x".repeat(QUOTED - 5));
    for body in [
        r#"{"error":{"message":"no such key: s3cret-token"}}"#,
        "<html>Authorization: Bearer s3cret-token</html>",
        &long,
    ] {
        for status in [400, 404, 429, 500, 502] {
            let refused = refusal(&endpoint, "/v1/x", status, None, body.as_bytes());
            let shown = format!("{refused} {refused:?}");
            assert!(!shown.contains("s3c"), "{shown}");
        }
    }
}

#[test]
fn refusals_are_told_apart() {
    let of = |status, after, body: &str| {
        refusal(&endpoint(None), "/v1/x", status, after, body.as_bytes())
    };
    let pause = |error| match error {
        WorkerError::Unavailable { retry_after, .. } => retry_after,
        other => panic!("{other}"),
    };
    assert_eq!(pause(of(429, Some(7), "")), Some(Duration::from_secs(7)));
    assert_eq!(pause(of(503, Some(9999), "")), Some(BUSY_AT_MOST));
    assert_eq!(pause(of(503, None, "{}")), Some(BUSY));
    assert_eq!(pause(of(502, None, "<html>")), None);
    assert!(matches!(
        of(404, None, "nginx"),
        WorkerError::NotOffered { .. }
    ));
    assert!(matches!(
        of(404, None, r#"{"error":{"message":"no model","code":404}}"#),
        WorkerError::InvalidParams { message } if message == "no model"
    ));
    assert!(matches!(
        of(400, None, r#"{"object":"error","message":"too long","code":400}"#),
        WorkerError::InvalidParams { message } if message == "too long"
    ));
    assert!(matches!(
        of(422, None, r#"{"error":"bad","error_type":"validation"}"#),
        WorkerError::InvalidParams { message } if message == "bad"
    ));
    assert!(matches!(
        of(
            400,
            None,
            r#"{"error":{"message":"m","type":"exceed_context_size_error","n_prompt_tokens":9,"n_ctx":8}}"#
        ),
        WorkerError::ContextLengthExceeded {
            prompt_tokens: 9,
            ctx: 8
        }
    ));
    assert!(matches!(of(500, None, ""), WorkerError::Reset { .. }));
    assert!(matches!(of(307, None, ""), WorkerError::Protocol { .. }));
}
