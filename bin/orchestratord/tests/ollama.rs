//! Clients that speak Ollama's API only. The daemon is a real process, and so is the
//! (fake) engine.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, and says what it saw"
)]

mod support;

use reqwest::Response;
use serde_json::{Value, json};
use support::{Daemon, Setup};
use test_harness_fake_engine::{Fault, Script};

fn chat(options: &Value) -> Value {
    json!({
        "model": "default:latest", "options": options,
        "messages": [{"role": "user", "content": "hi there"}],
    })
}

fn whole(mut body: Value) -> Value {
    body["stream"] = false.into();
    body
}

/// Every line, as JSON: a blank one would end the stream for some clients.
async fn lines(response: Response) -> Vec<Value> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.unwrap();
    let lines = text.strip_suffix('\n').expect("a last line has an end");
    lines
        .split('\n')
        .map(|line| serde_json::from_str(line).expect(line))
        .collect()
}

async fn refused(daemon: &Daemon, path: &str, body: Value, status: u16) -> String {
    let response = daemon.post(path, body).await;
    assert_eq!(response.status(), status);
    assert!(response.headers().contains_key("x-correlation-id"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body.as_object().unwrap().len(), 1, "{body}");
    body["error"].as_str().unwrap().to_owned()
}

fn contents(lines: &[Value]) -> String {
    let content = |line: &Value| line["message"]["content"].as_str().map(str::to_owned);
    lines.iter().filter_map(content).collect()
}

#[tokio::test]
async fn a_chat_is_streamed_line_by_line_and_answered_whole() {
    let script = Script::with_pieces(&["Good ", "day\n", "to you"]);
    let daemon = Setup::new(&script).ready().await;
    let response = daemon.post("/api/chat", chat(&json!({}))).await;
    assert!(response.headers()["x-task-id"].to_str().is_ok());
    let streamed = lines(response).await;
    assert_eq!(contents(&streamed), "Good day\nto you");
    let (last, before) = streamed.split_last().unwrap();
    assert!(before.len() >= 3, "{before:?}");
    for line in before {
        assert_eq!(
            (&line["model"], &line["done"]),
            (&json!("default:latest"), &json!(false))
        );
    }
    assert_eq!(
        (&last["done"], &last["done_reason"]),
        (&json!(true), &json!("stop"))
    );
    assert_eq!(
        (&last["eval_count"], &last["prompt_eval_count"]),
        (&json!(3), &json!(2))
    );
    assert!(
        last["total_duration"].as_u64() >= last["eval_duration"].as_u64(),
        "{last}"
    );

    let body = whole(chat(&json!({"num_predict": 2})));
    let answer: Value = daemon.post("/api/chat", body).await.json().await.unwrap();
    assert_eq!(answer["message"]["content"], "Good day\n");
    assert_eq!(
        (&answer["done"], &answer["done_reason"]),
        (&json!(true), &json!("length"))
    );
}

#[tokio::test]
async fn a_prompt_is_answered_with_the_template_and_without() {
    let daemon = Setup::new(&Script::with_pieces(&["a", "b"])).ready().await;
    let prompt = json!({"model": "default", "prompt": "say", "system": "be brief"});
    let streamed = lines(daemon.post("/api/generate", prompt).await).await;
    let text: String = streamed
        .iter()
        .map(|line| line["response"].as_str().unwrap())
        .collect();
    assert_eq!(text, "ab");
    let raw = json!({"model": "default", "prompt": "say", "raw": true, "stream": false});
    let answer: Value = daemon
        .post("/api/generate", raw)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&answer["response"], &answer["done"]),
        (&json!("ab"), &json!(true))
    );
    let requests = engine_requests(&daemon).await;
    let asked = |path: &str| {
        requests
            .iter()
            .find(|request| request.to_string().contains(path))
    };
    assert!(asked("be brief").is_some(), "{requests:?}");
}

async fn engine_requests(daemon: &Daemon) -> Vec<Value> {
    let pool = daemon.pool().await;
    let url = format!("{}/fake/requests", pool["replica"]["url"].as_str().unwrap());
    let requests: Value = daemon
        .client
        .get(url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    requests.as_array().unwrap().clone()
}

#[tokio::test]
async fn what_cannot_be_mapped_is_refused_with_what_to_do_instead() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let message = refused(&daemon, "/api/chat", chat(&json!({"num_gpu": 1})), 400).await;
    assert!(
        message.contains("num_gpu") && message.contains("gpu_layers"),
        "{message}"
    );
    let message = refused(
        &daemon,
        "/api/chat",
        chat(&json!({"num_ctx": 1 << 30})),
        400,
    )
    .await;
    assert!(
        message.contains("num_ctx") && message.contains("`ctx`"),
        "{message}"
    );
    let suffix = json!({"model": "default", "prompt": "a", "suffix": "b"});
    refused(&daemon, "/api/generate", suffix, 400).await;
    let unknown = json!({"model": "defualt", "messages": []});
    let message = refused(&daemon, "/api/chat", unknown, 404).await;
    assert!(message.contains("`default`"), "the nearest name: {message}");
    for (path, instead) in [
        ("/api/create", "reload"),
        ("/api/copy", "aliases"),
        ("/api/push", "registry"),
        ("/api/blobs/sha256:00", "models pull"),
    ] {
        let message = refused(&daemon, path, json!({}), 501).await;
        assert!(message.contains(instead), "{message}");
    }
    let message = refused(
        &daemon,
        "/api/embed",
        json!({"model": "default", "input": "a"}),
        400,
    )
    .await;
    assert!(message.contains("embeddings"), "{message}");
    refused(&daemon, "/api/nothing", json!({}), 404).await;
}

#[tokio::test]
async fn models_are_listed_shown_and_said_to_be_here() {
    let daemon = Setup::new(&Script::default())
        .pool("aliases", json!(["mini:1b", "small"]))
        .pool("idle_ttl_seconds", 3600)
        .ready()
        .await;
    let root = daemon.get("/").await;
    assert_eq!(root.text().await.unwrap(), "orchestratord is running");
    let head = daemon
        .client
        .head(format!("{}/", daemon.url))
        .send()
        .await
        .unwrap();
    assert_eq!(head.status(), 200);
    let version = daemon.get_json("/api/version").await;
    assert_eq!(version["server"], "orchestratord");
    let tags = daemon.get_json("/api/tags").await;
    let names: Vec<&str> = tags["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["default:latest", "mini:1b", "small:latest"]);
    let first = &tags["models"][0];
    assert_eq!(first["digest"].as_str().unwrap().len(), 64);
    assert_eq!(first["details"]["format"], "gguf");
    assert!(first["size"].as_u64().unwrap() > 0);
    let ps = daemon.get_json("/api/ps").await;
    assert_eq!(ps["models"][0]["name"], "default:latest");
    let expires = ps["models"][0]["expires_at"].as_str().unwrap();
    let expires: jiff::Timestamp = expires.parse().unwrap();
    let left = expires.duration_since(jiff::Timestamp::now()).as_secs();
    assert!((3000..=3600).contains(&left), "{left}");
    for name in ["small", "mini:1b", "default:latest"] {
        let shown: Value = daemon
            .post("/api/show", json!({"model": name}))
            .await
            .json()
            .await
            .unwrap();
        assert_eq!(shown["capabilities"][0], "completion", "{shown}");
        assert!(shown["model_info"].is_object());
        let pulled = daemon.post("/api/pull", json!({"model": name})).await;
        assert_eq!(lines(pulled).await, [json!({"status": "success"})]);
    }
    let message = refused(&daemon, "/api/pull", json!({"model": "llama3"}), 404).await;
    assert!(message.contains("orchestratord models pull"), "{message}");
}

#[tokio::test]
async fn a_request_without_words_loads_and_one_with_no_time_to_live_unloads() {
    let daemon = Setup::new(&Script::with_pieces(&["a"]))
        .pool("load", "on_demand")
        .start();
    assert_eq!(daemon.get_json("/api/ps").await, json!({"models": []}));
    let load = json!({"model": "default", "stream": false});
    let loaded: Value = daemon
        .post("/api/generate", load)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&loaded["done_reason"], &loaded["response"]),
        (&json!("load"), &json!(""))
    );
    assert!(loaded["load_duration"].as_u64().unwrap() > 0, "{loaded}");
    assert_eq!(daemon.pool().await["state"], "ready");
    let unload = json!({"model": "default", "messages": [], "keep_alive": "0s"});
    let unloaded = lines(daemon.post("/api/chat", unload).await).await;
    assert_eq!(unloaded[0]["done_reason"], "unload");
    daemon.until_state("unloaded").await;
    let mut last = chat(&json!({}));
    last["keep_alive"] = 0.into();
    let answered = lines(daemon.post("/api/chat", last).await).await;
    assert_eq!(contents(&answered), "a", "the model was loaded for it");
    daemon.until_state("unloaded").await;
}

#[tokio::test]
async fn a_drained_pool_is_not_loaded_behind_its_operators_back() {
    let daemon = Setup::new(&Script::default()).ready().await;
    daemon.post("/v2/pools/default/drain", json!({})).await;
    daemon.until_state("stopped").await;
    let message = refused(&daemon, "/api/generate", json!({"model": "default"}), 503).await;
    assert!(message.contains("resume"), "{message}");
    assert_eq!(daemon.pool().await["state"], "stopped");
}

#[tokio::test]
async fn a_crash_in_mid_stream_is_the_last_line() {
    let script = Script {
        fault: Some(Fault::Crash {
            after_tokens: 2,
            exit_code: 3,
        }),
        token_ms: 20,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let lines = lines(daemon.post("/api/chat", chat(&json!({}))).await).await;
    let (last, before) = lines.split_last().unwrap();
    assert!(
        last["error"].is_string() && last.get("done").is_none(),
        "{last}"
    );
    assert!(before.iter().all(|line| line["done"] == false));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_and_one_too_many_is_told_when_to_come_back() {
    let daemon = Setup::new(&Script::endless(5))
        .pool("queue_capacity", 1)
        .ready()
        .await;
    let mut running = daemon.post("/api/chat", chat(&json!({}))).await;
    let task = running.headers()["x-task-id"].to_str().unwrap().to_owned();
    assert!(running.chunk().await.unwrap().is_some());
    // Nothing is sent while it waits but the headers, after a second.
    let waiting = daemon.post("/api/chat", chat(&json!({}))).await;
    assert_eq!(waiting.status(), 200);
    let full = daemon.post("/api/chat", chat(&json!({}))).await;
    assert_eq!(full.status(), 429);
    assert!(full.headers().contains_key("retry-after"));
    let body: Value = full.json().await.unwrap();
    assert!(body["error"].as_str().unwrap().contains("queue"), "{body}");
    let other = waiting.headers()["x-task-id"].to_str().unwrap().to_owned();
    drop((running, waiting));
    for task in [task, other] {
        daemon
            .until("the task is cancelled", async || {
                let view = daemon.get_json(&format!("/v2/tasks/{task}")).await;
                (view["status"] == "cancelled").then_some(())
            })
            .await;
    }
}

#[tokio::test]
async fn vectors_come_from_a_pool_that_serves_them() {
    let setup = Setup::new(&Script::default()).pool("serves", "embeddings");
    let daemon = setup.ready().await;
    let body = json!({"model": "default", "input": ["a b", "c"], "dimensions": 2});
    let answer: Value = daemon.post("/api/embed", body).await.json().await.unwrap();
    let vectors = answer["embeddings"].as_array().unwrap();
    assert_eq!(vectors.len(), 2, "{answer}");
    for vector in vectors {
        let numbers: Vec<f64> = vector
            .as_array()
            .unwrap()
            .iter()
            .map(|n| n.as_f64().unwrap())
            .collect();
        assert_eq!(numbers.len(), 2);
        let length = numbers.iter().map(|number| number * number).sum::<f64>();
        assert!((length - 1.0).abs() < 1e-6, "{numbers:?}");
    }
    let old = json!({"model": "default", "prompt": "a b"});
    let answer: Value = daemon
        .post("/api/embeddings", old)
        .await
        .json()
        .await
        .unwrap();
    assert!(
        answer["embedding"].as_array().unwrap().len() > 2,
        "{answer}"
    );
    let shown: Value = daemon
        .post("/api/show", json!({"model": "default"}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(shown["capabilities"], json!(["embedding"]));
}
