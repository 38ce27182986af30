//! Pools whose engine runs elsewhere: the daemon is a real process, and so are the
//! (fake) engines and the second daemon that it sends its tasks to.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use serde_json::{Value, json};
use support::{Daemon, Setup, id, shape, text};
use test_harness_fake_engine::{FakeEngine, Script};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// A daemon whose pool is at these places.
fn elsewhere(endpoints: &Value) -> Setup {
    let pool = json!({ "engine": "openai", "model": "far", "endpoints": endpoints });
    Setup::new(&Script::default()).top("pools", json!({ "default": pool }))
}

fn chat() -> Value {
    json!({ "messages": [{ "role": "user", "content": "one two" }] })
}

/// The address of an engine, which can be shut.
struct Door {
    url: String,
    open: watch::Sender<bool>,
    _serving: JoinSet<()>,
}

impl Door {
    async fn to(engine: &FakeEngine) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (open, is_open) = watch::channel(true);
        let port = engine.port();
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                let mut is_open = is_open.clone();
                if *is_open.borrow() {
                    connections.spawn(async move {
                        let pass = async {
                            if let Ok(mut engine) = TcpStream::connect(("127.0.0.1", port)).await {
                                let _ = copy_bidirectional(&mut client, &mut engine).await;
                            }
                        };
                        // What is open goes with the door.
                        tokio::select! {
                            () = pass => {}
                            _ = is_open.wait_for(|open| !open) => {}
                        }
                    });
                }
            }
        });
        Self {
            url,
            open,
            _serving: serving,
        }
    }

    fn set_open(&self, open: bool) {
        self.open.send_replace(open);
    }
}

#[tokio::test]
async fn tasks_and_calls_go_to_replicas_and_receipts_say_to_which() {
    let engines = [
        FakeEngine::start(&Script::with_pieces(&["far ", "away"])),
        FakeEngine::start(&Script::with_pieces(&["far ", "away"])),
    ];
    let endpoints = json!([
        { "url": engines[0].url(), "slots": 3 },
        { "url": format!("{}/", engines[1].url()), "slots": 3 },
    ]);
    let daemon = elsewhere(&endpoints).ready().await;
    let mut replicas = Vec::new();
    for _ in 0..2 {
        let accepted = daemon.submit(chat()).await;
        let events = daemon.events(id(&accepted), None).await;
        assert_eq!(shape(&events), ["started", "token", "end"]);
        assert_eq!(text(&events), "far away");
        let end = &events.last().unwrap().data;
        assert!(end["tokens_in"].as_u64().unwrap() > 0, "{end}");
        assert_eq!(end["tokens_out"], 2);
        let receipt = &end["receipt"];
        assert_eq!(receipt["engine"], "openai");
        assert_eq!(receipt["provisioning_mode"], "remote");
        assert!(receipt.get("engine_digest").is_none() && receipt.get("model_digest").is_none());
        replicas.push(receipt["replica"].as_str().unwrap().to_owned());
    }
    replicas.sort();
    assert_eq!(
        replicas,
        ["r0", "r1"],
        "the one that has served less is next"
    );

    let body = json!({ "model": "default", "messages": chat()["messages"], "odd": 1 });
    let answer = daemon.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status(), 200);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["content"], "far away");
    let mut requests = engines[0].requests();
    requests.extend(engines[1].requests());
    let call = requests.iter().find(|request| request["odd"] == 1).unwrap();
    assert_eq!(call["model"], "far", "the server's name");

    let pool = daemon.pool().await;
    assert_eq!(pool["slots"], 6);
    let shown = pool["replicas"].as_array().unwrap();
    assert_eq!(shown.len(), 2);
    assert_eq!(shown[1]["url"], engines[1].url());
    assert!(shown.iter().all(|replica| replica["healthy"] == true));
}

#[tokio::test]
async fn a_replica_that_is_gone_costs_its_slots_and_no_task() {
    let good = FakeEngine::start(&Script::default());
    let mut gone = FakeEngine::start(&Script::default());
    let endpoints = json!([
        { "url": gone.url(), "slots": 1 }, { "url": good.url(), "slots": 1 },
    ]);
    let daemon = elsewhere(&endpoints).ready().await;
    daemon
        .until("both replicas count", async || {
            let pool = daemon.pool().await;
            let well = |replica: &Value| replica["healthy"] == true;
            let all = pool["replicas"].as_array().unwrap().iter().all(well);
            (all && pool["slots"] == 2).then_some(())
        })
        .await;
    gone.kill();
    for _ in 0..4 {
        let accepted = daemon.submit(chat()).await;
        let events = daemon.events(id(&accepted), None).await;
        assert_eq!(events.last().unwrap().name, "end", "{events:?}");
        assert_eq!(events.last().unwrap().data["receipt"]["replica"], "r1");
    }
    daemon
        .until("the pool has one slot", async || {
            (daemon.pool().await["slots"] == 1).then_some(())
        })
        .await;
    let pool = daemon.pool().await;
    assert_eq!(pool["state"], "ready");
    assert_eq!(pool["replicas"][0]["healthy"], false);
    assert!(pool["replicas"][0]["last_error"].is_string());
}

#[tokio::test]
async fn tasks_wait_while_no_replica_is_there_and_go_on_when_one_is() {
    let engine = FakeEngine::start(&Script::default());
    let door = Door::to(&engine).await;
    let daemon = elsewhere(&json!([{ "url": door.url }])).ready().await;
    door.set_open(false);
    let accepted = daemon.submit(chat()).await;
    daemon
        .until("the pool is not ready", async || {
            let pool = daemon.pool().await;
            let known = pool["replicas"][0]["last_error"].is_string();
            (pool["state"] != "ready" && known).then_some(())
        })
        .await;
    door.set_open(true);
    let events = daemon.events(id(&accepted), None).await;
    assert_eq!(events.last().unwrap().name, "end", "{events:?}");
    daemon.until_state("ready").await;
}

#[tokio::test]
async fn what_is_broken_off_in_mid_stream_fails_once() {
    let endless = Script::endless(5);
    let mut dies = FakeEngine::start(&endless);
    let daemon = elsewhere(&json!([{ "url": dies.url() }])).ready().await;
    let accepted = daemon
        .submit(json!({ "messages": chat()["messages"], "max_tokens": 5000 }))
        .await;
    let mut reader = daemon.open_events(id(&accepted), "", None).await;
    while reader.next().await.unwrap().name != "token" {}
    dies.kill();
    let mut last = None;
    while let Some(event) = reader.next().await {
        last = Some(event);
    }
    let last = last.unwrap();
    assert_eq!(last.name, "error");
    assert_eq!(last.data["code"], "WORKER_RESET");
    assert_eq!(last.data["retriable"], true);
}

/// A daemon in front of a fake engine, with a token, and one in front of it.
async fn two_daemons(script: &Script) -> (Daemon, Daemon, tempfile::TempDir) {
    let behind = Setup::new(script)
        .env("ORCHD_TOKEN", "hunter2-of-the-far-one")
        .start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "hunter2-of-the-far-one\n").unwrap();
    let endpoints = json!([{ "url": behind.url, "token_file": file, "slots": 1 }]);
    let setup = Setup::new(script).top(
        "pools",
        json!({ "default": { "engine": "openai", "model": "default", "endpoints": endpoints } }),
    );
    (behind, setup.ready().await, dir)
}

#[tokio::test]
async fn a_second_daemon_is_an_engine_and_is_told_of_cancels() {
    let (behind, front, _dir) = two_daemons(&Script::endless(5)).await;
    let sent = front
        .client
        .post(format!("{}/v2/tasks", front.url))
        .header("X-Correlation-Id", "through-both-7")
        .json(&json!({ "messages": chat()["messages"], "max_tokens": 5000 }))
        .send()
        .await
        .unwrap();
    let accepted: Value = sent.json().await.unwrap();
    let mut reader = front.open_events(id(&accepted), "", None).await;
    while reader.next().await.unwrap().name != "token" {}
    let path = format!("/v2/tasks/{}/cancel", id(&accepted));
    let cancelled: Value = front.post(&path, json!({})).await.json().await.unwrap();
    assert_eq!(cancelled["cancelled"], true);
    assert!(
        cancelled["freed_ms"].is_u64(),
        "the far one saw it: {cancelled}"
    );
    front
        .until("the next task runs at once", async || {
            (front.pool().await["running"] == 0).then_some(())
        })
        .await;
    let next = front
        .submit(json!({ "messages": chat()["messages"], "max_tokens": 2 }))
        .await;
    let events = front.events(id(&next), None).await;
    let end = &events.last().unwrap().data;
    assert_eq!(end["finish_reason"], "length");
    assert_eq!(end["tokens_out"], 2);
    assert!(behind.log().contains("through-both-7"));
    let both = format!("{}{}", behind.log(), front.log());
    assert!(!both.contains("hunter2"), "no log shows the token");
}

#[tokio::test]
async fn a_client_that_goes_is_gone_for_both() {
    let (behind, front, _dir) = two_daemons(&Script::endless(5)).await;
    let body = json!({ "model": "default", "stream": true, "messages": chat()["messages"], "max_tokens": 5000 });
    let mut answer = front.post("/v1/chat/completions", body).await;
    assert_eq!(answer.status(), 200);
    answer.chunk().await.unwrap().unwrap();
    drop(answer);
    let far = behind
        .client
        .get(format!("{}/v2/pools/default", behind.url));
    let far = far.bearer_auth("hunter2-of-the-far-one");
    behind
        .until("nothing runs anywhere", async || {
            let asked = far.try_clone().unwrap().send().await.unwrap();
            let far: Value = asked.json().await.unwrap();
            let near = front.pool().await;
            (far["running"] == 0 && near["running"] == 0).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_token_that_is_not_taken_is_told_by_its_file() {
    let behind = Setup::new(&Script::default())
        .env("ORCHD_TOKEN", "the-right-one")
        .start();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("wrong");
    std::fs::write(&file, "hunter2-is-wrong").unwrap();
    let daemon = elsewhere(&json!([{ "url": behind.url, "token_file": file }])).start();
    let error = daemon
        .until("the pool has a reason", async || {
            let error = daemon.pool().await["last_error"]["message"].clone();
            error.as_str().map(str::to_owned)
        })
        .await;
    assert!(error.contains(file.to_str().unwrap()), "{error}");
    assert!(!error.contains("hunter2") && !daemon.log().contains("hunter2"));
}

#[tokio::test]
async fn orders_and_reloads_are_followed() {
    let old = FakeEngine::start(&Script::with_pieces(&["old"]));
    let new = FakeEngine::start(&Script::with_pieces(&["new"]));
    let daemon = elsewhere(&json!([{ "url": old.url() }])).ready().await;
    let says = async |word: &str| {
        let accepted = daemon.submit(chat()).await;
        assert_eq!(text(&daemon.events(id(&accepted), None).await), word);
    };
    says("old").await;
    daemon.post("/v2/pools/default/drain", json!({})).await;
    let stopped = daemon.until_state("stopped").await;
    assert!(stopped.get("replicas").is_none());
    daemon.post("/v2/pools/default/resume", json!({})).await;
    daemon.until_state("ready").await;
    says("old").await;

    let endpoints = |url: &str| json!([{ "url": url }]);
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["endpoints"] = endpoints(&new.url());
    });
    daemon.post("/v2/admin/reload", json!({})).await;
    daemon
        .until("the new one is bound", async || {
            let pool = daemon.pool().await;
            (pool["reload"]["state"] == "done").then_some(())
        })
        .await;
    says("new").await;

    // Where nobody answers, the old ones go on.
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["endpoints"] = endpoints("http://127.0.0.1:1");
    });
    daemon.post("/v2/admin/reload", json!({})).await;
    daemon
        .until("the reload is taken back", async || {
            let pool = daemon.pool().await;
            (pool["reload"]["state"] == "rolledback" || pool["reload"]["state"] == "rolled_back")
                .then_some(())
        })
        .await;
    says("new").await;
}

#[test]
fn what_does_not_fit_is_refused_with_its_key() {
    let check = |setup: Setup| {
        let output = support::output(&setup, &["config", "check"]);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let far = json!([{ "url": "http://127.0.0.1:1" }]);
    let strict = check(elsewhere(&far).env("REQUIRE_REAL_LLAMA", "1"));
    assert!(strict.contains("REQUIRE_REAL_LLAMA"), "{strict}");
    let secret = check(elsewhere(&json!([{ "url": "http://u:hunter2@a" }])));
    assert!(
        secret.contains("credentials") && !secret.contains("hunter2"),
        "{secret}"
    );
    let none = check(elsewhere(&json!([])));
    assert!(none.contains("endpoints"), "{none}");
    let lost = check(elsewhere(
        &json!([{ "url": "http://a", "token_file": "/nowhere" }]),
    ));
    assert!(lost.contains("/nowhere"), "{lost}");
}
