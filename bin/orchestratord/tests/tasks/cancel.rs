//! Tasks that are ended by those who asked for them.

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::prompt;
use crate::support::{Setup, id, shape};

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
