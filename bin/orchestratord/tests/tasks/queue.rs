//! Who waits, for how long, and who is next.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::prompt;
use crate::support::{Setup, id, shape};

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
