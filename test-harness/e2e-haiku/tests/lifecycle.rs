//! A task's life with a real engine: waiting, streaming, breaking off, coming
//! back, and having no engine at all.

#![allow(clippy::print_stderr, reason = "what was measured is to be read")]

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use serde_json::{Value, json};
use test_harness_e2e_haiku::daemon::Daemon;
use test_harness_e2e_haiku::settings::{NO_ENGINE, Settings};
use test_harness_e2e_haiku::sse::{Arrived, Event, text};
use test_harness_e2e_haiku::wait_for;
use tokio::sync::{Mutex, MutexGuard};

/// One engine at a time: they would only slow each other down, and the times
/// that are measured here would be those of a busy machine.
async fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::const_new(());
    ALONE.lock().await
}

/// A text that a small model goes on with for hundreds of tokens.
fn counting(daemon: &Daemon, max_tokens: u32) -> Value {
    json!({
        "pool_id": daemon.pool,
        "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
        "max_tokens": max_tokens,
        "temperature": 0.0,
    })
}

fn events(arrived: &[Arrived]) -> Vec<Event> {
    arrived
        .iter()
        .map(|arrived| arrived.event.clone())
        .collect()
}

fn last(arrived: &[Arrived]) -> &Event {
    &arrived.last().expect("a stream has events").event
}

async fn whole(daemon: &Daemon, task: &Value) -> Vec<Arrived> {
    let admission = daemon.api.submit(task).await;
    daemon.api.events(&admission, None).await.rest().await
}

#[tokio::test]
async fn cancel_frees_the_engine_and_no_token_follows() {
    const FREE_WITHIN: Duration = Duration::from_millis(500);
    let _alone = alone().await;
    let daemon = Daemon::ready(&Settings::real("cancel")).await;
    let engine = daemon.engine().await;
    let admission = daemon.api.submit(&counting(&daemon, 3000)).await;
    let id = admission["task_id"].as_str().expect("a task id").to_owned();
    let mut reader = daemon.api.events(&admission, None).await;
    let mut seen = reader.tokens(8).await;
    assert_eq!(
        engine.busy_slots().await,
        1,
        "the engine is to be in the middle of the task"
    );

    let cancel_path = format!("/v2/tasks/{id}/cancel");
    let asked = Instant::now();
    let nothing = json!({});
    let slot_free = wait_for(
        "the engine's free slot",
        Duration::from_secs(10),
        async || (engine.busy_slots().await == 0).then(|| asked.elapsed()),
    );
    let (answer, freed) = tokio::join!(daemon.api.post(&cancel_path, &nothing), slot_free);
    assert!(
        freed <= FREE_WITHIN,
        "the slot was free after {freed:?}, at most {FREE_WITHIN:?} are allowed"
    );
    assert_eq!(answer.0, StatusCode::OK, "{:#}", answer.1);
    assert_eq!(answer.1["cancelled"], true, "{:#}", answer.1);
    let told = answer.1["freed_ms"].as_u64();
    assert!(
        told.is_some_and(|ms| ms <= FREE_WITHIN.as_millis() as u64),
        "{:#}",
        answer.1
    );
    eprintln!("the slot was seen free after {freed:?}; the daemon says {told:?} ms");

    // The stream of the reader that was there all the time ends by itself, in
    // order, and says why.
    seen.extend(reader.rest().await);
    let end = last(&seen);
    assert_eq!(
        (end.name.as_str(), &end.data["finish_reason"]),
        ("end", &json!("cancelled")),
        "{end:?}"
    );
    let ends = seen
        .iter()
        .filter(|arrived| arrived.event.name != "token" && arrived.event.name != "started");
    assert_eq!(ends.count(), 1, "{seen:#?}");

    // Nothing has been added behind it: not in the engine, not in the log.
    let predicted = engine.tokens_predicted().await;
    let again = daemon.api.events(&admission, None).await.rest().await;
    assert_eq!(events(&again), events(&seen));
    let beyond = daemon
        .api
        .events(&admission, Some(end.id))
        .await
        .rest()
        .await;
    assert_eq!(events(&beyond), []);
    let view = daemon.api.json(&format!("/v2/tasks/{id}")).await;
    assert_eq!(
        (&view["status"], &view["text"]),
        (&json!("cancelled"), &json!(text(&seen))),
        "{view:#}"
    );
    assert_eq!(engine.busy_slots().await, 0);
    assert_eq!(
        engine.tokens_predicted().await,
        predicted,
        "the engine went on"
    );

    // The slot is good for the next task.
    let next = whole(&daemon, &counting(&daemon, 5)).await;
    assert_eq!(last(&next).data["finish_reason"], "length", "{next:#?}");
    daemon.stop().await;
}

#[tokio::test]
async fn a_task_sent_while_the_engine_loads_waits_and_completes() {
    let _alone = alone().await;
    for _ in 0..5 {
        let daemon = Daemon::launch(&Settings::real("early")).await;
        let admission = daemon.api.submit(&counting(&daemon, 16)).await;
        let steps = admission["preparation"]["steps"]
            .as_array()
            .expect("a list of steps")
            .clone();
        let stream = daemon.api.events(&admission, None).await.rest().await;
        let end = last(&stream);
        assert_eq!(
            (end.name.as_str(), &end.data["tokens_out"]),
            ("end", &json!(16)),
            "{stream:#?}"
        );
        daemon.stop().await;
        if steps.is_empty() {
            // This process was held up for longer than loading takes.
            continue;
        }
        for step in &steps {
            let known = ["engine_provision", "model_fetch", "pool_warmup"]
                .iter()
                .any(|kind| step["kind"] == *kind);
            assert!(known && step["description"].is_string(), "{admission:#}");
        }
        assert!(
            admission["predicted_start_ms"].as_u64() > Some(0),
            "{admission:#}"
        );
        return;
    }
    panic!("the engine was ready before a task could be sent, five times in a row");
}

#[tokio::test]
async fn a_reader_that_comes_back_gets_exactly_the_rest() {
    let _alone = alone().await;
    let daemon = Daemon::ready(&Settings::real("resume")).await;
    let admission = daemon.api.submit(&counting(&daemon, 60)).await;

    // Broken off in mid-stream.
    let mut reader = daemon.api.events(&admission, None).await;
    let mut broken = reader.tokens(5).await;
    drop(reader);
    let from = last(&broken).id;
    broken.extend(daemon.api.events(&admission, Some(from)).await.rest().await);

    // And over and over again once it is complete.
    let whole = daemon.api.events(&admission, None).await.rest().await;
    assert_eq!(events(&broken), events(&whole));
    assert_eq!(last(&whole).data["tokens_out"], 60, "{whole:#?}");
    for (index, arrived) in whole.iter().enumerate() {
        let rest = daemon
            .api
            .events(&admission, Some(arrived.event.id))
            .await
            .rest()
            .await;
        assert_eq!(
            events(&rest),
            events(&whole[index + 1..]),
            "after event {}",
            arrived.event.id
        );
    }
    daemon.stop().await;
}

#[tokio::test]
async fn the_same_seed_gives_the_same_bytes() {
    let _alone = alone().await;
    let daemon = Daemon::ready(&Settings::real("seed")).await;
    let task = |seed: u32| {
        json!({
            "pool_id": daemon.pool,
            "messages": [{ "role": "user", "content": "Tell me about the sea." }],
            "max_tokens": 48,
            "temperature": 0.9,
            "seed": seed,
        })
    };
    let pieces = |stream: Vec<Arrived>| -> Vec<String> {
        stream
            .iter()
            .filter_map(|arrived| arrived.event.text().map(str::to_owned))
            .collect()
    };
    let first = pieces(whole(&daemon, &task(7)).await);
    let other = pieces(whole(&daemon, &task(8)).await);
    let second = pieces(whole(&daemon, &task(7)).await);
    daemon.stop().await;
    assert!(first.len() > 8, "{first:?}");
    assert_eq!(first, second);
    assert_ne!(first, other, "the seed has no effect");
}

#[tokio::test]
async fn without_an_engine_there_is_a_503_and_no_token() {
    let _alone = alone().await;
    let mut daemon = Daemon::launch(&Settings::without_engine("none")).await;
    let health = format!("/v2/pools/{}/health", daemon.pool);
    let failed = wait_for("the pool's failure", Duration::from_mins(1), async || {
        let (status, body) = daemon.api.try_get(&health).await?;
        let body: Value = serde_json::from_str(&body).ok()?;
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body:#}");
        (body["state"] == "failed").then_some(body)
    });
    let failed = failed.await;
    assert_eq!(
        failed["last_error"]["code"], "POOL_UNAVAILABLE",
        "{failed:#}"
    );

    let (status, body) = daemon.api.post("/v2/tasks", &counting(&daemon, 5)).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{body:#}");
    let error = &body["error"];
    assert_eq!(error["code"], "POOL_UNAVAILABLE", "{body:#}");
    assert!(
        error["message"]
            .as_str()
            .is_some_and(|text| text.contains(NO_ENGINE)),
        "{body:#}"
    );
    assert!(
        error["hint"].as_str().is_some_and(|hint| !hint.is_empty()),
        "{body:#}"
    );
    assert!(error["correlation_id"].is_string(), "{body:#}");
    assert!(
        body.get("task_id").is_none() && body.get("streams").is_none(),
        "{body:#}"
    );

    let metrics = daemon.api.text("/metrics").await;
    let generated =
        test_harness_e2e_haiku::engine::counter(&metrics, "orchestratord_generated_tokens_total");
    assert_eq!(generated.unwrap_or(0), 0, "{metrics}");
    daemon.end().await;
}
