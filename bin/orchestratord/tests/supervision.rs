//! The engine's life as operators see and steer it: crashes, hangs, drains.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::pools::{ask, causes, engine_of, quick_restarts, send};
use support::{Setup, exists, id, is_alive, shape, text};
use test_harness_fake_engine::Script;

#[tokio::test]
async fn a_crash_loop_opens_the_breaker_until_the_pool_is_resumed() {
    let script = Script {
        log_lines: 3,
        ..Script::default()
    };
    let daemon = Setup::new(&script)
        .pool("restart", quick_restarts(3))
        .start();
    for crash in 1..=3 {
        let pool = daemon.until_state("ready").await;
        let engine = engine_of(&pool);
        send(engine, Signal::SIGKILL);
        daemon
            .until("the crash is counted", async || {
                let pool = daemon.pool().await;
                (pool["restarts"]["crash"] == crash).then_some(())
            })
            .await;
    }
    let pool = daemon.until_state("failed").await;
    assert!(
        pool["last_error_at"].as_str().unwrap().ends_with('Z'),
        "{pool}"
    );
    let said = pool["last_error"]["message"].as_str().unwrap();
    assert!(
        said.contains("ended 3 times") && said.contains("signal: 9"),
        "{said}"
    );
    assert!(pool["next_try_ms"].as_u64().unwrap() > 3_000_000, "{pool}");
    assert_eq!(pool["engine_exits"], 3);
    assert!(!pool["engine_log"].as_array().unwrap().is_empty(), "{pool}");
    let causes = causes(&pool);
    let backoffs = causes
        .iter()
        .filter(|step| step.starts_with("ready → backoff"))
        .count();
    assert_eq!(backoffs, 2, "{causes:?}");
    assert!(
        causes
            .last()
            .unwrap()
            .starts_with("ready → failed: the engine ended by itself")
    );
    let refused = daemon.post("/v2/tasks", json!({ "prompt": "a" })).await;
    assert_eq!(refused.status(), 503);
    ask(&daemon, "resume", json!({})).await;
    daemon.until_state("ready").await;
    let task = daemon.submit(json!({ "prompt": "a" })).await;
    let events = daemon.events(id(&task), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
}

#[tokio::test]
async fn a_drained_pool_finishes_what_it_admitted_and_stops_until_it_is_resumed() {
    let script = Script {
        token_ms: 30,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let engine = engine_of(&daemon.pool().await);
    let running = daemon.submit(json!({ "prompt": "a" })).await;
    let queued = daemon.submit(json!({ "prompt": "b" })).await;
    let view = ask(&daemon, "drain", json!({ "deadline_ms": 60_000 })).await;
    assert_eq!(view["state"], "draining");
    let refused = daemon.post("/v2/tasks", json!({ "prompt": "c" })).await;
    assert_eq!(refused.status(), 503);
    let refused: Value = refused.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "POOL_UNREADY");
    assert_eq!(refused["error"]["retriable"], true);
    assert!(
        refused["error"]["hint"]
            .as_str()
            .unwrap()
            .contains("resume")
    );
    for task in [&running, &queued] {
        let events = daemon.events(id(task), None).await;
        assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
        assert_eq!(text(&events), Script::default().pieces.concat());
    }
    let pool = daemon.until_state("stopped").await;
    assert!(!is_alive(engine) && !exists(&daemon.pid_file()) && !exists(&daemon.handoff()));
    let causes = causes(&pool);
    assert!(
        causes
            .iter()
            .any(|step| step == "draining → stopping: no task is left"),
        "{causes:?}"
    );
    let reload = daemon.post("/v2/pools/default/drain", json!({})).await;
    assert_eq!(reload.status(), 202, "a drained pool may be drained");
    ask(&daemon, "resume", json!({})).await;
    daemon.until_state("ready").await;
    let task = daemon.submit(json!({ "prompt": "d" })).await;
    assert_eq!(
        shape(&daemon.events(id(&task), None).await),
        ["started", "token", "end"]
    );
}

#[tokio::test]
async fn a_drains_deadline_ends_what_is_left_with_one_retriable_error() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let queued = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    ask(&daemon, "drain", json!({ "deadline_ms": 50 })).await;
    daemon.until_state("stopped").await;
    for (task, expected) in [
        (&running, &["started", "token", "error"][..]),
        (&queued, &["error"]),
    ] {
        let events = daemon.events(id(task), None).await;
        assert_eq!(shape(&events), expected, "{events:?}");
        assert_eq!(events.last().unwrap().data["retriable"], true);
    }
    let refused = daemon
        .post(
            "/v2/pools/default/drain",
            json!({ "deadline_ms": u64::MAX }),
        )
        .await;
    assert_eq!(refused.status(), 400);
    let refused = daemon.post("/v2/pools/default/drain", json!([1])).await;
    assert_eq!(refused.status(), 400);
}

#[tokio::test]
async fn a_drain_that_is_taken_back_in_time_keeps_the_engine() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let engine = engine_of(&daemon.pool().await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    ask(&daemon, "drain", json!({ "deadline_ms": 600_000 })).await;
    let view = ask(&daemon, "resume", json!({})).await;
    assert_eq!(
        (view["state"].as_str(), engine_of(&view)),
        (Some("ready"), engine)
    );
    let next = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 1 }))
        .await;
    let cancel = format!("/v2/tasks/{}/cancel", id(&running));
    daemon.post(&cancel, json!({})).await;
    assert_eq!(
        shape(&daemon.events(id(&next), None).await),
        ["started", "token", "end"]
    );
}

#[tokio::test]
async fn an_idle_engine_that_hangs_is_noticed_and_replaced() {
    let daemon = Setup::new(&Script::default())
        .pool(
            "liveness",
            json!({ "check_seconds": 1, "probe_seconds": 1 }),
        )
        .pool("restart", quick_restarts(5))
        .ready()
        .await;
    let hung = engine_of(&daemon.pool().await);
    send(hung, Signal::SIGSTOP);
    let pool = daemon
        .until("another engine is ready", async || {
            let pool = daemon.pool().await;
            (pool["state"] == "ready" && engine_of(&pool) != hung).then_some(pool)
        })
        .await;
    assert_eq!(pool["restarts"]["hang"], 1);
    assert!(!is_alive(hung));
    let said = pool["last_error"]["message"].as_str().unwrap();
    assert!(said.contains("2 probes"), "{said}");
    let metrics = daemon.get("/metrics").await.text().await.unwrap();
    let counted = r#"orchestratord_engine_restarts_total{pool="default",cause="hang"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn what_has_failed_is_said_while_the_rest_is_still_under_way() {
    let setup = Setup::new(&Script::default()).pool("model", "/no/such/model.gguf");
    // An engine that takes its time to say which one it is.
    let slow = setup.engine_dir().join("slow");
    std::fs::write(&slow, "#!/bin/sh\nexec sleep 300\n").unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();
    let daemon = setup
        .pool("provision", json!({ "mode": "system", "path": slow }))
        .start();
    let pool = daemon
        .until("the reason is told", async || {
            let pool = daemon.pool().await;
            (!pool["last_error"].is_null()).then_some(pool)
        })
        .await;
    assert_eq!(pool["state"], "provisioning");
    let said = pool["last_error"]["message"].as_str().unwrap();
    assert!(said.contains("/no/such/model.gguf"), "{said}");
}
