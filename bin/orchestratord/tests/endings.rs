//! How tasks go on or end when their engine is lost, or does not let go of them.
//! The daemon is a real process, and so is the (fake) engine.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::HashSet;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use support::{Daemon, Setup, id, is_alive, shape, text};
use test_harness_fake_engine::{Fault, Script, install};

/// Answers like a model at temperature 0: the same text from wherever it goes on.
fn steady() -> Script {
    Script {
        continues: true,
        token_ms: 5,
        ..Script::default()
    }
}

fn crashing(after_tokens: u64) -> Script {
    Script {
        fault: Some(Fault::Crash {
            after_tokens,
            exit_code: 3,
        }),
        ..steady()
    }
}

fn resuming() -> Value {
    json!({ "prompt": "one two three", "on_worker_reset": "resume" })
}

async fn cancel(daemon: &Daemon, task: &Value) -> Value {
    let path = format!("/v2/tasks/{}/cancel", id(task));
    daemon.post(&path, json!({})).await.json().await.unwrap()
}

async fn view(daemon: &Daemon, task: &Value) -> Value {
    daemon.get_json(&format!("/v2/tasks/{}", id(task))).await
}

async fn until_pieces(daemon: &Daemon, task: &Value) {
    daemon
        .until("it streams", async || {
            (view(daemon, task).await["pieces"].as_u64()? > 0).then_some(())
        })
        .await;
}

async fn engine_pid(daemon: &Daemon) -> u64 {
    daemon.pool().await["replica"]["pid"].as_u64().unwrap()
}

#[tokio::test]
async fn a_task_that_asked_for_it_is_gone_on_with_after_a_crash() {
    let daemon = Setup::new(&crashing(4)).ready().await;
    let first = daemon.submit(resuming()).await;
    let second = daemon.submit(json!({ "prompt": "b" })).await;
    let third = json!({
        "messages": [{ "role": "user", "content": "hi" }],
        "on_worker_reset": "resume", "max_tokens": 6,
    });
    let third = daemon.submit(third).await;
    // The engine's next start follows a script without the fault.
    install(&daemon.engine_dir(), &steady());
    let events = daemon.events(id(&first), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    let started = events.iter().filter(|event| event.name == "started");
    assert_eq!(started.count(), 1);
    assert_eq!(text(&events), steady().pieces.concat());
    let end = &events.last().unwrap().data;
    assert_eq!(end["resumed"], 1, "{end}");
    assert_eq!(end["tokens_in"], 3, "the prompt's own: {end}");
    assert_eq!(end["tokens_out"], steady().pieces.len(), "{end}");
    assert_eq!(end["finish_reason"], "stop");
    // It went on before those that were behind it.
    let second = daemon.events(id(&second), None).await;
    let third = daemon.events(id(&third), None).await;
    assert_eq!(shape(&second), ["started", "token", "end"]);
    assert!(second.last().unwrap().data.get("resumed").is_none());
    let waited = |events: &[support::Event]| events[0].data["waited_ms"].as_u64().unwrap();
    assert!(waited(&events) <= waited(&second));
    assert_eq!(third.last().unwrap().data["tokens_out"], 6);
    assert_eq!(daemon.pool().await["engine_exits"], 1);
}

#[tokio::test]
async fn max_tokens_counts_what_lost_engines_had_sent() {
    let daemon = Setup::new(&crashing(4)).ready().await;
    let mut task = resuming();
    task["max_tokens"] = json!(7);
    let task = daemon.submit(task).await;
    install(&daemon.engine_dir(), &steady());
    let events = daemon.events(id(&task), None).await;
    assert_eq!(text(&events), steady().pieces[..7].concat());
    let end = &events.last().unwrap().data;
    assert_eq!(end["tokens_out"], 7, "{end}");
    assert_eq!(end["finish_reason"], "length", "{end}");
}

#[tokio::test]
async fn an_engine_lost_after_the_last_token_costs_nothing() {
    let daemon = Setup::new(&crashing(4)).ready().await;
    let mut task = resuming();
    task["max_tokens"] = json!(4);
    let events = daemon.events(id(&daemon.submit(task).await), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    let end = &events.last().unwrap().data;
    assert_eq!(end["tokens_out"], 4, "{end}");
    assert_eq!(end["finish_reason"], "length", "{end}");
}

#[tokio::test]
async fn a_task_is_gone_on_with_after_a_hang() {
    let script = Script {
        fault: Some(Fault::Hang { after_tokens: 2 }),
        ..steady()
    };
    let daemon = Setup::new(&script)
        .top("tasks", json!({ "next_token_seconds": 1 }))
        .ready()
        .await;
    let task = daemon.submit(resuming()).await;
    install(&daemon.engine_dir(), &steady());
    let events = daemon.events(id(&task), None).await;
    assert_eq!(text(&events), steady().pieces.concat());
    assert_eq!(events.last().unwrap().data["resumed"], 1);
}

#[tokio::test]
async fn one_hung_slot_costs_the_others_a_retry_at_the_most() {
    let script = Script {
        fault: Some(Fault::Hang { after_tokens: 2 }),
        faulty_completions: Some(1),
        ..Script::endless(5)
    };
    let daemon = Setup::new(&script)
        .pool("slots", 3)
        .top("tasks", json!({ "next_token_seconds": 1 }))
        .ready()
        .await;
    let hangs = daemon.submit(json!({ "prompt": "a" })).await;
    until_pieces(&daemon, &hangs).await;
    let fails = json!({ "prompt": "b", "max_tokens": 4000 });
    let fails = daemon.submit(fails).await;
    let mut resumes = resuming();
    resumes["max_tokens"] = json!(4000);
    let resumes = daemon.submit(resumes).await;
    until_pieces(&daemon, &fails).await;
    until_pieces(&daemon, &resumes).await;
    install(&daemon.engine_dir(), &Script::default());
    let events = daemon.events(id(&hangs), None).await;
    assert_eq!(events.last().unwrap().data["code"], "DECODE_TIMEOUT");
    let events = daemon.events(id(&fails), None).await;
    let failure = &events.last().unwrap().data;
    assert_eq!(failure["code"], "WORKER_RESET", "{failure}");
    assert_eq!(failure["retriable"], true);
    let events = daemon.events(id(&resumes), None).await;
    assert_eq!(events.last().unwrap().data["resumed"], 1);
    let pool = daemon.pool().await;
    assert_eq!(pool["restarts"]["hang"], 1, "{pool}");
}

#[tokio::test]
async fn a_task_that_waits_to_be_gone_on_with_can_be_cancelled() {
    let daemon = Setup::new(&crashing(4)).ready().await;
    let task = daemon.submit(resuming()).await;
    // So that it waits for the next engine for ever.
    let hang = Script {
        load_hang: true,
        ..Script::default()
    };
    install(&daemon.engine_dir(), &hang);
    daemon.until_state("starting").await;
    assert_eq!(view(&daemon, &task).await["pieces"], 4);
    let answer = cancel(&daemon, &task).await;
    assert_eq!(
        (&answer["cancelled"], &answer["freed_ms"]),
        (&json!(true), &json!(0))
    );
    let events = daemon.events(id(&task), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    assert_eq!(events.last().unwrap().data["finish_reason"], "cancelled");
}

#[tokio::test]
async fn an_engine_that_does_not_let_go_of_its_only_task_is_replaced() {
    let script = Script {
        slot_free_ms: 600_000,
        ..Script::endless(5)
    };
    let daemon = Setup::new(&script).ready().await;
    let engine = engine_pid(&daemon).await;
    let task = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    until_pieces(&daemon, &task).await;
    install(&daemon.engine_dir(), &Script::default());
    let answers = async {
        // The second comes when the first has closed the log.
        while view(&daemon, &task).await["end"].is_null() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        cancel(&daemon, &task).await
    };
    let (answer, again) = tokio::join!(cancel(&daemon, &task), answers);
    assert_eq!(answer["escalated"], "engine_restarted", "{answer}");
    assert!(answer["freed_ms"].as_u64().unwrap() >= 2000, "{answer}");
    assert_eq!(again, answer);
    assert!(!is_alive(engine));
    assert_eq!(cancel(&daemon, &task).await["cancelled"], false);
    let next = daemon.submit(json!({ "prompt": "b" })).await;
    assert_eq!(
        shape(&daemon.events(id(&next), None).await),
        ["started", "token", "end"]
    );
}

#[tokio::test]
async fn an_engine_on_which_others_run_is_left_alone_and_the_slot_is_held() {
    let script = Script {
        slot_free_ms: 600_000,
        ..Script::endless(5)
    };
    let daemon = Setup::new(&script).pool("slots", 2).ready().await;
    let engine = engine_pid(&daemon).await;
    let long = json!({ "prompt": "a", "max_tokens": 4000 });
    let (goes, stays) = (
        daemon.submit(long.clone()).await,
        daemon.submit(long.clone()).await,
    );
    for task in [&goes, &stays] {
        until_pieces(&daemon, task).await;
    }
    let waits = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 3 }))
        .await;
    let answer = cancel(&daemon, &goes).await;
    assert_eq!(answer["escalated"], "waiting", "{answer}");
    assert_eq!(answer["cancelled"], true);
    assert!(answer.get("freed_ms").is_none(), "{answer}");
    assert_eq!(
        shape(&daemon.events(id(&goes), None).await),
        ["started", "token", "end"]
    );
    // Who asks again hears the same.
    assert_eq!(cancel(&daemon, &goes).await, answer);
    // Its slot is not free, and so is given to no task.
    assert_eq!(view(&daemon, &waits).await["status"], "queued");
    assert_eq!(view(&daemon, &stays).await["status"], "running");
    assert_eq!(engine_pid(&daemon).await, engine);
    install(&daemon.engine_dir(), &Script::default());
    // With the other one gone, nothing runs there that would be missed.
    let answer = cancel(&daemon, &stays).await;
    assert_eq!(answer["escalated"], "engine_restarted", "{answer}");
    assert_eq!(
        shape(&daemon.events(id(&waits), None).await),
        ["started", "token", "end"]
    );
    assert!(!is_alive(engine));
}

#[tokio::test]
async fn cancels_touch_no_other_task() {
    let script = Script {
        slot_free_ms: 30,
        ..Script::endless(4)
    };
    let daemon = Setup::new(&script)
        .pool("slots", 4)
        .pool("queue_capacity", 32)
        .ready()
        .await;
    let engine = engine_pid(&daemon).await;
    let mut tasks = Vec::new();
    for _ in 0..16 {
        tasks.push(
            daemon
                .submit(json!({ "prompt": "a", "max_tokens": 60 }))
                .await,
        );
    }
    until_pieces(&daemon, &tasks[0]).await;
    let gone: Vec<&Value> = tasks.iter().step_by(3).collect();
    let answers = gone.iter().map(|task| cancel(&daemon, task));
    for answer in futures::future::join_all(answers).await {
        assert!(answer.get("escalated").is_none(), "{answer}");
    }
    let gone: HashSet<&str> = gone.into_iter().map(id).collect();
    for task in &tasks {
        let events = daemon.events(id(task), None).await;
        let terminal = |event: &&support::Event| event.name == "end" || event.name == "error";
        assert_eq!(events.iter().filter(terminal).count(), 1);
        let end = events.last().unwrap();
        if gone.contains(id(task)) {
            assert_eq!(end.data["finish_reason"], "cancelled", "{end:?}");
        } else {
            assert_eq!(end.data["finish_reason"], "length", "{end:?}");
            assert_eq!(end.data["tokens_out"], 60);
        }
        text(&events);
    }
    assert_eq!(engine_pid(&daemon).await, engine);
}

#[tokio::test]
async fn no_task_is_lost_whatever_the_order_of_kills_and_cancels() {
    let script = Script {
        token_ms: 3,
        ..steady()
    };
    let daemon = Setup::new(&script)
        .pool("slots", 2)
        .pool("queue_capacity", 64)
        .ready()
        .await;
    let mut tasks = Vec::new();
    for round in 0..3u64 {
        for number in 0..8u64 {
            let mut task = resuming();
            if number % 3 == 0 {
                task["on_worker_reset"] = json!("fail");
            }
            if number % 4 == 0 {
                task["deadline_ms"] = json!(200);
            }
            let path = daemon.post("/v2/tasks", task).await;
            // A deadline that cannot be met is refused, and that is no loss.
            if path.status() == 202 {
                tasks.push(path.json::<Value>().await.unwrap());
            }
        }
        let pid = daemon.pool().await["replica"]["pid"].as_i64();
        let first = tasks.len() - 3;
        let (cancelled, ()) = tokio::join!(cancel(&daemon, &tasks[first]), async {
            if let Some(pid) = pid {
                tokio::time::sleep(std::time::Duration::from_millis(7 * round)).await;
                // It may be gone already.
                let _ = kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL);
            }
        });
        assert!(cancelled.get("cancelled").is_some(), "{cancelled}");
        daemon.until_state("ready").await;
    }
    for task in &tasks {
        let events = daemon.events(id(task), None).await;
        let terminal = |event: &&support::Event| event.name == "end" || event.name == "error";
        assert_eq!(events.iter().filter(terminal).count(), 1, "{events:?}");
        assert!(terminal(&events.last().unwrap()), "{events:?}");
        let answer = text(&events);
        let end = &events.last().unwrap().data;
        if end["finish_reason"] == "stop" {
            assert_eq!(answer, steady().pieces.concat());
        }
    }
    daemon
        .until("no slot is held", async || {
            (daemon.pool().await["running"] == 0).then_some(())
        })
        .await;
}
