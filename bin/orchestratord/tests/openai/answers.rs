//! What every route answers when all is well.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::support::{Daemon, Setup};
use crate::{Piece, Reading, chat, streamed, task_of};

fn script() -> Script {
    Script::with_pieces(&["Hä", "llo ", "you"])
}

/// Three pools: for text, for embeddings and for reranking.
async fn three() -> Daemon {
    let setup = Setup::new(&script());
    let other = |serves: &str| {
        let mut pool = setup.pool_settings();
        pool["serves"] = serves.into();
        pool
    };
    let pools = json!({
        "default": setup.pool_settings(),
        "vectors": other("embeddings"),
        "order": other("rerank"),
    });
    let daemon = setup.top("pools", pools).start();
    for pool in ["default", "vectors", "order"] {
        daemon.until_ready(pool).await;
    }
    daemon
}

#[tokio::test]
async fn every_route_gives_the_engines_whole_answer() {
    let daemon = three().await;
    let messages = json!([{"role": "user", "content": "hi there"}]);
    let rerank = json!({"model": "order", "query": "a", "documents": ["bb", "c"]});
    for (path, body, at, expected) in [
        (
            "/v1/chat/completions",
            json!({"messages": messages}),
            "/choices/0/message/content",
            json!("Hällo you"),
        ),
        (
            "/v1/completions",
            json!({"model": "default", "prompt": "hi"}),
            "/choices/0/text",
            json!("Hällo you"),
        ),
        (
            "/v1/responses",
            json!({"model": "default", "input": "hi"}),
            "/output/0/content/0/text",
            json!("Hällo you"),
        ),
        (
            "/v1/messages",
            json!({"model": "default", "messages": messages, "max_tokens": 9}),
            "/content/0/text",
            json!("Hällo you"),
        ),
        (
            "/v1/messages/count_tokens",
            json!({"model": "default", "messages": messages}),
            "/input_tokens",
            json!(2),
        ),
        (
            "/v1/embeddings",
            json!({"model": "vectors", "input": ["a", "b"]}),
            "/data/1/index",
            json!(1),
        ),
        ("/v1/rerank", rerank.clone(), "/results/0/index", json!(0)),
        (
            "/v1/reranking",
            rerank.clone(),
            "/results/1/index",
            json!(1),
        ),
        ("/rerank", rerank.clone(), "/results/0/index", json!(0)),
        ("/reranking", rerank, "/results/0/index", json!(0)),
        (
            "/v1/tokenize",
            json!({"content": "a b c"}),
            "/tokens/2",
            Value::Null,
        ),
        (
            "/tokenize",
            json!({"content": "a b c"}),
            "/tokens/2",
            Value::Null,
        ),
        (
            "/v1/detokenize",
            json!({"tokens": [1, 2]}),
            "/content",
            json!("t1 t2"),
        ),
        (
            "/detokenize",
            json!({"tokens": [1, 2]}),
            "/content",
            json!("t1 t2"),
        ),
    ] {
        let response = daemon.post(path, body).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(response.headers()["content-type"], "application/json");
        for name in [
            "x-correlation-id",
            "x-queue-position",
            "x-predicted-start-ms",
        ] {
            assert!(response.headers().contains_key(name), "{path}: {name}");
        }
        let task = task_of(&response);
        let answer: Value = response.json().await.unwrap();
        let found = answer.pointer(at);
        assert!(found.is_some(), "{path}: {answer}");
        if !expected.is_null() {
            assert_eq!(found, Some(&expected), "{path}: {answer}");
        }
        let view = daemon.get_json(&format!("/v2/tasks/{task}")).await;
        assert_eq!(view["status"], "completed", "{path}: {view}");
        if expected == "Hällo you" {
            assert_eq!(
                view["text"], "Hällo you",
                "{path}: a call is a task like any"
            );
        }
    }
}

#[tokio::test]
async fn an_answer_names_the_pool_by_whatever_name_it_was_asked_for() {
    let daemon = Setup::new(&script())
        .pool("aliases", json!(["gpt-x"]))
        .ready()
        .await;
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
    ] {
        let mut body = json!({"model": "gpt-x", "prompt": "a", "input": "a", "max_tokens": 3});
        body["messages"] = json!([{"role": "user", "content": "a"}]);
        let response = daemon.post(path, body).await;
        let answer: Value = response.json().await.unwrap();
        assert_eq!(answer["model"], "default", "{path}: {answer}");
    }
}

/// The texts in a stream's events, put together.
fn text(path: &str, pieces: &[Piece]) -> String {
    let at = match path {
        "/v1/chat/completions" => "/choices/0/delta/content",
        "/v1/completions" => "/choices/0/text",
        "/v1/responses" => "/delta",
        _ => "/delta/text",
    };
    let events = pieces.iter().filter(|piece| **piece != done());
    events
        .filter_map(|event| event.data().pointer(at)?.as_str().map(str::to_owned))
        .collect()
}

fn done() -> Piece {
    Piece::Event {
        name: None,
        data: "[DONE]".to_owned(),
    }
}

#[tokio::test]
async fn every_stream_gives_the_engines_events_and_the_apis_end() {
    let daemon = Setup::new(&script()).ready().await;
    for (path, body) in [
        ("/v1/chat/completions", chat(9)),
        ("/v1/completions", json!({"prompt": "hi"})),
        ("/v1/responses", json!({"input": "hi"})),
        ("/v1/messages", chat(9)),
    ] {
        let response = daemon.post(path, streamed(body)).await;
        assert_eq!(response.headers()["cache-control"], "no-cache");
        let task = task_of(&response);
        let pieces = Reading::of(response).rest().await;
        assert_eq!(text(path, &pieces), "Hällo you", "{path}: {pieces:?}");
        let last = pieces.last().unwrap();
        let openai = path.ends_with("completions");
        assert_eq!(*last == done(), openai, "{path}");
        for piece in pieces.iter().filter(|piece| **piece != done()) {
            let Piece::Event { name, .. } = piece else {
                unreachable!()
            };
            match name {
                None => assert!(openai, "{path}: {piece:?}"),
                Some(name) => assert_eq!(piece.data()["type"], **name, "{path}"),
            }
        }
        // The same task, read as one of our own.
        let events = daemon.events(&task, None).await;
        assert_eq!(crate::support::text(&events), "Hällo you", "{path}");
    }
}

#[tokio::test]
async fn what_was_used_is_told_to_those_who_ask() {
    let daemon = Setup::new(&script()).ready().await;
    let usages = async |body: Value| {
        let response = daemon.post("/v1/chat/completions", streamed(body)).await;
        let pieces = Reading::of(response).rest().await;
        let events = pieces.iter().filter(|piece| **piece != done());
        let usages = events.filter(|event| event.data().get("usage").is_some());
        usages.map(Piece::data).collect::<Vec<_>>()
    };
    assert_eq!(usages(chat(9)).await, Vec::<Value>::new());
    let mut asking = chat(9);
    asking["stream_options"] = json!({"include_usage": true});
    let told = usages(asking).await;
    assert_eq!(told.len(), 1);
    assert_eq!(told[0]["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn what_this_server_does_not_know_reaches_the_engine() {
    let daemon = Setup::new(&script()).ready().await;
    let mut body = chat(3);
    body["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
    body["nobody_knows"] = json!({"a": [1, 2.5e10, null]});
    let response = daemon.post("/v1/chat/completions", body.clone()).await;
    assert_eq!(response.status(), 200);
    let engine = daemon.pool().await["replica"]["url"].clone();
    let url = format!("{}/fake/requests", engine.as_str().unwrap());
    let requests: Vec<Value> = daemon
        .client
        .get(url)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let seen = requests.last().unwrap();
    for (key, value) in body.as_object().unwrap() {
        assert_eq!(&seen[key], value, "{key}");
    }
}
