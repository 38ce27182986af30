//! Another engine in the place of the one that serves.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::pools::{
    ask, engine_of, pid_in, quick_restarts, send, spare_pid_files, until_gone, until_reload,
};
use support::{Daemon, Setup, exists, id, is_alive, shape, text};
use test_harness_fake_engine::{Fault, LoadFailure, Script, install, starts};

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
    assert!(exists(&log) && !exists(&log.with_file_name("llamacpp-default+next.log")));
}

#[tokio::test]
async fn a_crash_of_the_new_engine_leaves_the_old_ones_tasks_alone() {
    let daemon = Setup::new(&Script::endless(5))
        .pool("restart", quick_restarts(5))
        .ready()
        .await;
    let old = engine_of(&daemon.pool().await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    ask(&daemon, "reload", json!({})).await;
    let crashed = engine_of(&until_reload(&daemon, "retiring").await);
    send(crashed, Signal::SIGKILL);
    let pool = daemon
        .until("a third engine is ready", async || {
            let pool = daemon.pool().await;
            (pool["state"] == "ready" && pool["restarts"]["crash"] == 1).then_some(pool)
        })
        .await;
    let third = engine_of(&pool);
    assert!(third != old && third != crashed && is_alive(old));
    assert_eq!(pid_in(&daemon.pid_file()), third);
    let next = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 2 }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&next), None).await),
        ["started", "token", "end"]
    );
    let view = daemon
        .get_json(&format!("/v2/tasks/{}", id(&running)))
        .await;
    assert_eq!(view["status"], "running", "{view}");
    daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&running)), json!({}))
        .await;
    until_reload(&daemon, "done").await;
    until_gone(&daemon, old).await;
    assert_eq!(pid_in(&daemon.pid_file()), third);
}

#[tokio::test]
async fn a_daemon_killed_in_a_reload_takes_both_engines_with_it() {
    let mut daemon = Setup::new(&Script::default()).ready().await;
    let old = engine_of(&daemon.pool().await);
    let hangs = Script {
        load_hang: true,
        ..Script::default()
    };
    install(&daemon.engine_dir(), &hangs);
    ask(&daemon, "reload", json!({})).await;
    let [next, _] = spare_pid_files(&daemon);
    daemon
        .until("the second engine runs", async || {
            exists(&next).then_some(())
        })
        .await;
    let new = pid_in(&next);
    assert!(is_alive(old) && is_alive(new));
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    until_gone(&daemon, old).await;
    until_gone(&daemon, new).await;
}

#[tokio::test]
async fn a_drain_gives_up_a_reload_and_a_resumed_pool_can_be_reloaded() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let old = engine_of(&daemon.pool().await);
    let hangs = Script {
        load_hang: true,
        ..Script::default()
    };
    install(&daemon.engine_dir(), &hangs);
    ask(&daemon, "reload", json!({})).await;
    let [next, _] = spare_pid_files(&daemon);
    daemon
        .until("the second engine runs", async || {
            exists(&next).then_some(())
        })
        .await;
    let new = pid_in(&next);
    ask(&daemon, "drain", json!({})).await;
    let pool = daemon.until_state("stopped").await;
    assert_eq!(pool["reload"]["state"], "abandoned");
    until_gone(&daemon, old).await;
    until_gone(&daemon, new).await;
    install(&daemon.engine_dir(), &Script::default());
    ask(&daemon, "resume", json!({})).await;
    daemon.until_state("ready").await;
    ask(&daemon, "reload", json!({})).await;
    until_reload(&daemon, "done").await;
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
            false,
        ),
        (json!({}), dies, "no room for the tensors", true),
        (json!({}), cannot_answer, "trial task", true),
        // It will not know it the next time either.
        (
            json!({ "flags": ["--no-such-flag"] }),
            Script::default(),
            "--no-such-flag",
            false,
        ),
    ];
    // What no engine can be started with is refused at once.
    for (request, key) in [
        (json!({ "flags": ["--port", "1"] }), "`flags`"),
        (json!({ "model": "nobody" }), "`model`"),
    ] {
        let refused = daemon.post("/v2/pools/default/reload", request).await;
        assert_eq!(refused.status(), 400);
        let refused: Value = refused.json().await.unwrap();
        let said = refused["error"]["message"].as_str().unwrap();
        assert!(said.starts_with(key), "{said}");
    }
    for (request, script, reason, retriable) in trials {
        install(&daemon.engine_dir(), &script);
        ask(&daemon, "reload", request).await;
        let pool = until_reload(&daemon, "rolled_back").await;
        let said = pool["reload"]["error"]["message"].as_str().unwrap();
        assert!(said.contains(reason), "{said}");
        assert_eq!(pool["reload"]["error"]["retriable"], retriable, "{said}");
        assert_eq!(
            pool["restarts"]["load_failure"], 0,
            "the pool was never without an engine"
        );
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

#[tokio::test]
async fn what_the_old_engine_does_not_finish_in_time_goes_on_with_the_new_one() {
    let script = Script {
        numbered: true,
        token_ms: 5,
        ..Script::default()
    };
    let setup = Setup::new(&script).pool("slots", 2);
    let daemon = setup.top("drain_seconds", json!(1)).ready().await;
    let old = engine_of(&daemon.pool().await);
    let task = json!({ "prompt": "a", "max_tokens": 500 });
    let fails = daemon.submit(task.clone()).await;
    let mut resuming = task;
    resuming["on_worker_reset"] = json!("resume");
    let resumes = daemon.submit(resuming).await;
    for task in [&fails, &resumes] {
        let mut reader = daemon.open_events(id(task), "", None).await;
        reader.next().await.unwrap();
        reader.next().await.unwrap();
    }
    ask(&daemon, "reload", json!({})).await;
    let failed = daemon.events(id(&fails), None).await;
    let failure = &failed.last().unwrap().data;
    assert_eq!(failure["code"], "WORKER_RESET", "{failure}");
    assert_eq!(failure["retriable"], true);
    let events = daemon.events(id(&resumes), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    let end = &events.last().unwrap().data;
    assert_eq!(
        (&end["resumed"], &end["tokens_out"]),
        (&json!(1), &json!(500))
    );
    let words: Vec<String> = (0..500).map(|number| format!("w{number}")).collect();
    assert_eq!(
        text(&events).trim(),
        words.join(" "),
        "no gap and no repeat"
    );
    until_reload(&daemon, "done").await;
    until_gone(&daemon, old).await;
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
