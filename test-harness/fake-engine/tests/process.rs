//! The fake engine as a process: what other crates' tests rely on.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic")]

use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use test_harness_fake_engine::{
    FakeEngine, Fault, LoadFailure, Script, grandchild, install, order, starts,
};

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(3));
    }
}

async fn post(engine: &FakeEngine, body: &Value) -> (u16, String) {
    post_to(engine, "/completion", body).await
}

async fn post_to(engine: &FakeEngine, path: &str, body: &Value) -> (u16, String) {
    let answer = reqwest::Client::new()
        .post(format!("{}{path}", engine.url()))
        .json(body)
        .send()
        .await
        .unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

#[test]
fn version_is_told_as_the_real_one_tells_it() {
    let dir = tempfile::tempdir().unwrap();
    let script = Script {
        load_failure: Some(LoadFailure {
            exit_code: 3,
            message: "no".into(),
        }),
        ..Script::default()
    };
    let output = Command::new(install(dir.path(), &script))
        .arg("--version")
        .output()
        .unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.starts_with("version: 0.6.0-dev (build 11434, commit fa4ee61)\nbuilt with "),
        "{text}"
    );
    assert_eq!(starts(dir.path()), 0);
}

#[test]
fn the_first_start_fails_and_the_second_works() {
    let dir = tempfile::tempdir().unwrap();
    let script = Script {
        load_failure: Some(LoadFailure {
            exit_code: 7,
            message: "out of luck".into(),
        }),
        failing_starts: Some(1),
        ..Script::default()
    };
    let binary = install(dir.path(), &script);
    let output = Command::new(&binary)
        .args(["--port", "0"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(7));
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("out of luck")
    );
    let mut second = Command::new(&binary)
        .args(["--port", "0"])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let log = second.stderr.take().unwrap();
    let loaded = std::io::BufRead::lines(std::io::BufReader::new(log))
        .any(|line| line.unwrap().contains("model loaded"));
    second.kill().unwrap();
    second.wait().unwrap();
    assert!(loaded);
    assert_eq!(starts(dir.path()), 2);
}

#[tokio::test]
async fn loading_answers_503_in_the_real_shape() {
    let engine = FakeEngine::launch(
        &Script {
            load_hang: true,
            ..Script::default()
        },
        &[],
    );
    let (status, body) = post(&engine, &json!({"prompt": "x"})).await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 503);
    assert_eq!(
        body,
        json!({"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})
    );
}

#[tokio::test]
async fn a_stream_and_a_whole_answer_say_the_same() {
    let engine = FakeEngine::start(&Script::with_pieces(&["Grüß", " dich, ", "日本"]));
    let (status, body) = post(&engine, &json!({"prompt": "a b", "stream": true})).await;
    assert_eq!(status, 200);
    let events: Vec<Value> = body
        .split_terminator("\n\n")
        .map(|event| serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap())
        .collect();
    let streamed: String = events
        .iter()
        .map(|event| event["content"].as_str().unwrap())
        .collect();
    let (_, whole) = post(&engine, &json!({"prompt": "a b"})).await;
    let whole: Value = serde_json::from_str(&whole).unwrap();
    assert_eq!(streamed, "Grüß dich, 日本");
    assert_eq!(whole["content"], streamed);
    let last = events.last().unwrap();
    assert_eq!(
        (
            &last["stop_type"],
            &last["tokens_predicted"],
            &last["tokens_evaluated"]
        ),
        (&json!("eos"), &json!(3), &json!(2))
    );
    let (_, limited) = post(&engine, &json!({"prompt": "a b", "n_predict": 2})).await;
    let limited: Value = serde_json::from_str(&limited).unwrap();
    assert_eq!(
        (&limited["content"], &limited["stop_type"]),
        (&json!("Grüß dich, "), &json!("limit"))
    );
    assert_eq!(engine.requests().len(), 3);
}

#[tokio::test]
async fn too_long_a_prompt_is_refused_in_the_real_shape() {
    let engine = FakeEngine::start_with(&Script::default(), &["-c", "8", "--parallel", "2"]);
    let (status, body) = post(
        &engine,
        &json!({"prompt": "one two three four five", "stream": true}),
    )
    .await;
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 400);
    assert_eq!(body["error"]["type"], "exceed_context_size_error");
    assert_eq!(
        (&body["error"]["n_prompt_tokens"], &body["error"]["n_ctx"]),
        (&json!(5), &json!(4))
    );
}

#[tokio::test]
async fn a_crash_ends_the_process_after_the_tokens() {
    let script = Script {
        fault: Some(Fault::Crash {
            after_tokens: 2,
            exit_code: 9,
        }),
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let answer = reqwest::Client::new()
        .post(format!("{}/completion", engine.url()))
        .json(&json!({"prompt": "x", "stream": true}))
        .send()
        .await
        .unwrap();
    assert!(answer.text().await.is_err());
    let url = format!("{}/health", engine.url());
    assert!(reqwest::get(url).await.is_err());
}

#[test]
fn term_is_ignored_on_demand_and_a_grandchild_lives() {
    let script = Script {
        ignore_term: true,
        grandchild: true,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let term = |pid: u32| {
        Command::new("kill")
            .arg(pid.to_string())
            .status()
            .unwrap()
            .success()
    };
    assert!(term(engine.pid()));
    assert_eq!(engine.busy_slots(), 0, "it still answers");
    let child = grandchild(engine.dir()).unwrap();
    assert!(std::path::Path::new(&format!("/proc/{child}")).exists());
    assert!(term(child));
    until("the grandchild is gone or waits to be reaped", || {
        std::fs::read_to_string(format!("/proc/{child}/stat"))
            .map_or(true, |stat| stat.contains(") Z "))
    });
}

// Several threads: the client's connection closes while this test waits.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_lingers_after_its_client_left() {
    let script = Script {
        slot_free_ms: 150,
        ..Script::endless(5)
    };
    let engine = FakeEngine::start(&script);
    let answer = reqwest::Client::new()
        .post(format!("{}/completion", engine.url()))
        .json(&json!({"prompt": "x", "stream": true}))
        .send()
        .await
        .unwrap();
    assert_eq!(engine.busy_slots(), 1);
    let left = Instant::now();
    drop(answer);
    until("the slot is free", || engine.busy_slots() == 0);
    assert!(left.elapsed() >= Duration::from_millis(150));
}

#[tokio::test]
async fn a_numbered_answer_goes_on_where_the_prompt_ends() {
    let script = Script {
        numbered: true,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let answer = async |prompt: &str| {
        let (status, body) = post(&engine, &json!({"prompt": prompt, "n_predict": 3})).await;
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).unwrap();
        body["content"].as_str().unwrap().to_owned()
    };
    assert_eq!(answer("count").await, "w0 w1 w2 ");
    assert_eq!(answer("count w0 w1 ").await, "w2 w3 w4 ");
    assert_eq!(answer("<|im_start|>assistant\nw0 ").await, "w1 w2 w3 ");
}

#[tokio::test]
async fn an_order_makes_one_completion_go_wrong() {
    let engine = FakeEngine::start(&Script::default());
    order(engine.dir(), &Fault::Status500);
    let body = json!({"prompt": "a"});
    assert_eq!(post(&engine, &body).await.0, 500);
    assert_eq!(post(&engine, &body).await.0, 200);
    order(engine.dir(), &Fault::Status500);
    assert_eq!(test_harness_fake_engine::orders::take_back(engine.dir()), 1);
    assert_eq!(post(&engine, &body).await.0, 200);
}

#[test]
fn an_unknown_argument_ends_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(install(dir.path(), &Script::default()))
        .arg("--no-such-flag")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("--no-such-flag"), "{text}");
}

#[tokio::test]
async fn every_api_is_answered_in_its_own_form() {
    let script = Script {
        progress_events: 2,
        ..Script::with_pieces(&["Hä", "llo"])
    };
    let engine = FakeEngine::start_with(&script, &["--reranking"]);
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "a b"}]}]);
    let asked = [
        (
            "/v1/chat/completions",
            json!({"messages": messages, "max_tokens": 2}),
        ),
        ("/v1/completions", json!({"prompt": "a b", "max_tokens": 2})),
        (
            "/v1/responses",
            json!({"input": messages, "max_output_tokens": 2}),
        ),
        (
            "/v1/messages",
            json!({"messages": messages, "max_tokens": 2}),
        ),
    ];
    let said = [
        ["\"finish_reason\":\"length\"", "data: [DONE]"],
        ["\"finish_reason\":\"length\"", "data: [DONE]"],
        ["event: response.created", "event: response.completed"],
        ["event: message_start", "event: message_stop"],
    ];
    for ((path, mut body), said) in asked.into_iter().zip(said) {
        let (status, whole) = post_to(&engine, path, &body).await;
        assert_eq!(status, 200, "{path}: {whole}");
        assert!(whole.contains("Hällo"), "{path}: {whole}");
        body["stream"] = true.into();
        let (_, plain) = post_to(&engine, path, &body).await;
        assert!(
            said.iter().all(|said| plain.contains(said)),
            "{path}: {plain}"
        );
        assert!(!plain.contains("prompt_progress"), "{path}: {plain}");
        body["return_progress"] = true.into();
        let (_, told) = post_to(&engine, path, &body).await;
        let words = if path == "/v1/messages" { 0 } else { 2 };
        assert_eq!(
            told.matches("prompt_progress").count(),
            words,
            "{path}: {told}"
        );
    }
    let (_, vectors) = post_to(&engine, "/v1/embeddings", &json!({"input": ["a", "b"]})).await;
    assert_eq!(vectors.matches("\"embedding\":[").count(), 2, "{vectors}");
    let body = json!({"query": "a", "documents": ["a", "b"]});
    let (_, ranks) = post_to(&engine, "/v1/rerank", &body).await;
    assert_eq!(ranks.matches("relevance_score").count(), 2, "{ranks}");
    let plain = FakeEngine::start(&Script::default());
    let (status, refused) = post_to(&plain, "/v1/embeddings", &json!({"input": "a"})).await;
    assert_eq!(status, 501, "{refused}");
}
