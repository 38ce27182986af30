//! Pools that come and go: loaded by the first task, unloaded when none comes,
//! when somebody asks, and again loaded without losing anything.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::time::Duration;

use futures::future::join_all;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::pools::{ask, causes, engine_of, send, until_gone};
use support::{DEADLINE, Daemon, Setup, exists, id, is_alive, shape, text};
use test_harness_fake_engine::{LoadFailure, Script, install, starts};

fn on_demand(script: &Script) -> Setup {
    Setup::new(script).pool("load", "on_demand")
}

/// Runs a task to its end, which must be a whole answer.
async fn answered(daemon: &Daemon, prompt: &str) {
    let task = daemon.submit(json!({ "prompt": prompt })).await;
    let events = daemon.events(id(&task), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
    assert_eq!(text(&events), Script::default().pieces.concat());
}

async fn refused(daemon: &Daemon, what: &str) -> Value {
    let answer = daemon
        .post(&format!("/v2/pools/default/{what}"), json!({}))
        .await;
    let status = answer.status();
    let body: Value = answer.json().await.unwrap();
    assert_eq!(status, 409, "{body}");
    body["error"].clone()
}

#[tokio::test]
async fn the_first_task_loads_the_engine_and_until_then_there_is_none() {
    let mut daemon = on_demand(&Script::default()).start();
    let pool = daemon.pool().await;
    assert_eq!(pool["state"], "unloaded");
    assert_eq!(pool["load"], "on_demand");
    assert!(pool["idle_ms"].is_u64(), "{pool}");
    assert_eq!(pool["preparation"]["steps"], json!([]));
    let health = daemon.get("/v2/pools/default/health").await;
    assert_eq!(health.status(), 200);
    let health: Value = health.json().await.unwrap();
    assert_eq!(
        (&health["ready"], &health["state"]),
        (&json!(false), &json!("unloaded"))
    );
    assert_eq!(daemon.get_json("/health").await["status"], "ok");
    answered(&daemon, "a").await;
    let pool = daemon.pool().await;
    assert_eq!(pool["state"], "ready");
    assert!(is_alive(engine_of(&pool)));
    assert!(pool["mean_load_ms"].is_u64(), "{pool}");
    assert_eq!(starts(&daemon.engine_dir()), 1);
    let steps = causes(&pool);
    assert_eq!(steps[0], "unloaded → provisioning: a task came");
    let metrics = daemon.get("/metrics").await.text().await.unwrap();
    let loads = r#"orchestratord_pool_loads_total{pool="default",cause="task"} 1"#;
    assert!(metrics.contains(loads), "{metrics}");
    assert!(metrics.contains("orchestratord_pool_load_seconds_count"));
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
}

#[tokio::test]
async fn nothing_is_provided_for_a_pool_that_nobody_asks() {
    let mut daemon = on_demand(&Script::default()).start();
    // A model that is not there would be noticed by whoever looked for it.
    std::fs::remove_file(daemon.model()).unwrap();
    daemon
        .until("the daemon says what it does", async || {
            daemon.log().contains("on demand: http").then_some(())
        })
        .await;
    let pool = daemon.pool().await;
    assert_eq!(pool["state"], "unloaded");
    assert!(pool["last_error"].is_null(), "{pool}");
    assert_eq!(starts(&daemon.engine_dir()), 0);
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success(), "it ends from there, too");
}

#[tokio::test]
async fn a_pool_without_tasks_is_unloaded_and_the_next_task_loads_it_again() {
    let daemon = on_demand(&Script::default())
        .pool("idle_ttl_seconds", 1)
        .start();
    answered(&daemon, "a").await;
    // The answer is there a moment before its slot is free.
    let pool = daemon
        .until("its time counts down", async || {
            let pool = daemon.pool().await;
            pool["unloads_in_ms"].is_u64().then_some(pool)
        })
        .await;
    assert!(pool["unloads_in_ms"].as_u64().unwrap() <= 1000, "{pool}");
    let engine = engine_of(&pool);
    let pool = daemon.until_state("unloaded").await;
    assert!(!is_alive(engine) && !exists(&daemon.pid_file()) && !exists(&daemon.handoff()));
    let steps = causes(&pool);
    let unload = "ready → draining: unload: no task came for `idle_ttl_seconds`";
    assert!(steps.iter().any(|step| step == unload), "{steps:?}");
    let metrics = daemon.get("/metrics").await.text().await.unwrap();
    let unloads = r#"orchestratord_pool_unloads_total{pool="default",cause="idle_ttl"} 1"#;
    assert!(metrics.contains(unloads), "{metrics}");
    answered(&daemon, "b").await;
    assert_eq!(starts(&daemon.engine_dir()), 2);
    assert_eq!(daemon.pool().await["restarts"]["crash"], 0);
}

#[tokio::test]
async fn an_unload_is_refused_while_tasks_run_and_yields_where_it_may() {
    let script = Script {
        token_ms: 20,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let first = engine_of(&daemon.pool().await);
    let tasks = ["a", "b", "c"].map(|prompt| daemon.submit(json!({ "prompt": prompt })));
    let tasks = join_all(tasks).await;
    daemon
        .until("one runs", async || {
            (daemon.pool().await["running"] == 1).then_some(())
        })
        .await;
    let error = refused(&daemon, "unload").await;
    assert_eq!(error["code"], "ADMISSION_REJECT");
    assert!(
        error["message"].as_str().unwrap().contains("2 wait"),
        "{error}"
    );
    assert!(error["hint"].as_str().unwrap().contains("yield"), "{error}");
    assert!(is_alive(first));
    let view = ask(&daemon, "unload", json!({ "yield": true })).await;
    assert_eq!(view["state"], "draining");
    assert_eq!(daemon.get("/v2/pools/default/health").await.status(), 200);
    assert_eq!(daemon.get_json("/health").await["status"], "ok");
    for task in &tasks {
        let events = daemon.events(id(task), None).await;
        assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
        assert_eq!(text(&events), Script::default().pieces.concat());
    }
    let pool = daemon.pool().await;
    assert_ne!(engine_of(&pool), first);
    assert!(!is_alive(first));
    assert_eq!(pool["restarts"]["crash"], 0, "{pool}");
    assert_eq!(starts(&daemon.engine_dir()), 2);
    let steps = causes(&pool);
    assert!(
        steps
            .iter()
            .any(|step| step == "unloaded → provisioning: a task came"),
        "{steps:?}"
    );
}

#[tokio::test]
async fn start_stop_and_unload_go_from_any_to_any() {
    let daemon = on_demand(&Script::default()).start();
    ask(&daemon, "start", json!({})).await;
    let first = engine_of(&daemon.until_state("ready").await);
    ask(&daemon, "unload", json!({})).await;
    until_gone(&daemon, first).await;
    daemon.until_state("unloaded").await;
    ask(&daemon, "unload", json!({})).await;
    ask(&daemon, "stop", json!({})).await;
    daemon.until_state("stopped").await;
    let answer = daemon.post("/v2/tasks", json!({ "prompt": "a" })).await;
    assert_eq!(answer.status(), 503);
    let error = refused(&daemon, "unload").await;
    assert!(
        error["hint"].as_str().unwrap().contains("/start"),
        "{error}"
    );
    assert_eq!(daemon.get_json("/health").await["status"], "degraded");
    ask(&daemon, "start", json!({})).await;
    let second = engine_of(&daemon.until_state("ready").await);
    ask(&daemon, "stop", json!({ "deadline_ms": 1000 })).await;
    until_gone(&daemon, second).await;
    let wrong = daemon
        .post("/v2/pools/default/unload", json!({ "yields": true }))
        .await;
    assert_eq!(wrong.status(), 400);
    let unknown = daemon.post("/v2/pools/other/start", json!({})).await;
    assert_eq!(unknown.status(), 404);
}

#[tokio::test]
async fn an_unload_in_the_middle_of_a_load_ends_it() {
    let script = Script {
        load_hang: true,
        ..Script::default()
    };
    let daemon = Setup::new(&script).start();
    daemon.until_state("starting").await;
    daemon
        .until("the engine runs", async || {
            (starts(&daemon.engine_dir()) == 1).then_some(())
        })
        .await;
    ask(&daemon, "unload", json!({})).await;
    daemon.until_state("unloaded").await;
    install(&daemon.engine_dir(), &Script::default());
    answered(&daemon, "a").await;
    assert_eq!(starts(&daemon.engine_dir()), 2);
}

#[tokio::test]
async fn a_load_that_fails_ends_its_tasks_with_the_reason() {
    let script = Script {
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors".to_owned(),
        }),
        ..Script::default()
    };
    let daemon = on_demand(&script).start();
    let task = daemon.submit(json!({ "prompt": "a" })).await;
    let events = daemon.events(id(&task), None).await;
    assert_eq!(shape(&events), ["error"], "{events:?}");
    assert_eq!(events[0].data["code"], "POOL_UNAVAILABLE");
    let pool = daemon.until_state("failed").await;
    assert!(pool["next_try_ms"].is_u64(), "{pool}");
    install(&daemon.engine_dir(), &Script::default());
    ask(&daemon, "start", json!({})).await;
    daemon.until_state("ready").await;
    answered(&daemon, "b").await;
}

#[tokio::test]
async fn an_engine_that_dies_while_it_yields_costs_no_queued_task() {
    let daemon = Setup::new(&Script::endless(5))
        .pool("restart", support::pools::quick_restarts(5))
        .ready()
        .await;
    let engine = engine_of(&daemon.pool().await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    let queued = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 3 }))
        .await;
    ask(&daemon, "unload", json!({ "yield": true })).await;
    send(engine, Signal::SIGKILL);
    let events = daemon.events(id(&queued), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
    let events = daemon.events(id(&running), None).await;
    assert_eq!(events.last().unwrap().data["code"], "WORKER_RESET");
    assert_eq!(daemon.pool().await["restarts"]["crash"], 1);
}

/// 50 tasks, ten at a time about when the engine of the ten before is to go.
#[tokio::test]
async fn tasks_that_race_against_the_unload_are_all_answered() {
    let daemon = on_demand(&Script::default())
        .pool("idle_ttl_seconds", 1)
        .pool("slots", 4)
        .start();
    for pause in [0, 990, 996, 1002, 1100] {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let tasks = (0..10).map(|number| {
            let daemon = &daemon;
            async move {
                tokio::time::sleep(Duration::from_millis(number)).await;
                answered(daemon, &format!("{pause} {number}")).await;
            }
        });
        join_all(tasks).await;
    }
    let pool = daemon.until_state("unloaded").await;
    assert_eq!(pool["restarts"]["crash"], 0, "{pool}");
    assert_eq!(pool["measured_tasks"], 50);
    assert!(starts(&daemon.engine_dir()) >= 2, "it came and went");
}

#[tokio::test]
async fn unloads_that_are_asked_for_all_the_time_lose_no_task() {
    const CLIENTS: u64 = 6;
    const EACH: u64 = 10;
    let daemon = on_demand(&Script::default()).pool("slots", 2).start();
    let daemon = &daemon;
    let client = |number: u64| async move {
        for round in 0..EACH {
            answered(daemon, &format!("{number} {round}")).await;
            tokio::time::sleep(Duration::from_millis((number * 7 + round * 3) % 20)).await;
        }
    };
    let clients = join_all((0..CLIENTS).map(client));
    let unloads = async {
        for round in 0u64.. {
            let yields = round.is_multiple_of(2);
            let answer = daemon
                .post("/v2/pools/default/unload", json!({ "yield": yields }))
                .await;
            assert!(matches!(answer.status().as_u16(), 202 | 409), "{answer:?}");
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    };
    tokio::select! {
        done = tokio::time::timeout(DEADLINE, clients) => drop(done.expect("all are answered")),
        () = unloads => {}
    }
    // An answer is there a moment before its slot is free.
    let pool = daemon
        .until("all are counted", async || {
            let pool = daemon.pool().await;
            (pool["measured_tasks"] == CLIENTS * EACH).then_some(pool)
        })
        .await;
    assert_eq!(pool["restarts"]["crash"], 0, "{pool}");
    assert!(starts(&daemon.engine_dir()) >= 3, "it came and went");
}

#[tokio::test]
async fn the_time_is_set_and_taken_back_while_the_engine_runs() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let engine = engine_of(&daemon.pool().await);
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["load"] = json!("on_demand");
        config["pools"]["default"]["idle_ttl_seconds"] = json!(3600);
    });
    let reload = daemon.beside(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    let said = String::from_utf8(reload.stdout).unwrap();
    assert!(said.contains("changed without restart"), "{said}");
    let pool = daemon.pool().await;
    assert_eq!(
        (engine_of(&pool), &pool["state"]),
        (engine, &json!("ready"))
    );
    assert!(pool["unloads_in_ms"].is_u64(), "{pool}");
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["idle_ttl_seconds"] = json!(1);
    });
    assert!(daemon.beside(&["reload"]).status.success());
    daemon.until_state("unloaded").await;
    assert!(!is_alive(engine));
    // Another engine for a pool that has none: tried when it is wanted.
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["slots"] = json!(2);
    });
    let reload = daemon.beside(&["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    let pool = daemon.pool().await;
    assert_eq!(pool["state"], "unloaded");
    assert_eq!(pool["reload"]["state"], "done");
    answered(&daemon, "a").await;
    assert_eq!(daemon.pool().await["slots"], 2);
}

#[tokio::test]
async fn the_command_line_lists_starts_unloads_and_stops() {
    let daemon = on_demand(&Script::default()).start();
    let said = |args: &[&str], code: i32| {
        let output = daemon.beside(&[&["pools"], args].concat());
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stdout}{stderr}");
        (stdout, stderr)
    };
    let (table, _) = said(&["list"], 0);
    let mut lines = table.lines();
    assert!(lines.next().unwrap().starts_with("POOL "), "{table}");
    let row = lines.next().unwrap();
    assert!(
        row.starts_with("default ") && row.contains("unloaded"),
        "{row}"
    );
    let (line, _) = said(&["start", "default"], 0);
    assert!(line.starts_with("pool default is ready: "), "{line}");
    let (json, _) = said(&["list", "--json"], 0);
    let list: Value = serde_json::from_str(&json).unwrap();
    let engine = engine_of(&list["pools"][0]);
    let (line, _) = said(&["unload", "default"], 0);
    assert!(line.contains("is unloaded; its next task"), "{line}");
    assert!(!is_alive(engine));
    let (line, _) = said(&["stop", "default", "--url", &daemon.url], 0);
    assert!(line.contains("is stopped"), "{line}");
    let (_, error) = said(&["unload", "default"], 1);
    assert!(
        error.contains("the pool is stopped") && error.contains("/start"),
        "{error}"
    );
    let (_, error) = said(&["start", "defualt"], 1);
    assert!(error.contains("did you mean `default`?"), "{error}");
    let broken = Script {
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors".to_owned(),
        }),
        ..Script::default()
    };
    install(&daemon.engine_dir(), &broken);
    let (_, error) = said(&["start", "default"], 1);
    assert!(error.contains("pool default has failed: "), "{error}");
}
