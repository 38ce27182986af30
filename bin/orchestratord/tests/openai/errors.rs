//! Errors, in the shape that the client knows.

use reqwest::{Method, Response};
use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::support::Setup;
use crate::{chat, streamed, until_running};

/// Checks an error's shape; returns its `error` member.
async fn checked(response: Response, status: u16, kind: &str, code: &str) -> Value {
    let anthropic = response.url().path().starts_with("/v1/messages");
    let headers = response.headers().clone();
    let url = response.url().clone();
    assert_eq!(response.status(), status, "{url}");
    assert_eq!(headers["content-type"], "application/json");
    let body: Value = response.json().await.unwrap();
    let error = &body["error"];
    assert_eq!(error["type"], kind, "{url}: {body}");
    assert_eq!(error["code"], code, "{url}: {body}");
    assert!(!error["message"].as_str().unwrap().is_empty());
    let id = headers["x-correlation-id"].to_str().unwrap();
    assert_eq!(error["correlation_id"], id);
    let name = if anthropic {
        "request-id"
    } else {
        "x-request-id"
    };
    assert_eq!(headers[name], id, "where the SDK looks for it");
    let again = headers["x-should-retry"].to_str().unwrap();
    assert_eq!(error["retriable"].to_string(), again);
    if anthropic {
        assert_eq!(body["type"], "error", "{body}");
        assert_eq!(body["request_id"], id);
    } else {
        assert!(error.as_object().unwrap().contains_key("param"), "{body}");
    }
    error.clone()
}

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";

#[tokio::test]
async fn wrong_requests_are_answered_in_the_clients_shape() {
    let daemon = Setup::new(&Script::default())
        .top("tasks", json!({ "max_body_bytes": 4096 }))
        .top("limits", json!({ "max_prompt_bytes": 2048 }))
        .ready()
        .await;
    let send = async |method: Method, path: &str, body: String| {
        let request = daemon
            .client
            .request(method, format!("{}{path}", daemon.url));
        request.body(body).send().await.unwrap()
    };
    let wrong = "invalid_request_error";
    let unknown = json!({"model": "defautl", "messages": [], "max_tokens": 1}).to_string();
    let error = send(Method::POST, CHAT, unknown.clone()).await;
    let error = checked(error, 404, wrong, "model_not_found").await;
    assert_eq!(error["param"], "model");
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("did you mean `default`?"), "{message}");
    let error = send(Method::POST, MESSAGES, unknown).await;
    checked(error, 404, "not_found_error", "model_not_found").await;
    for path in [CHAT, MESSAGES, "/v1/embeddings", "/tokenize"] {
        let error = send(Method::POST, path, "[1]".to_owned()).await;
        checked(error, 400, wrong, "invalid_params").await;
        let error = send(Method::GET, path, String::new()).await;
        checked(error, 405, wrong, "invalid_params").await;
        let long = json!({ "content": "a b ".repeat(600) }).to_string();
        let error = send(Method::POST, path, long).await;
        checked(error, 400, wrong, "invalid_params").await;
    }
    let huge = json!({ "content": "x".repeat(5000) }).to_string();
    let error = send(Method::POST, CHAT, huge.clone()).await;
    checked(error, 413, wrong, "invalid_params").await;
    let error = send(Method::POST, MESSAGES, huge).await;
    checked(error, 413, "request_too_large", "invalid_params").await;
    let error = send(Method::POST, "/v1/nothing", String::new()).await;
    checked(error, 404, wrong, "invalid_params").await;
    let error = send(Method::GET, "/v1/messages/nothing", String::new()).await;
    checked(error, 404, "not_found_error", "invalid_params").await;
    let request = daemon.client.post(format!("{}{CHAT}", daemon.url));
    let request = request.header("X-Priority", "urgent").json(&chat(1));
    checked(request.send().await.unwrap(), 400, wrong, "invalid_params").await;
    // A page in a browser, which without a token is not served.
    for (path, kind) in [(CHAT, "permission_error"), (MESSAGES, "permission_error")] {
        let request = daemon.client.post(format!("{}{path}", daemon.url));
        let request = request
            .header("Origin", "http://evil.example")
            .json(&chat(1));
        checked(request.send().await.unwrap(), 403, kind, "invalid_api_key").await;
    }
    let image = format!("data:image/png;base64,{}", "iVBORw0K".repeat(300));
    let body = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": image}}]}]});
    let answer = daemon.post(CHAT, body).await;
    assert_eq!(answer.status(), 200, "an image is not counted as text");
}

#[tokio::test]
async fn the_token_is_wanted_as_either_kind_of_client_sends_it() {
    let daemon = Setup::new(&Script::default())
        .env("ORCHD_TOKEN", "right-word")
        .start();
    let with = async |path: &str, header: Option<(&str, &str)>| {
        let mut request = daemon.client.post(format!("{}{path}", daemon.url));
        if let Some((name, value)) = header {
            request = request.header(name, value);
        }
        request.json(&chat(1)).send().await.unwrap()
    };
    for path in [CHAT, MESSAGES] {
        for header in [
            None,
            Some(("Authorization", "Bearer wrong")),
            Some(("x-api-key", "wrong")),
        ] {
            let refused = with(path, header).await;
            checked(refused, 401, "authentication_error", "invalid_api_key").await;
        }
        for header in [
            ("Authorization", "Bearer right-word"),
            ("x-api-key", "right-word"),
        ] {
            assert_eq!(with(path, Some(header)).await.status(), 200, "{header:?}");
        }
    }
}

#[tokio::test]
async fn without_a_token_any_key_will_do() {
    let daemon = Setup::new(&Script::default()).ready().await;
    for header in [("Authorization", "Bearer sk-dummy"), ("x-api-key", "dummy")] {
        let request = daemon.client.post(format!("{}{CHAT}", daemon.url));
        let request = request.header(header.0, header.1).json(&chat(1));
        assert_eq!(request.send().await.unwrap().status(), 200, "{header:?}");
    }
}

#[tokio::test]
async fn what_the_engine_refuses_has_its_words_and_a_status() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let mut body = chat(4);
    body["grammar"] = "(".into();
    for (path, body) in [
        (CHAT, body.clone()),
        (CHAT, streamed(body.clone())),
        (MESSAGES, body.clone()),
        (MESSAGES, streamed(body)),
    ] {
        let refused = daemon.post(path, body).await;
        assert!(refused.headers().contains_key("x-task-id"), "{path}");
        let error = checked(refused, 400, "invalid_request_error", "invalid_params").await;
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("failed to parse grammar"), "{message}");
    }
    // A pool that serves text has no vectors and ranks nothing; it is not asked.
    for (path, body, setting) in [
        (
            "/v1/embeddings",
            json!({"input": "a"}),
            "`serves: embeddings`",
        ),
        (
            "/rerank",
            json!({"query": "a", "documents": ["b"]}),
            "`serves: rerank`",
        ),
    ] {
        let refused = daemon.post(path, body).await;
        assert!(!refused.headers().contains_key("x-task-id"), "{path}");
        let error = checked(refused, 400, "invalid_request_error", "invalid_params").await;
        assert!(error["hint"].as_str().unwrap().contains(setting), "{error}");
    }
}

#[tokio::test]
async fn an_engine_that_was_not_started_for_it_is_told_of_in_our_settings_words() {
    // Whose own flags start it otherwise is asked.
    let daemon = Setup::new(&Script::default())
        .pool("flags", json!(["--embeddings"]))
        .ready()
        .await;
    let body = json!({"query": "a", "documents": ["b"]});
    let refused = daemon.post("/v1/rerank", body).await;
    assert!(refused.headers().contains_key("x-task-id"));
    let error = checked(refused, 400, "invalid_request_error", "invalid_params").await;
    assert_eq!(error["hint"], "set the pool's `serves: rerank`");
}

#[tokio::test]
async fn a_full_queue_says_when_to_come_back() {
    let setup = Setup::new(&Script::endless(5)).pool("queue_capacity", 1);
    let daemon = setup.ready().await;
    let long = json!({ "prompt": "a", "max_tokens": 4000 });
    daemon.submit(long.clone()).await;
    until_running(&daemon, 1).await;
    daemon.submit(long).await;
    for path in [CHAT, MESSAGES] {
        for body in [chat(1), streamed(chat(1))] {
            let refused = daemon.post(path, body).await;
            let headers = refused.headers().clone();
            let error = checked(refused, 429, "rate_limit_error", "queue_full").await;
            let number = |name: &str| -> u64 { headers[name].to_str().unwrap().parse().unwrap() };
            assert_eq!(error["retry_after_ms"], number("retry-after-ms"));
            assert_eq!(
                number("retry-after"),
                number("retry-after-ms").div_ceil(1000)
            );
            assert_eq!(headers["x-should-retry"], "true");
        }
    }
}

#[tokio::test]
async fn a_client_waits_for_so_many_answers_and_no_more() {
    let daemon = Setup::new(&Script::endless(5))
        .top("limits", json!({ "streams_per_client": 2 }))
        .ready()
        .await;
    let first = daemon.post(CHAT, streamed(chat(4000))).await;
    let url = format!("{}{CHAT}", daemon.url);
    let second = tokio::spawn(daemon.client.post(url).json(&chat(4000)).send());
    daemon
        .until("the second waits", async || {
            let pool = daemon.pool().await;
            (pool["queue"]["interactive"] == 1).then_some(())
        })
        .await;
    let refused = daemon.post(CHAT, chat(1)).await;
    checked(refused, 429, "rate_limit_error", "admission_reject").await;
    second.abort();
    drop(first);
    daemon
        .until("there is room again", async || {
            (daemon.post(CHAT, chat(1)).await.status() == 200).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_pool_that_has_failed_is_said_to_be_unavailable() {
    let daemon = Setup::new(&Script::default())
        .pool("provision", json!({ "mode": "system", "path": "/nowhere" }))
        .start();
    daemon.until_state("failed").await;
    for (path, kind) in [
        (CHAT, "service_unavailable_error"),
        (MESSAGES, "overloaded_error"),
    ] {
        let refused = daemon.post(path, streamed(chat(1))).await;
        checked(refused, 503, kind, "pool_unavailable").await;
    }
}

#[tokio::test]
async fn a_task_that_would_start_too_late_is_refused() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    until_running(&daemon, 1).await;
    for (path, kind) in [
        (CHAT, "service_unavailable_error"),
        (MESSAGES, "overloaded_error"),
    ] {
        let request = daemon.client.post(format!("{}{path}", daemon.url));
        let request = request.header("X-Deadline-Ms", "20").json(&chat(1));
        let refused = request.send().await.unwrap();
        checked(refused, 503, kind, "deadline_unmet").await;
    }
}

#[tokio::test]
async fn a_body_that_does_not_come_is_said_in_the_clients_shape() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    let daemon = Setup::new(&Script::default())
        .top("limits", json!({ "body_stall_seconds": 1 }))
        .start();
    let address = daemon.url.trim_start_matches("http://");
    for (path, shape) in [(CHAT, "{\"error\":{"), (MESSAGES, "{\"type\":\"error\",")] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{{");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        let read = stream.read_to_string(&mut answer);
        let read = tokio::time::timeout(crate::support::DEADLINE, read).await;
        read.expect("there was no answer").unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 408 "), "{head}");
        assert!(body.starts_with(shape), "{body}");
        assert!(body.contains("\"timeout_error\""), "{body}");
    }
}
