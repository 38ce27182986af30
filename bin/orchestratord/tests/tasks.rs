//! Tasks over HTTP: admission, streams, resume, cancel. The daemon is a real
//! process, and so is the (fake) engine.

mod support;

use serde_json::{Value, json};
use support::{Setup, id, shape, text};
use test_harness_fake_engine::Script;

fn prompt() -> Value {
    json!({ "prompt": "one two three" })
}

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
async fn the_queue_is_ours_bounded_and_interactive_first() {
    let setup = Setup::new(&Script::endless(5)).pool("queue_capacity", 3);
    let daemon = setup.ready().await;
    let long = json!({ "prompt": "a", "max_tokens": 4000 });
    let running = daemon.submit(long).await;
    daemon
        .until("a task runs", async || {
            (daemon.pool().await["running"] == 1).then_some(())
        })
        .await;
    let batch = daemon
        .submit(json!({ "prompt": "b", "priority": "batch", "max_tokens": 2 }))
        .await;
    let first = daemon
        .submit(json!({ "prompt": "i", "max_tokens": 2 }))
        .await;
    let second = daemon
        .submit(json!({ "prompt": "j", "max_tokens": 2 }))
        .await;
    assert_eq!(batch["queue_position"], 0);
    assert_eq!(first["queue_position"], 0, "interactive goes before batch");
    assert_eq!(second["queue_position"], 1);
    assert!(second["predicted_start_ms"].as_u64().unwrap() > 0);
    assert!(second["backoff_ms"].as_u64().unwrap() > 0);
    let view = daemon.get_json(&format!("/v2/tasks/{}", id(&batch))).await;
    assert_eq!(view["status"], "queued");
    assert_eq!(view["queue_position"], 2);

    let refused = daemon.post("/v2/tasks", prompt()).await;
    assert_eq!(refused.status(), 429);
    let seconds: u64 = refused.headers()["retry-after"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let backoff: u64 = refused.headers()["x-backoff-ms"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "QUEUE_FULL");
    assert_eq!(body["error"]["policy_label"], "queue_capacity");
    assert_eq!(body["error"]["retriable"], true);
    assert_eq!(body["error"]["retry_after_ms"], backoff);
    assert_eq!(seconds, backoff.div_ceil(1000));

    // The engine never had more than its one slot's worth, by its own word.
    let pool = daemon.pool().await;
    let slots = format!("{}/slots", pool["replica"]["url"].as_str().unwrap());
    let slots: Value = daemon
        .client
        .get(slots)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    let busy = slots
        .as_array()
        .unwrap()
        .iter()
        .filter(|slot| slot["is_processing"] == true);
    assert_eq!(busy.count(), 1, "{slots}");
    assert_eq!(pool["running"], 1);
    assert_eq!(pool["queue"]["interactive"], 2);
    daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&running)), json!({}))
        .await;
    for task in [&first, &second, &batch] {
        assert_eq!(
            shape(&daemon.events(id(task), None).await),
            ["started", "token", "end"]
        );
    }
}

#[tokio::test]
async fn a_task_is_never_run_late() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let long = json!({ "prompt": "a", "max_tokens": 4000 });
    let running = daemon.submit(long).await;
    // Longer than predicted, and far shorter than the running task takes.
    let late = json!({ "prompt": "a", "deadline_ms": 1500, "max_tokens": 1 });
    let late = daemon.submit(late).await;
    let refused = daemon
        .post("/v2/tasks", json!({ "prompt": "a", "deadline_ms": 1 }))
        .await;
    assert_eq!(refused.status(), 503);
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "DEADLINE_UNMET", "{body}");
    let events = daemon.events(id(&late), None).await;
    assert_eq!(shape(&events), ["error"]);
    assert_eq!(events[0].data["code"], "DEADLINE_UNMET");
    let view = daemon
        .get_json(&format!("/v2/tasks/{}", id(&running)))
        .await;
    assert_eq!(view["status"], "running");
}

#[tokio::test]
async fn a_batch_task_that_has_waited_takes_its_turn() {
    let daemon = Setup::new(&Script::endless(2))
        .pool("batch_ageing_seconds", 0)
        .ready()
        .await;
    let running = daemon.submit(prompt()).await;
    let batch = json!({ "prompt": "b", "priority": "batch", "max_tokens": 2 });
    let batch = daemon.submit(batch).await;
    let interactive = daemon
        .submit(json!({ "prompt": "i", "max_tokens": 2 }))
        .await;
    assert_eq!(batch["queue_position"], 0);
    assert_eq!(
        interactive["queue_position"], 1,
        "the aged batch task goes first"
    );
    daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&running)), json!({}))
        .await;
    for task in [&batch, &interactive] {
        assert_eq!(
            shape(&daemon.events(id(task), None).await),
            ["started", "token", "end"]
        );
    }
}

#[tokio::test]
async fn a_cancelled_stream_ends_and_its_slot_is_seen_free() {
    let daemon = Setup::new(&Script {
        slot_free_ms: 40,
        ..Script::endless(2)
    })
    .ready()
    .await;
    let accepted = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&accepted), "", None).await;
    while reader.next().await.unwrap().data["i"] != 3 {}
    let answer = daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&accepted)), json!({}))
        .await;
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["cancelled"], true);
    assert!(answer["freed_ms"].as_u64().unwrap() >= 40, "{answer}");
    let mut last = None;
    while let Some(event) = reader.next().await {
        last = Some(event);
    }
    let last = last.unwrap();
    assert_eq!(last.name, "end");
    assert_eq!(last.data["finish_reason"], "cancelled");
    assert!(
        last.data["decode_time_ms"].as_f64().unwrap() > 0.0,
        "{last:?}"
    );
    assert_eq!(last.data["receipt"]["provisioning_mode"], "system");
    let again: Value = daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&accepted)), json!({}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(again["cancelled"], false);
    assert_eq!(
        daemon
            .get_json(&format!("/v2/tasks/{}", id(&accepted)))
            .await["status"],
        "cancelled"
    );
    // The slot is usable again.
    let next = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 2 }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&next), None).await),
        ["started", "token", "end"]
    );
}

#[tokio::test]
async fn a_queued_task_is_cancelled_at_once_and_never_starts() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let running = daemon.submit(prompt()).await;
    let queued = daemon.submit(prompt()).await;
    let answer = daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&queued)), json!({}))
        .await;
    assert_eq!(answer.json::<Value>().await.unwrap()["freed_ms"], 0);
    assert_eq!(shape(&daemon.events(id(&queued), None).await), ["end"]);
    let view = daemon
        .get_json(&format!("/v2/tasks/{}", id(&running)))
        .await;
    assert_eq!(
        view["status"], "running",
        "one task's cancel touches no other"
    );
}

#[tokio::test]
async fn the_last_readers_leaving_cancels_only_where_the_task_says_so() {
    let daemon = Setup::new(&Script::endless(2))
        .pool("slots", 2)
        .ready()
        .await;
    let leaves = json!({ "prompt": "a", "cancel_on_disconnect": true, "max_tokens": 4000 });
    let stays = json!({ "prompt": "a", "max_tokens": 4000 });
    let (leaves, stays) = (daemon.submit(leaves).await, daemon.submit(stays).await);
    for task in [&leaves, &stays] {
        let mut reader = daemon.open_events(id(task), "", None).await;
        while reader.next().await.unwrap().name != "token" {}
    }
    let status = async |task: &Value| {
        daemon.get_json(&format!("/v2/tasks/{}", id(task))).await["status"].clone()
    };
    daemon
        .until("the task is cancelled", async || {
            (status(&leaves).await == "cancelled").then_some(())
        })
        .await;
    assert_eq!(status(&stays).await, "running");
}

#[tokio::test]
async fn looking_at_a_streams_headers_cancels_nothing() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let task = json!({ "prompt": "a", "cancel_on_disconnect": true, "max_tokens": 4000 });
    let task = daemon.submit(task).await;
    let url = format!("{}/v2/tasks/{}/events", daemon.url, id(&task));
    let head = daemon.client.head(url).send().await.unwrap();
    assert_eq!(head.headers()["content-type"], "text/event-stream");
    let view = daemon.get_json(&format!("/v2/tasks/{}", id(&task))).await;
    assert_ne!(view["status"], "cancelled");
}

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

#[tokio::test]
async fn a_burst_on_a_ready_pool_is_held_to_its_bound() {
    let daemon = Setup::new(&Script::endless(5))
        .pool("queue_capacity", 3)
        .ready()
        .await;
    let long = json!({ "prompt": "a", "max_tokens": 4000 });
    let burst = (0..40).map(|_| daemon.post("/v2/tasks", long.clone()));
    let answers = futures::future::join_all(burst).await;
    let admitted = answers.iter().filter(|answer| answer.status() == 202);
    // One runs, three wait.
    assert_eq!(admitted.count(), 4);
    assert!(
        answers
            .iter()
            .all(|answer| answer.status() == 202 || answer.status() == 429)
    );
    let pool = daemon.pool().await;
    assert_eq!(
        (&pool["running"], &pool["queue"]["interactive"]),
        (&json!(1), &json!(3))
    );
}

#[tokio::test]
async fn clients_take_turns() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let submit = async |client: &str| -> Value {
        let request = daemon.client.post(format!("{}/v2/tasks", daemon.url));
        let request = request.header("X-Correlation-Id", client);
        let task = json!({ "prompt": "a", "max_tokens": 4000 });
        request
            .json(&task)
            .send()
            .await
            .unwrap()
            .json()
            .await
            .unwrap()
    };
    submit("first").await;
    daemon
        .until("a task runs", async || {
            (daemon.pool().await["running"] == 1).then_some(())
        })
        .await;
    let mut greedy = Vec::new();
    for _ in 0..5 {
        greedy.push(submit("greedy").await);
    }
    assert_eq!(greedy[4]["queue_position"], 4);
    let modest = submit("modest").await;
    assert_eq!(modest["queue_position"], 1, "{modest}");
    let last = format!("/v2/tasks/{}", id(&greedy[4]));
    assert_eq!(daemon.get_json(&last).await["queue_position"], 5);
    // All who do not say who they are are one.
    let unnamed = daemon.submit(prompt()).await;
    let another = daemon.submit(prompt()).await;
    assert_eq!(unnamed["queue_position"], 2);
    assert_eq!(another["queue_position"], 4);
}

#[tokio::test]
async fn a_deadline_counts_while_the_pool_is_prepared() {
    let script = Script {
        load_hang: true,
        ..Script::default()
    };
    let daemon = Setup::new(&script).start();
    daemon.until_state("starting").await;
    let task = json!({ "prompt": "a", "deadline_ms": 60_000 });
    let late = json!({ "prompt": "a", "deadline_ms": 300 });
    let (patient, hasty) = (
        daemon.post("/v2/tasks", task).await,
        daemon.post("/v2/tasks", late).await,
    );
    // What is not refused at once ends when its time is over, not when it is ready.
    if hasty.status() == 202 {
        let hasty: Value = hasty.json().await.unwrap();
        let events = daemon.events(id(&hasty), None).await;
        assert_eq!(shape(&events), ["error"]);
        assert_eq!(events[0].data["code"], "DEADLINE_UNMET");
    } else {
        assert_eq!(hasty.status(), 503);
        let body: Value = hasty.json().await.unwrap();
        assert_eq!(body["error"]["code"], "DEADLINE_UNMET");
    }
    assert_eq!(daemon.pool().await["state"], "starting");
    if patient.status() == 202 {
        let patient: Value = patient.json().await.unwrap();
        let path = format!("/v2/tasks/{}", id(&patient));
        assert_eq!(daemon.get_json(&path).await["status"], "queued");
    }
}
