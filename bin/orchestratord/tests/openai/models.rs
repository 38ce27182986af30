//! Models by name: the list, and which pool a name leads to.

use serde_json::{Value, json};
use test_harness_fake_engine::{Script, install};

use crate::support::{Daemon, Setup};

/// Two pools of the same model, each with an engine of its own words.
async fn two() -> Daemon {
    let setup = Setup::new(&Script::with_pieces(&["one"]));
    let second = install(
        &setup.engine_dir().join("second"),
        &Script::with_pieces(&["two"]),
    );
    let mut one = setup.pool_settings();
    one["aliases"] = json!(["gpt-4o", "small"]);
    let mut two = setup.pool_settings();
    two["provision"]["path"] = json!(second);
    two["ctx"] = 2048.into();
    let daemon = setup.top("pools", json!({ "a": one, "b": two })).start();
    daemon.until_ready("a").await;
    daemon.until_ready("b").await;
    daemon
}

#[tokio::test]
async fn a_name_leads_to_its_pool() {
    let daemon = two().await;
    let path = daemon.model().display().to_string();
    for (model, expected) in [
        ("a", "one"),
        ("gpt-4o", "one"),
        ("small", "one"),
        ("b", "two"),
        (&path, "one"),
    ] {
        let body = json!({"model": model, "prompt": "hi"});
        let answer: Value = daemon
            .post("/v1/completions", body)
            .await
            .json()
            .await
            .unwrap();
        assert_eq!(answer["choices"][0]["text"], expected, "{model}: {answer}");
    }
    // Our own API knows the same names.
    for (model, pool) in [("small", "a"), ("b", "b")] {
        let accepted = daemon.submit(json!({"model": model, "prompt": "hi"})).await;
        let task = accepted["task_id"].as_str().unwrap();
        let view = daemon.get_json(&format!("/v2/tasks/{task}")).await;
        assert_eq!(view["pool_id"], pool);
    }
    let unnamed = daemon
        .post("/v1/completions", json!({"prompt": "hi"}))
        .await;
    assert_eq!(unnamed.status(), 404, "there is no default among several");
}

#[tokio::test]
async fn all_models_are_listed_with_their_state() {
    let daemon = two().await;
    let list = daemon.get_json("/v1/models").await;
    assert_eq!(list["object"], "list");
    let data = list["data"].as_array().unwrap();
    let ids: Vec<&Value> = data.iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["a", "b"]);
    let first = &data[0];
    assert_eq!(first["object"], "model");
    assert_eq!(first["aliases"], json!(["gpt-4o", "small"]));
    assert_eq!(first["state"], "ready");
    assert_eq!(first["owned_by"], "llamacpp");
    assert_eq!(first["model"], daemon.model().display().to_string());
    assert_eq!(data[1]["ctx"], 2048);
    assert_eq!(first["meta"]["n_ctx_train"], 4096);
    assert_eq!(first["meta"]["architecture"], "llama");
    assert!(first["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(list["first_id"], "a");
    for name in ["a", "small"] {
        let shown = daemon.get_json(&format!("/v1/models/{name}")).await;
        assert_eq!(&shown, first, "{name}");
    }
    let path = daemon.model().display().to_string().replace('/', "%2F");
    assert_eq!(
        daemon.get_json(&format!("/v1/models/{path}")).await["id"],
        "a"
    );
    let unknown = daemon.get("/v1/models/smal").await;
    assert_eq!(unknown.status(), 404);
    let error: Value = unknown.json().await.unwrap();
    assert_eq!(error["error"]["code"], "model_not_found");
    assert_eq!(error["error"]["hint"], "did you mean `small`?");
}

#[tokio::test]
async fn a_model_is_listed_while_it_loads() {
    let script = Script {
        load_hang: true,
        ..Script::default()
    };
    let daemon = Setup::new(&script).start();
    daemon.until_state("starting").await;
    let list = daemon.get_json("/v1/models").await;
    assert_eq!(list["data"][0]["state"], "starting");
    assert!(list["data"][0].get("meta").is_none(), "{list}");
}
