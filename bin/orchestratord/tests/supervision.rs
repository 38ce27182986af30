//! The engine's life as operators see and steer it: crashes, hangs, drains,
//! reloads.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Daemon, Setup, exists, id, is_alive, shape, text};
use test_harness_fake_engine::{Fault, LoadFailure, Script, install, starts};

/// Restarts at once, so that a test need not wait, and long memory.
fn quick_restarts(crashes: u32) -> Value {
    json!({ "first_delay_ms": 10, "last_delay_ms": 50, "crashes": crashes, "cool_down_seconds": 3600 })
}

fn engine_of(pool: &Value) -> u64 {
    pool["replica"]["pid"].as_u64().unwrap()
}

fn send(pid: u64, signal: Signal) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, signal).unwrap();
}

/// Asks something of the pool that must be taken on.
async fn ask(daemon: &Daemon, what: &str, body: Value) -> Value {
    let answer = daemon
        .post(&format!("/v2/pools/default/{what}"), body)
        .await;
    let status = answer.status();
    let view: Value = answer.json().await.unwrap();
    assert_eq!(status, 202, "{view}");
    view
}

async fn until_reload(daemon: &Daemon, state: &str) -> Value {
    daemon
        .until(&format!("the reload is {state}"), async || {
            let pool = daemon.pool().await;
            (pool["reload"]["state"] == state).then_some(pool)
        })
        .await
}

async fn until_gone(daemon: &Daemon, pid: u64) {
    daemon
        .until("the engine is gone", async || {
            (!is_alive(pid)).then_some(())
        })
        .await;
}

fn causes(pool: &Value) -> Vec<String> {
    let transitions = pool["transitions"].as_array().unwrap();
    let step = |step: &Value| {
        format!(
            "{} → {}: {}",
            step["from"].as_str().unwrap(),
            step["to"].as_str().unwrap(),
            step["cause"].as_str().unwrap()
        )
    };
    transitions.iter().map(step).collect()
}

fn pid_in(path: &Path) -> u64 {
    let file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["pid"].as_u64().unwrap()
}

/// What a pool's second and third PID file would be called.
fn spare_pid_files(daemon: &Daemon) -> [PathBuf; 2] {
    ["next", "old"].map(|name| daemon.cache_dir().join(format!("run/default.{name}.pid")))
}

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

/// Another model, byte for byte.
fn other_model(daemon: &Daemon) -> PathBuf {
    let model = daemon.engine_dir().join("other.gguf");
    let mut bytes = std::fs::read(daemon.model()).unwrap();
    bytes.extend([0; 32]);
    std::fs::write(&model, bytes).unwrap();
    model
}

#[tokio::test]
async fn a_reload_starts_beside_and_switches_without_touching_what_runs() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let old = engine_of(&daemon.pool().await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    let queued = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 3 }))
        .await;
    // The next engine answers in words of its own.
    install(
        &daemon.engine_dir(),
        &Script::with_pieces(&["new ", "words"]),
    );
    let model = other_model(&daemon);
    let view = ask(&daemon, "reload", json!({ "model": model })).await;
    assert_eq!(view["reload"]["mode"], "beside");
    let pool = until_reload(&daemon, "retiring").await;
    let new = engine_of(&pool);
    assert_ne!(new, old);
    assert!(is_alive(old), "its task is not over");
    assert_eq!(pool["model"], model.to_str().unwrap());
    // The new engine's slot is free although the old one's is not.
    assert_eq!(text(&daemon.events(id(&queued), None).await), "new words");
    // The files are the new engine's already.
    assert_eq!(pid_in(&daemon.pid_file()), new);
    assert_eq!(pid_in(&daemon.handoff()), new);
    let busy = daemon.post("/v2/pools/default/reload", json!({})).await;
    assert_eq!(busy.status(), 409);
    let busy: Value = busy.json().await.unwrap();
    assert_eq!(busy["error"]["code"], "ADMISSION_REJECT");
    let cancelled = daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&running)), json!({}))
        .await;
    assert_eq!(cancelled.json::<Value>().await.unwrap()["cancelled"], true);
    let pool = until_reload(&daemon, "done").await;
    until_gone(&daemon, old).await;
    assert_eq!(pool["restarts"]["reload"], 1);
    assert_eq!(pool["engine_exits"], 0);
    assert!(spare_pid_files(&daemon).iter().all(|path| !exists(path)));
    assert!(exists(&daemon.pid_file()) && exists(&daemon.handoff()));
    let log = daemon.cache_dir().join("run/llamacpp-default.log");
    assert!(exists(&log) && !exists(&log.with_file_name("llamacpp-default.next.log")));
}

#[tokio::test]
async fn a_reload_that_fails_is_rolled_back_with_the_reason_and_the_old_engine_untouched() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let old = engine_of(&daemon.pool().await);
    let dies = Script {
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors".to_owned(),
        }),
        ..Script::default()
    };
    let cannot_answer = Script {
        fault: Some(Fault::Status500),
        ..Script::default()
    };
    let trials = [
        (
            json!({ "model": "/no/such/model.gguf" }),
            Script::default(),
            "/no/such/model.gguf",
        ),
        (
            json!({ "flags": ["--port", "1"] }),
            Script::default(),
            "port",
        ),
        (json!({}), dies, "no room for the tensors"),
        (json!({}), cannot_answer, "trial task"),
    ];
    for (request, script, reason) in trials {
        install(&daemon.engine_dir(), &script);
        ask(&daemon, "reload", request).await;
        let pool = until_reload(&daemon, "rolled_back").await;
        let said = pool["reload"]["error"]["message"].as_str().unwrap();
        assert!(said.contains(reason), "{said}");
        assert_eq!(
            (pool["state"].as_str(), engine_of(&pool)),
            (Some("ready"), old)
        );
        assert_eq!(pool["model"], daemon.model().to_str().unwrap());
        let task = daemon.submit(json!({ "prompt": "a" })).await;
        assert_eq!(
            shape(&daemon.events(id(&task), None).await),
            ["started", "token", "end"]
        );
    }
    assert!(spare_pid_files(&daemon).iter().all(|path| !exists(path)));
    assert_eq!(pid_in(&daemon.pid_file()), old);
}

#[tokio::test]
async fn reloads_under_load_lose_no_task() {
    let script = Script {
        token_ms: 3,
        ..Script::default()
    };
    let setup = Setup::new(&script)
        .pool("slots", 2)
        .pool("queue_capacity", 200);
    let daemon = setup.ready().await;
    let mut tasks = Vec::new();
    for reload in 1..=4 {
        for _ in 0..25 {
            tasks.push(daemon.submit(json!({ "prompt": "a" })).await);
        }
        ask(&daemon, "reload", json!({})).await;
        daemon
            .until("the reload is over", async || {
                let pool = daemon.pool().await;
                (pool["restarts"]["reload"] == reload && pool["reload"]["state"] == "done")
                    .then_some(())
            })
            .await;
    }
    for task in &tasks {
        let events = daemon.events(id(task), None).await;
        assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
        assert_eq!(text(&events), Script::default().pieces.concat());
    }
    let pool = daemon.pool().await;
    assert_eq!(pool["restarts"]["crash"], 0);
    assert_eq!(starts(&daemon.engine_dir()), 5);
}

/// A directory with an `nvidia-smi` that knows a GPU with hardly any room.
fn full_gpu(dir: &Path) -> PathBuf {
    let programs = dir.join("programs");
    std::fs::create_dir_all(&programs).unwrap();
    let program = programs.join("nvidia-smi");
    std::fs::write(&program, "#!/bin/sh\necho 10\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    programs
}

#[tokio::test]
async fn without_room_for_two_the_old_engine_goes_first_and_the_queue_waits() {
    let setup = Setup::new(&Script::endless(5)).pool("gpu_layers", 9);
    let path = std::env::var("PATH").unwrap();
    let path = format!("{}:{path}", full_gpu(&setup.engine_dir()).display());
    let daemon = setup.env("PATH", &path).ready().await;
    let old = engine_of(&daemon.pool().await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(
            daemon
                .submit(json!({ "prompt": "b", "max_tokens": 2 }))
                .await,
        );
    }
    // Slow to load, so that the queue can be looked at meanwhile.
    let slow = Script {
        load_ms: 1500,
        ..Script::with_pieces(&["new ", "words"])
    };
    install(&daemon.engine_dir(), &slow);
    ask(&daemon, "reload", json!({})).await;
    let pool = daemon.until_state("draining").await;
    assert_eq!(pool["reload"]["mode"], "drain_first");
    let note = pool["reload"]["note"].as_str().unwrap();
    assert!(
        note.contains("the GPU's memory") && note.contains("10 MiB"),
        "{note}"
    );
    waiting.push(
        daemon
            .submit(json!({ "prompt": "c", "max_tokens": 2 }))
            .await,
    );
    daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&running)), json!({}))
        .await;
    daemon.until_state("starting").await;
    assert!(!is_alive(old));
    for (position, task) in waiting.iter().enumerate() {
        let view = daemon.get_json(&format!("/v2/tasks/{}", id(task))).await;
        assert_eq!(view["queue_position"], position, "{view}");
    }
    for task in &waiting {
        assert_eq!(text(&daemon.events(id(task), None).await), "new words");
    }
    let pool = until_reload(&daemon, "done").await;
    assert_eq!(pool["restarts"]["reload"], 1);

    // And back, if the next one cannot be had.
    let task = daemon
        .submit(json!({ "prompt": "d", "max_tokens": 2 }))
        .await;
    assert_eq!(text(&daemon.events(id(&task), None).await), "new words");
    let old = engine_of(&daemon.pool().await);
    let faulty = Script {
        fault: Some(Fault::Status500),
        faulty_completions: Some(1),
        ..Script::with_pieces(&["old ", "words"])
    };
    install(&daemon.engine_dir(), &faulty);
    // The first start fails its trial; the second, of the old configuration, has none.
    ask(&daemon, "reload", json!({ "flags": ["--mlock"] })).await;
    let pool = until_reload(&daemon, "rolled_back").await;
    assert_eq!(pool["state"], "ready");
    assert_ne!(engine_of(&pool), old);
    let said = pool["reload"]["error"]["message"].as_str().unwrap();
    assert!(said.contains("trial task"), "{said}");
}

#[tokio::test]
async fn a_failed_pool_is_reloaded_with_what_works() {
    let daemon = Setup::new(&Script::default())
        .pool("model", "/no/such/model.gguf")
        .start();
    daemon.until_state("failed").await;
    let view = ask(&daemon, "reload", json!({ "model": daemon.model() })).await;
    assert_eq!(view["reload"]["mode"], "restart");
    let pool = daemon.until_state("ready").await;
    assert_eq!(pool["reload"]["state"], "done");
    let task = daemon
        .submit(json!({ "prompt": "a", "model": daemon.model() }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&task), None).await),
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
