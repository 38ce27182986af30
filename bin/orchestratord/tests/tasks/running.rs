//! What becomes of a task that runs: its stream, its figures, its receipt.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::prompt;
use crate::support::{Setup, id, shape, text};

#[tokio::test]
async fn a_task_is_admitted_streamed_and_kept() {
    let daemon = Setup::new(&Script::with_pieces(&["Hä", "llo ", "you"]))
        .ready()
        .await;
    let accepted = daemon.submit(prompt()).await;
    assert_eq!(accepted["queue_position"], 0);
    assert_eq!(accepted["predicted_start_ms"], 0);
    assert_eq!(accepted["backoff_ms"], 0);
    assert_eq!(accepted["preparation"]["steps"], json!([]));
    let events = daemon.events(id(&accepted), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    assert_eq!(text(&events), "Hällo you");
    let end = &events.last().unwrap().data;
    assert_eq!(end["finish_reason"], "stop");
    assert_eq!(end["tokens_out"], 3);
    assert_eq!(end["receipt"]["provisioning_mode"], "system");
    let capabilities = daemon.get_json("/v2/meta/capabilities").await;
    assert_eq!(capabilities["pools"][0]["serves"], "text");
    let replica = &capabilities["pools"][0]["replica"];
    assert_eq!(end["receipt"]["engine_digest"], replica["engine_digest"]);
    assert_eq!(end["receipt"]["model_digest"], replica["model_digest"]);
    let view = daemon
        .get_json(&format!("/v2/tasks/{}", id(&accepted)))
        .await;
    assert_eq!(view["status"], "completed");
    assert_eq!(view["text"], "Hällo you");
}

#[tokio::test]
async fn a_reader_that_was_cut_off_gets_exactly_the_rest() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let accepted = daemon.submit(prompt()).await;
    let whole = daemon.events(id(&accepted), None).await;
    for event in &whole {
        let rest = daemon.events(id(&accepted), Some(event.id)).await;
        assert!(whole.ends_with(&rest));
        assert_eq!(
            rest.first().map_or(event.id + 1, |first| first.id),
            event.id + 1
        );
    }
}

#[tokio::test]
async fn verbose_readers_see_figures() {
    let script = Script {
        pieces: vec!["x".to_owned()],
        token_ms: 15,
        cycle: true,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let accepted = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 60 }))
        .await;
    let mut reader = daemon
        .open_events(id(&accepted), "?verbose=true", None)
        .await;
    let mut names = Vec::new();
    while let Some(event) = reader.next().await {
        names.push(event.name);
    }
    assert!(names.iter().any(|name| name == "metrics"), "{names:?}");
    let plain = daemon.events(id(&accepted), None).await;
    assert_eq!(shape(&plain), ["started", "token", "end"]);
}

#[tokio::test]
async fn the_correlation_id_is_echoed_into_answers_and_tasks() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let request = daemon.client.post(format!("{}/v2/tasks", daemon.url));
    let response = request
        .header("X-Correlation-Id", "mine-1")
        .json(&prompt())
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-correlation-id"], "mine-1");
    let accepted: Value = response.json().await.unwrap();
    let view = daemon
        .get_json(&format!("/v2/tasks/{}", id(&accepted)))
        .await;
    assert_eq!(view["correlation_id"], "mine-1");
}

#[tokio::test]
async fn sampling_reaches_the_engine_and_comes_back_in_the_receipt() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let task = json!({
        "messages": [{ "role": "user", "content": "hi" }],
        "seed": 42, "temperature": 0.5, "top_k": 7, "stop": ["zzz"], "max_tokens": 9,
    });
    let accepted = daemon.submit(task).await;
    let events = daemon.events(id(&accepted), None).await;
    let effective = &events.last().unwrap().data["receipt"]["effective"];
    assert_eq!(effective["seed"], 42, "{effective}");
    assert_eq!(effective["top_k"], 7, "{effective}");
    assert_eq!(effective["n_predict"], 9, "{effective}");
}

#[tokio::test]
async fn metrics_and_the_description_cover_what_happened() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let accepted = daemon.submit(prompt()).await;
    daemon.events(id(&accepted), None).await;
    daemon
        .until("the task is counted", async || {
            let metrics = daemon.get("/metrics").await.text().await.unwrap();
            let counted = "orchestratord_tasks_total{pool=\"default\",outcome=\"completed\"} 1";
            (metrics.contains(counted)
                && metrics.contains(
                    "orchestratord_time_to_first_token_seconds_count{pool=\"default\"} 1",
                ))
            .then_some(())
        })
        .await;
    let description = daemon.get_json("/openapi.json").await;
    let paths: Vec<&str> = description["paths"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    insta::assert_json_snapshot!(paths, @r#"
    [
      "/",
      "/api/chat",
      "/api/embed",
      "/api/embeddings",
      "/api/generate",
      "/api/ps",
      "/api/pull",
      "/api/show",
      "/api/tags",
      "/api/version",
      "/detokenize",
      "/health",
      "/metrics",
      "/rerank",
      "/reranking",
      "/tokenize",
      "/v1/chat/completions",
      "/v1/completions",
      "/v1/detokenize",
      "/v1/embeddings",
      "/v1/messages",
      "/v1/messages/count_tokens",
      "/v1/models",
      "/v1/models/{id}",
      "/v1/rerank",
      "/v1/reranking",
      "/v1/responses",
      "/v1/tokenize",
      "/v2/admin/reload",
      "/v2/catalog/models",
      "/v2/catalog/models/{name}",
      "/v2/catalog/models/{name}/verify",
      "/v2/catalog/pulls",
      "/v2/catalog/pulls/{id}",
      "/v2/catalog/pulls/{id}/events",
      "/v2/memory",
      "/v2/meta/capabilities",
      "/v2/pools",
      "/v2/pools/{id}",
      "/v2/pools/{id}/drain",
      "/v2/pools/{id}/health",
      "/v2/pools/{id}/reload",
      "/v2/pools/{id}/resume",
      "/v2/pools/{id}/start",
      "/v2/pools/{id}/stop",
      "/v2/pools/{id}/unload",
      "/v2/tasks",
      "/v2/tasks/{id}",
      "/v2/tasks/{id}/cancel",
      "/v2/tasks/{id}/events"
    ]
    "#);
}
