//! `/v2/catalog`.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::server::Server;
use crate::support::{Daemon, Setup, shape};
use crate::{body, encoded, model, spoil, stored};

async fn pull(daemon: &Daemon, reference: &str) -> Value {
    let answer = daemon
        .post("/v2/catalog/pulls", json!({ "model": reference }))
        .await;
    body(answer, 202).await
}

fn path_of(pull: &Value) -> String {
    format!("/v2/catalog/pulls/{}", pull["pull_id"].as_str().unwrap())
}

async fn until(daemon: &Daemon, pull: &Value, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    daemon
        .until(what, async || {
            let view = daemon.get_json(&path_of(pull)).await;
            is(&view).then_some(view)
        })
        .await
}

async fn until_state(daemon: &Daemon, pull: &Value, state: &str) -> Value {
    let what = format!("the pull is {state}");
    until(daemon, pull, &what, |view| view["state"] == state).await
}

async fn delete(daemon: &Daemon, path: &str) -> reqwest::Response {
    let request = daemon.client.delete(format!("{}{path}", daemon.url));
    request.send().await.unwrap()
}

fn setup() -> Setup {
    Setup::new(&Script::default())
}

#[tokio::test]
async fn a_pull_is_watched_joined_and_then_at_hand() {
    let bytes = model(1);
    let (address, server) = Server::start(&bytes, false).await;
    let daemon = setup().start();
    let reference = format!("{address}/m.gguf");
    let begun = pull(&daemon, &reference).await;
    assert_eq!(
        (&begun["model"], &begun["state"]),
        (&json!(reference), &json!("running"))
    );
    assert_eq!(pull(&daemon, &reference).await["pull_id"], begun["pull_id"]);
    let mut reader = daemon
        .open_stream(begun["events"].as_str().unwrap(), None)
        .await;
    let first = reader.next().await.unwrap();
    assert_eq!(first.name, "progress");
    let half = until(&daemon, &begun, "half has come", |view| {
        view["bytes"].as_u64().unwrap() >= bytes.len() as u64 / 3
    })
    .await;
    assert_eq!(half["total_bytes"], bytes.len());
    server.let_through();
    let mut events = vec![first];
    while let Some(event) = reader.next().await {
        events.push(event);
    }
    assert_eq!(shape(&events), ["progress", "done"]);
    assert!(events.windows(2).all(|pair| pair[0].id < pair[1].id));
    let end = &events.last().unwrap();
    assert_eq!(end.data, daemon.get_json(&path_of(&begun)).await);
    assert_eq!(end.data["state"], "done");
    assert_eq!(end.data["result"]["size_bytes"], bytes.len());
    // Who was cut off gets the rest; who has seen all gets nothing.
    let stream = begun["events"].as_str().unwrap();
    let mut again = daemon.open_stream(stream, Some(events[0].id)).await;
    assert_eq!(again.next().await.unwrap(), **end);
    assert!(again.next().await.is_none());
    let mut nothing = daemon.open_stream(stream, Some(end.id)).await;
    assert!(nothing.next().await.is_none());

    let digest = end.data["result"]["digest"].as_str().unwrap();
    assert!(std::fs::read(stored(&daemon, digest)).unwrap() == bytes);
    for name in [digest, &digest[7..15], &reference, "m.gguf"] {
        let shown = daemon
            .get_json(&format!("/v2/catalog/models/{}", encoded(name)))
            .await;
        assert_eq!(shown["digest"], digest, "{name}: {shown}");
        assert_eq!(
            (&shown["stored"], &shown["in_use"]),
            (&json!(true), &json!(false))
        );
    }
    // A pull of what is here brings nothing over the line.
    server.sent();
    let again = pull(&daemon, &reference).await;
    until_state(&daemon, &again, "done").await;
    assert_eq!(server.sent(), 0);
    let all = daemon.get_json("/v2/catalog/pulls").await;
    assert_eq!(all["pulls"].as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_killed_daemons_pull_goes_on_where_it_was() {
    let bytes = model(2);
    let (address, server) = Server::start(&bytes, false).await;
    let daemon = setup().start();
    let begun = pull(&daemon, &format!("{address}/m.gguf")).await;
    let signed = pull(&daemon, &format!("{address}/m.gguf?sig=secret")).await;
    until(&daemon, &begun, "half has come", |view| {
        view["bytes"].as_u64().unwrap() >= 12 << 20
    })
    .await;
    let daemon = daemon.killed_and_started_again();
    server.let_through();
    let done = until_state(&daemon, &begun, "done").await;
    assert_eq!(done["created_at"], begun["created_at"]);
    let digest = done["result"]["digest"].as_str().unwrap();
    assert!(std::fs::read(stored(&daemon, digest)).unwrap() == bytes);
    let resumed = server.begins().into_iter().any(|begin| begin >= 8 << 20);
    assert!(resumed, "{:?}", server.begins());
    // What holds a secret is not written down, and so forgotten.
    let forgotten = daemon.get(&path_of(&signed)).await;
    assert_eq!(
        body(forgotten, 404).await["error"]["code"],
        "PULL_NOT_FOUND"
    );
    daemon
        .until("nothing is left to go on with", async || {
            (!daemon.runtime_dir().join("pulls.json").exists()).then_some(())
        })
        .await;
    assert!(!daemon.log().contains("secret"));
}

#[tokio::test]
async fn a_cancelled_pull_keeps_what_came_and_others_wait_their_turn() {
    let bytes = model(3);
    let (address, server) = Server::start(&bytes, false).await;
    let daemon = setup().start();
    let first = pull(&daemon, &format!("{address}/a.gguf")).await;
    let second = pull(&daemon, &format!("{address}/b.gguf")).await;
    let third = pull(&daemon, &format!("{address}/c.gguf")).await;
    assert_eq!(
        (&third["state"], &third["queue_position"]),
        (&json!("queued"), &json!(0))
    );
    until(&daemon, &first, "half has come", |view| {
        view["bytes"].as_u64().unwrap() >= 12 << 20
    })
    .await;
    let mut reader = daemon
        .open_stream(first["events"].as_str().unwrap(), None)
        .await;
    let cancelled = body(delete(&daemon, &path_of(&first)).await, 200).await;
    assert_eq!(cancelled["state"], "cancelled");
    let mut last = None;
    while let Some(event) = reader.next().await {
        last = Some(event);
    }
    let last = last.unwrap();
    assert_eq!(
        (last.name.as_str(), &last.data["state"]),
        ("done", &json!("cancelled"))
    );
    until_state(&daemon, &third, "running").await;
    body(delete(&daemon, &path_of(&second)).await, 200).await;
    server.let_through();
    until_state(&daemon, &third, "done").await;
    let before = server.begins().len();
    let again = pull(&daemon, &format!("{address}/a.gguf")).await;
    until_state(&daemon, &again, "done").await;
    assert!(
        server.begins()[before..]
            .iter()
            .all(|begin| *begin >= 8 << 20)
    );
}

#[tokio::test]
async fn what_cannot_be_pulled_says_why() {
    let (address, server) = Server::start(&model(4), true).await;
    server.forget();
    let daemon = setup().start();
    for (request, status, code) in [
        (json!({ "model": "hiku" }), 404, "MODEL_NOT_FOUND"),
        (json!({ "model": "ftp:x" }), 400, "INVALID_PARAMS"),
        (
            json!({ "model": "http://example.com/m.gguf" }),
            400,
            "INVALID_PARAMS",
        ),
        (json!({ "model": " " }), 400, "INVALID_PARAMS"),
        (json!({ "modle": "haiku" }), 400, "INVALID_PARAMS"),
    ] {
        let answer = daemon.post("/v2/catalog/pulls", request.clone()).await;
        let body = body(answer, status).await;
        assert_eq!(body["error"]["code"], code, "{request}");
    }
    let lost = pull(&daemon, &format!("{address}/m.gguf")).await;
    let lost = until_state(&daemon, &lost, "failed").await;
    let error = &lost["error"];
    assert_eq!(error["code"], "MODEL_UNAVAILABLE");
    assert!(
        error["message"].as_str().unwrap().contains("404"),
        "{error}"
    );
    assert!(error["hint"].is_string(), "{error}");
    let events = lost["events"].as_str().unwrap();
    let mut reader = daemon.open_stream(events, None).await;
    let event = reader.next().await.unwrap();
    assert_eq!((event.name.as_str(), &event.data), ("error", error));
    let missing = body(daemon.get("/v2/catalog/pulls/x").await, 404).await;
    assert_eq!(missing["error"]["code"], "PULL_NOT_FOUND");
}

#[tokio::test]
async fn a_model_is_removed_when_no_pool_uses_it() {
    let bytes = model(5);
    let (address, _server) = Server::start(&bytes, true).await;
    let reference = format!("{address}/m.gguf");
    let daemon = setup().pool("model", reference.as_str()).ready().await;
    let path = format!("/v2/catalog/models/{}", encoded(&reference));
    let shown = daemon.get_json(&path).await;
    assert_eq!(
        (&shown["used_by"], &shown["in_use"]),
        (&json!(["default"]), &json!(true))
    );
    let refused = body(delete(&daemon, &path).await, 409).await;
    assert_eq!(refused["error"]["code"], "ADMISSION_REJECT");
    assert_eq!(refused["error"]["pool_id"], "default");
    assert!(
        refused["error"]["message"]
            .as_str()
            .unwrap()
            .contains("pool default")
    );
    // Under another name it is the same model.
    let refused = delete(&daemon, "/v2/catalog/models/m.gguf").await;
    assert_eq!(refused.status(), 409);

    let (other, _server) = Server::start(&model(6), true).await;
    let pulled = pull(&daemon, &format!("{other}/other.gguf")).await;
    let pulled = until_state(&daemon, &pulled, "done").await;
    let digest = pulled["result"]["digest"].as_str().unwrap();
    let removed = body(delete(&daemon, "/v2/catalog/models/other.gguf").await, 200).await;
    assert_eq!(removed["digest"], digest);
    assert!(
        removed["bytes_freed"].as_u64().unwrap() > 24 << 20,
        "{removed}"
    );
    assert!(!stored(&daemon, digest).exists());
    let gone = delete(&daemon, "/v2/catalog/models/other.gguf").await;
    assert_eq!(body(gone, 404).await["error"]["code"], "MODEL_NOT_FOUND");
    let left = daemon.get_json("/v2/catalog/models").await;
    assert_eq!(left["models"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn hostile_names_find_nothing_and_touch_nothing() {
    let daemon = setup().ready().await;
    let model = daemon.model();
    let path = model.to_str().unwrap();
    let long = "x".repeat(10_000);
    for name in [
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "%2e%2e",
        "sha256:%2e%2e%2f%2e%2e",
        "%00",
        "%ff",
        "%e2%80%ae%f0%9f%90%99",
        "%20",
        &encoded(&format!("{path}/../{path}")),
        &long,
    ] {
        let route = format!("/v2/catalog/models/{name}");
        let answers = [
            daemon.get(&route).await,
            delete(&daemon, &route).await,
            daemon.post(&format!("{route}/verify"), json!({})).await,
        ];
        for answer in answers {
            let status = answer.status().as_u16();
            let body: Value = answer.json().await.unwrap();
            assert!(matches!(status, 400 | 404 | 405), "{name}: {status} {body}");
            let said = body.to_string();
            assert!(said.len() < 1000, "{said}");
        }
    }
    assert!(model.exists());
    let pulled = daemon.post(
        "/v2/catalog/pulls",
        json!({ "model": format!("hf:o/r/{long}.gguf") }),
    );
    let refused = body(pulled.await, 400).await;
    assert_eq!(refused["error"]["code"], "INVALID_PARAMS");
}

#[tokio::test]
async fn who_fetches_a_removed_model_again_is_said() {
    let (address, _server) = Server::start(&model(8), true).await;
    let reference = format!("{address}/m.gguf");
    let resting = setup().pool("load", "on_demand");
    let daemon = resting.pool("model", reference.as_str()).start();
    let pulled = pull(&daemon, &reference).await;
    until_state(&daemon, &pulled, "done").await;
    let removed = body(delete(&daemon, "/v2/catalog/models/m.gguf").await, 200).await;
    assert_eq!(removed["fetched_again_by"], json!(["default"]));
}

#[tokio::test]
async fn a_model_is_verified_marked_and_mended() {
    let bytes = model(7);
    let (address, server) = Server::start(&bytes, true).await;
    let daemon = setup().start();
    let pulled = pull(&daemon, &format!("{address}/m.gguf")).await;
    let pulled = until_state(&daemon, &pulled, "done").await;
    let digest = pulled["result"]["digest"].as_str().unwrap();
    let path = "/v2/catalog/models/m.gguf/verify";
    let sound = body(daemon.post(path, json!({})).await, 200).await;
    assert_eq!(
        (&sound["condition"], &sound["bytes_read"]),
        (&json!("sound"), &json!(bytes.len()))
    );
    spoil(&stored(&daemon, digest), 9 << 20);
    server.sent();
    let spoilt = body(daemon.post(path, json!({})).await, 200).await;
    assert_eq!(spoilt["condition"], "spoilt");
    assert_ne!(spoilt["actual_digest"], digest);
    let shown = daemon.get_json("/v2/catalog/models/m.gguf").await;
    assert!(shown["spoilt_since"].is_string(), "{shown}");
    let request = daemon.client.post(format!("{}{path}", daemon.url));
    let watched = request
        .header("accept", "text/event-stream")
        .json(&json!({ "repair": true }));
    let text = watched.send().await.unwrap().text().await.unwrap();
    assert!(
        text.contains("event: done\ndata: {\"condition\":\"mended\""),
        "{text}"
    );
    assert!(std::fs::read(stored(&daemon, digest)).unwrap() == bytes);
    assert_eq!(server.sent(), 8 << 20, "one chunk");

    spoil(&stored(&daemon, digest), 9 << 20);
    server.forget();
    let unmended = body(daemon.post(path, json!({ "repair": true })).await, 503).await;
    assert_eq!(unmended["error"]["code"], "MODEL_UNAVAILABLE");
    let missing = daemon.post("/v2/catalog/models/nobody/verify", json!({}));
    assert_eq!(missing.await.status(), 404);
}
