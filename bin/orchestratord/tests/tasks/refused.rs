//! Requests that are no tasks.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::support::{Setup, id, shape};

#[tokio::test]
async fn what_does_not_fit_the_context_is_refused_before_it_is_queued() {
    let daemon = Setup::new(&Script {
        prompt_tokens: Some(1000),
        ..Script::default()
    })
    .pool("ctx", 1024)
    .ready()
    .await;
    let ctx = daemon.pool().await["replica"]["ctx"].as_u64().unwrap();
    assert_eq!(ctx, 1024);
    let prompt = "word ".repeat(500);
    let given = daemon
        .post("/v2/tasks", json!({ "prompt": prompt, "max_tokens": 100 }))
        .await;
    assert_eq!(given.status(), 400);
    let body: Value = given.json().await.unwrap();
    assert_eq!(body["error"]["code"], "CONTEXT_LENGTH_EXCEEDED");
    assert!(
        body["error"]["hint"]
            .as_str()
            .unwrap()
            .contains("max_tokens"),
        "{body}"
    );
    // A task that names no limit gets what room there is.
    let accepted = daemon.submit(json!({ "prompt": prompt })).await;
    let events = daemon.events(id(&accepted), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
}

#[tokio::test]
async fn wrong_requests_are_answered_in_one_shape() {
    let daemon = Setup::new(&Script::default())
        .top("tasks", json!({ "max_body_bytes": 2048 }))
        .ready()
        .await;
    let unknown = "/v2/tasks/00000000-0000-7000-8000-000000000000";
    let cases = [
        (daemon.get("/v3/nothing").await, 404, "INVALID_PARAMS"),
        (daemon.get("/v2/tasks").await, 405, "INVALID_PARAMS"),
        (daemon.get("/v2/tasks/%ff").await, 400, "INVALID_PARAMS"),
        (daemon.get(unknown).await, 404, "TASK_NOT_FOUND"),
        (
            daemon.get("/v2/tasks/..%2f..%2fetc").await,
            404,
            "TASK_NOT_FOUND",
        ),
        (daemon.get("/v2/pools/defualt").await, 404, "POOL_NOT_FOUND"),
        (
            daemon
                .post("/v2/tasks", json!({ "prompt": "a", "temprature": 1 }))
                .await,
            400,
            "INVALID_PARAMS",
        ),
        (
            daemon
                .post("/v2/tasks", json!({ "prompt": "a", "model": "haikuu" }))
                .await,
            404,
            "MODEL_NOT_FOUND",
        ),
        (
            daemon
                .post("/v2/tasks", json!({ "prompt": "x".repeat(4096) }))
                .await,
            413,
            "INVALID_PARAMS",
        ),
    ];
    for (response, status, code) in cases {
        let url = response.url().clone();
        assert_eq!(response.status(), status, "{url}");
        let id = response.headers()["x-correlation-id"]
            .to_str()
            .unwrap()
            .to_owned();
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["error"]["code"], code, "{url}: {body}");
        assert_eq!(body["error"]["correlation_id"], id);
        assert!(
            body["error"]["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty())
        );
    }
    let pool: Value = daemon.get_json("/v2/pools/defualt").await;
    assert_eq!(pool["error"]["hint"], "did you mean `default`?");
}
