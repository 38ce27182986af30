//! The engine's life under the daemon: loading, crashing, failing, stopping.

mod support;

use std::process::Output;
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Setup, exists, id, is_alive, output, shape, text};
use test_harness_fake_engine::{Fault, LoadFailure, Script, grandchild};

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn a_task_submitted_while_the_engine_loads_waits_and_completes() {
    let daemon = Setup::new(&Script {
        load_ms: 3000,
        ..Script::default()
    })
    .start();
    let accepted = daemon.submit(json!({ "prompt": "a" })).await;
    let steps = accepted["preparation"]["steps"].as_array().unwrap();
    assert!(!steps.is_empty(), "{accepted}");
    assert!(accepted["predicted_start_ms"].as_u64().unwrap() > 0);
    let health = daemon.get("/v2/pools/default/health").await;
    assert_eq!(health.status(), 503);
    assert!(health.headers().contains_key("retry-after"));
    assert_eq!(daemon.get_json("/health").await["status"], "preparing");
    let events = daemon.events(id(&accepted), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    assert_eq!(daemon.get("/v2/pools/default/health").await.status(), 200);
    assert_eq!(daemon.get_json("/health").await["status"], "ok");
}

#[tokio::test]
async fn a_crash_in_mid_stream_is_said_and_the_engine_comes_back() {
    let script = Script {
        fault: Some(Fault::Crash {
            after_tokens: 2,
            exit_code: 3,
        }),
        token_ms: 5,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let first = daemon.submit(json!({ "prompt": "a" })).await;
    let second = daemon.submit(json!({ "prompt": "b" })).await;
    // The engine's next start follows a script without the fault.
    test_harness_fake_engine::install(&daemon.engine_dir(), &Script::default());
    let events = daemon.events(id(&first), None).await;
    assert_eq!(shape(&events), ["started", "token", "error"]);
    let error = &events.last().unwrap().data;
    assert_eq!(error["code"], "WORKER_RESET");
    assert_eq!(error["retriable"], true);
    // The queued task was kept and ran on the new engine.
    let events = daemon.events(id(&second), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
    let pool = daemon.pool().await;
    assert_eq!(pool["engine_exits"], 1);
    assert_eq!(pool["state"], "ready");
}

#[tokio::test]
async fn a_hung_engine_is_ended_and_replaced() {
    let script = Script {
        fault: Some(Fault::Hang { after_tokens: 2 }),
        ignore_term: true,
        ..Script::default()
    };
    let setup = Setup::new(&script).top("tasks", json!({ "next_token_seconds": 1 }));
    let daemon = setup.ready().await;
    let hung = daemon.pool().await["replica"]["pid"].as_u64().unwrap();
    let first = daemon.submit(json!({ "prompt": "a" })).await;
    let second = daemon.submit(json!({ "prompt": "b" })).await;
    test_harness_fake_engine::install(&daemon.engine_dir(), &Script::default());
    let events = daemon.events(id(&first), None).await;
    assert_eq!(shape(&events), ["started", "token", "error"]);
    assert_eq!(events.last().unwrap().data["code"], "DECODE_TIMEOUT");
    // The next task never goes to the hung engine.
    let events = daemon.events(id(&second), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
    assert!(!is_alive(hung));
    assert_eq!(daemon.pool().await["engine_exits"], 1);
}

#[tokio::test]
async fn tasks_that_a_dead_engine_gives_back_keep_their_order() {
    let setup = Setup::new(&Script::endless(5)).pool("slots", 4);
    let daemon = setup.ready().await;
    let long = json!({ "prompt": "a", "max_tokens": 900 });
    for _ in 0..4 {
        daemon.submit(long.clone()).await;
    }
    let mut waiting = Vec::new();
    for _ in 0..4 {
        waiting.push(
            daemon
                .submit(json!({ "prompt": "b", "max_tokens": 1 }))
                .await,
        );
    }
    // Slow to load, so that the queue can be looked at after the crash.
    let slow = Script {
        load_ms: 3000,
        ..Script::default()
    };
    test_harness_fake_engine::install(&daemon.engine_dir(), &slow);
    let engine = daemon.pool().await["replica"]["pid"].as_u64().unwrap();
    let engine = nix::unistd::Pid::from_raw(i32::try_from(engine).unwrap());
    nix::sys::signal::kill(engine, Signal::SIGKILL).unwrap();
    daemon.until_state("starting").await;
    // One that was on its way to the dead engine is tried there a little longer.
    let positions = daemon.until("all tasks wait again", async || {
        let mut positions = Vec::new();
        for task in &waiting {
            let view = daemon.get_json(&format!("/v2/tasks/{}", id(task))).await;
            positions.push(view["queue_position"].as_u64()?);
        }
        Some(positions)
    });
    assert_eq!(positions.await, [0, 1, 2, 3]);
    for task in &waiting {
        assert_eq!(
            shape(&daemon.events(id(task), None).await),
            ["started", "token", "end"]
        );
    }
}

#[tokio::test]
async fn two_daemons_do_not_share_a_runtime_directory() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let second = Setup::new(&Script::default())
        .pool("model", "haiku")
        .top("runtime_dir", daemon.runtime_dir().to_str().unwrap());
    let output = output(&second, &["serve"]);
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(
        said.contains(&daemon.pid().to_string()) && said.contains("--runtime-dir"),
        "{said}"
    );
    assert!(exists(&daemon.handoff()) && exists(&daemon.runtime_dir().join("orchestratord.json")));
}

#[tokio::test]
async fn an_engine_that_dies_while_loading_fails_the_pool_with_its_last_words() {
    let script = Script {
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors".to_owned(),
        }),
        load_ms: 150,
        ..Script::default()
    };
    let daemon = Setup::new(&script).start();
    let waiting = daemon.submit(json!({ "prompt": "a" })).await;
    let events = daemon.events(id(&waiting), None).await;
    assert_eq!(shape(&events), ["error"]);
    assert_eq!(events[0].data["code"], "POOL_UNAVAILABLE");
    let pool = daemon.until_state("failed").await;
    assert!(
        pool["last_error"]["message"]
            .as_str()
            .unwrap()
            .contains("no room for the tensors"),
        "{pool}"
    );
    let refused = daemon.post("/v2/tasks", json!({ "prompt": "a" })).await;
    assert_eq!(refused.status(), 503);
    assert_eq!(
        refused.json::<Value>().await.unwrap()["error"]["code"],
        "POOL_UNAVAILABLE"
    );
    assert_eq!(daemon.get_json("/health").await["status"], "degraded");
}

#[tokio::test]
async fn no_engine_to_be_had_means_503_and_no_token() {
    let setup = Setup::new(&Script::default())
        .pool(
            "provision",
            json!({ "mode": "system", "path": "/nowhere/llama-server" }),
        )
        .env("REQUIRE_REAL_LLAMA", "1");
    let daemon = setup.start();
    let pool = daemon.until_state("failed").await;
    assert!(
        pool["last_error"]["message"]
            .as_str()
            .unwrap()
            .contains("/nowhere/llama-server"),
        "{pool}"
    );
    let begun = Instant::now();
    for _ in 0..20 {
        let refused = daemon.post("/v2/tasks", json!({ "prompt": "a" })).await;
        assert_eq!(refused.status(), 503);
    }
    // Who asks in a loop does not fill the log.
    let told = daemon
        .until("it is logged", async || {
            let told = daemon.log().matches("request failed").count();
            (told > 0).then_some(told as u64)
        })
        .await;
    assert!(told <= 1 + begun.elapsed().as_secs() / 10, "{told}");
}

#[tokio::test]
async fn a_stop_signal_lets_running_tasks_finish_and_leaves_nothing_behind() {
    let mut daemon = Setup::new(&Script {
        token_ms: 150,
        ..Script::default()
    })
    .ready()
    .await;
    assert!(exists(&daemon.handoff()) && exists(&daemon.pid_file()));
    let engine = daemon.pool().await["replica"]["pid"].as_u64().unwrap();
    let running = daemon.submit(json!({ "prompt": "a" })).await;
    let queued = daemon.submit(json!({ "prompt": "b" })).await;
    let (mut reader, mut waiter) = (
        daemon.open_events(id(&running), "", None).await,
        daemon.open_events(id(&queued), "", None).await,
    );
    let mut events = vec![reader.next().await.unwrap()];
    daemon.signal(Signal::SIGTERM);
    while let Some(event) = reader.next().await {
        events.push(event);
    }
    assert_eq!(
        shape(&events),
        ["started", "token", "end"],
        "the running task finished"
    );
    assert_eq!(text(&events), Script::default().pieces.concat());
    let refused = waiter.next().await.unwrap();
    assert_eq!(
        (refused.name.as_str(), refused.data["code"].as_str()),
        ("error", Some("POOL_UNAVAILABLE"))
    );
    assert!(daemon.wait().success());
    assert!(!is_alive(engine));
    assert!(!exists(&daemon.handoff()) && !exists(&daemon.pid_file()));
    assert!(!exists(&daemon.runtime_dir().join("orchestratord.json")));
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let setup = Setup::new(&Script::endless(5)).top("drain_seconds", 3600);
    let mut daemon = setup.ready().await;
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    reader.next().await.unwrap();
    daemon.signal(Signal::SIGINT);
    daemon.until_state("draining").await;
    daemon.signal(Signal::SIGINT);
    assert!(daemon.wait().success());
}

#[tokio::test]
async fn a_killed_daemon_takes_its_engine_with_it() {
    let mut daemon = Setup::new(&Script::default()).ready().await;
    let engine = daemon.pool().await["replica"]["pid"].as_u64().unwrap();
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    daemon
        .until("the engine is gone", async || {
            (!is_alive(engine)).then_some(())
        })
        .await;
}

#[tokio::test]
async fn an_engine_that_ignores_term_and_has_a_child_is_ended_all_the_same() {
    let script = Script {
        ignore_term: true,
        grandchild: true,
        ..Script::default()
    };
    let mut daemon = Setup::new(&script).ready().await;
    let engine = daemon.pool().await["replica"]["pid"].as_u64().unwrap();
    let child = u64::from(grandchild(&daemon.engine_dir()).unwrap());
    assert!(is_alive(engine) && is_alive(child));
    daemon.signal(Signal::SIGTERM);
    daemon.wait();
    daemon
        .until("both are gone", async || {
            (!is_alive(engine) && !is_alive(child)).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_token_opens_every_route_and_health_needs_none() {
    let daemon = Setup::new(&Script::default())
        .top("auth", json!({ "token": "s3cret" }))
        .start();
    assert_eq!(daemon.get("/health").await.status(), 200);
    for path in ["/v2/pools", "/metrics", "/openapi.json", "/v2/nothing"] {
        let refused = daemon.get(path).await;
        assert_eq!(refused.status(), 401, "{path}");
        assert_eq!(refused.headers()["www-authenticate"], "Bearer");
        assert_eq!(
            refused.json::<Value>().await.unwrap()["error"]["code"],
            "UNAUTHORIZED"
        );
        let url = format!("{}{path}", daemon.url);
        let opened = daemon
            .client
            .get(url)
            .bearer_auth("s3cret")
            .send()
            .await
            .unwrap();
        assert_ne!(opened.status(), 401, "{path}");
    }
}

#[test]
fn an_open_address_without_a_token_is_refused_at_start() {
    let setup = Setup::new(&Script::default()).top("listen", "0.0.0.0:0");
    let output = output(&setup, &["serve"]);
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(
        said.contains("listen") && said.contains("hint:") && said.contains("token"),
        "{said}"
    );
}

#[test]
fn a_token_that_did_not_arrive_does_not_open_the_door() {
    let setup = Setup::new(&Script::default()).env("ORCHD_TOKEN", "");
    let output = output(&setup, &["serve"]);
    assert!(!output.status.success());
    assert!(
        stderr(&output).contains("ORCHD_TOKEN"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_shims_variables_are_refused_where_only_real_engines_may_answer() {
    let setup = Setup::new(&Script::default())
        .env("REQUIRE_REAL_LLAMA", "1")
        .env("ORCHD_LLAMACPP_URL", "http://127.0.0.1:9");
    let output = output(&setup, &["serve"]);
    assert!(!output.status.success());
    let said = stderr(&output);
    assert!(
        said.contains("ORCHD_LLAMACPP_URL") && said.contains("REQUIRE_REAL_LLAMA"),
        "{said}"
    );
}

#[test]
fn run_prints_the_answer_and_nothing_else_on_standard_output() {
    let setup = Setup::new(&Script::with_pieces(&["Good ", "day"]));
    let output = output(&setup, &["run", "Hello"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "Good day\n");
    assert!(stderr(&output).contains("2 tokens"), "{}", stderr(&output));
}

#[test]
fn a_failed_run_says_why_and_what_to_do() {
    let setup = Setup::new(&Script::default()).pool("model", "/no/such/model.gguf");
    let output = output(&setup, &["run", "Hello"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let said = stderr(&output);
    assert!(
        said.contains("/no/such/model.gguf") && said.contains("hint:"),
        "{said}"
    );
}

#[test]
fn config_check_and_schema_work() {
    let good = output(&Setup::new(&Script::default()), &["config", "check"]);
    assert!(good.status.success(), "{}", stderr(&good));
    let bad = output(
        &Setup::new(&Script::default()).pool("slotz", 1),
        &["config", "check"],
    );
    assert!(!bad.status.success());
    let said = stderr(&bad);
    assert!(
        said.contains("slotz") && said.contains("orchestratord.json:"),
        "{said}"
    );
    assert!(said.contains("hint: did you mean `slots`?"), "{said}");
    let unknown = Setup::new(&Script::default()).pool("model", "haikuu");
    let said = stderr(&output(&unknown, &["config", "check"]));
    assert!(
        said.contains("haikuu") && said.contains("pools.default.model"),
        "{said}"
    );
    let schema = output(&Setup::new(&Script::default()), &["config", "schema"]);
    let schema: Value = serde_json::from_slice(&schema.stdout).unwrap();
    assert!(schema["properties"]["pools"].is_object());
}

#[tokio::test]
async fn a_log_that_cannot_be_written_costs_no_more_than_its_lines() {
    let full = || {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).open("/dev/full").unwrap()
    };
    let setup = Setup::new(&Script::default());
    let daemon = setup.start_logging_to(full().into());
    daemon.until_state("ready").await;
    let accepted = daemon.submit(json!({"prompt": "hello"})).await;
    let events = daemon.events(id(&accepted), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
    let mut daemon = daemon;
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
}
