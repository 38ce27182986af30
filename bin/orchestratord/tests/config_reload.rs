//! The configuration is changed while the daemon runs.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::process::{Output, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::{Daemon, Setup, id, is_alive, output, shape, text};
use test_harness_fake_engine::{LoadFailure, Script, install};

/// A daemon with the named pools, all alike, all ready.
async fn with_pools(script: &Script, names: &[&str]) -> Daemon {
    let setup = Setup::new(script);
    let pool = setup.pool_settings();
    let pools: serde_json::Map<String, Value> = names
        .iter()
        .map(|name| ((*name).to_owned(), pool.clone()))
        .collect();
    let daemon = setup.top("pools", pools).start();
    for name in names {
        daemon.until_ready(name).await;
    }
    daemon
}

fn pid(pool: &Value) -> u64 {
    pool["replica"]["pid"].as_u64().unwrap()
}

async fn reloaded(daemon: &Daemon, number: u64) -> Value {
    daemon
        .until(&format!("reload {number} is over"), async || {
            let report = daemon.get_json("/v2/admin/reload").await;
            let over = report["id"] == number && report["state"] != "running";
            over.then_some(report)
        })
        .await
}

fn said(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn a_hangup_applies_the_difference_and_touches_nothing_else() {
    let script = Script {
        token_ms: 20,
        ..Script::endless(20)
    };
    let daemon = with_pools(&script, &["keep", "tuned", "other", "gone"]).await;
    let (keep, tuned, other, gone) = (
        daemon.until_ready("keep").await,
        daemon.until_ready("tuned").await,
        daemon.until_ready("other").await,
        daemon.until_ready("gone").await,
    );
    let running = daemon
        .submit(json!({ "prompt": "a", "pool_id": "keep", "max_tokens": 200 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    let mut events = vec![reader.next().await.unwrap()];
    let finished = daemon
        .submit(json!({ "prompt": "a", "pool_id": "gone", "max_tokens": 2 }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&finished), None).await),
        ["started", "token", "end"]
    );

    let long = json!({ "prompt": "a", "pool_id": "gone", "max_tokens": 100 });
    let (works, waits) = (daemon.submit(long.clone()).await, daemon.submit(long).await);

    daemon.rewrite_config(|config| {
        let pool = config["pools"]["gone"].take();
        config["pools"].as_object_mut().unwrap().remove("gone");
        config["pools"]["added"] = pool;
        config["pools"]["tuned"]["queue_capacity"] = json!(128);
        config["pools"]["other"]["flags"] = json!(["--verbose"]);
    });
    daemon.signal(Signal::SIGHUP);
    let report = reloaded(&daemon, 1).await;
    assert_eq!(report["state"], "done", "{report}");
    let changes: Vec<(&str, &str)> = report["pools"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pool| {
            (
                pool["pool_id"].as_str().unwrap(),
                pool["change"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        changes,
        [
            ("added", "added"),
            ("gone", "removed"),
            ("keep", "unchanged"),
            ("other", "reloaded"),
            ("tuned", "changed"),
        ]
    );

    assert_eq!(pid(&daemon.until_ready("keep").await), pid(&keep));
    let tuned_now = daemon.until_ready("tuned").await;
    assert_eq!(pid(&tuned_now), pid(&tuned), "its engine went on");
    assert_eq!(tuned_now["queue"]["capacity"], 128);
    assert_ne!(pid(&daemon.until_ready("other").await), pid(&other));
    assert!(!is_alive(pid(&other)) && !is_alive(pid(&gone)));
    assert_eq!(daemon.get("/v2/pools/gone").await.status(), 404);
    let added = daemon
        .submit(json!({ "prompt": "a", "pool_id": "added", "max_tokens": 1 }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&added), None).await),
        ["started", "token", "end"]
    );

    // What it had begun it finished; what waited hears why it is over.
    assert_eq!(
        shape(&daemon.events(id(&works), None).await),
        ["started", "token", "end"]
    );
    let refused = daemon.events(id(&waits), None).await;
    let said = refused.last().unwrap().data["message"].as_str().unwrap();
    assert!(said.contains("removed from the configuration"), "{said}");

    // What a pool did can be read after it is gone.
    let kept = daemon
        .get_json(&format!("/v2/tasks/{}", id(&finished)))
        .await;
    assert_eq!(kept["status"], "completed", "{kept}");
    assert_eq!(
        shape(&daemon.events(id(&finished), None).await),
        ["started", "token", "end"]
    );
    let over = daemon
        .post(&format!("/v2/tasks/{}/cancel", id(&finished)), json!({}))
        .await;
    assert_eq!(over.json::<Value>().await.unwrap()["cancelled"], false);

    // The stream of the pool that did not change has no gap.
    while let Some(event) = reader.next().await {
        events.push(event);
    }
    assert_eq!(shape(&events), ["started", "token", "end"]);
    text(&events);
}

#[tokio::test]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let daemon = with_pools(&Script::default(), &["a", "b", "c", "d"]).await;
    let before = daemon.get_json("/v2/pools").await;
    daemon.rewrite_config(|config| {
        let pools = config["pools"].as_object_mut().unwrap();
        let pool = pools.remove("d").unwrap();
        pools.insert("e".to_owned(), pool);
        pools["e"]["model"] = json!("haiku");
        pools["b"]["queue_capacity"] = json!(128);
        pools["c"]["ctx"] = json!(512);
        pools["c"]["flags"] = json!(["--verbose"]);
        config["drain_seconds"] = json!(6);
        config["listen"] = json!("127.0.0.1:1");
        config["auth"] = json!({ "token": "s3cret" });
    });
    let output = daemon.beside(&["reload", "--dry-run"]);
    assert!(output.status.success());
    let (stdout, stderr) = said(&output);
    insta::assert_snapshot!(stdout, @r#"
    pool a: unchanged
    pool b: changed without restart: queue_capacity 64 → 128
    pool c: reloaded: ctx (default) → 512, flags [] → ["--verbose"]
    pool d: removed (drained)
    pool e: added: model haiku
    daemon: drain_seconds 5 → 6
    daemon: the token changed
    "#);
    insta::assert_snapshot!(stderr, @r"
    This would be done:
    warning: listen 127.0.0.1:0 → 127.0.0.1:1 needs a restart of the daemon
    ");
    let after = daemon.get_json("/v2/pools").await;
    let pids = |pools: &Value| -> Vec<u64> {
        pools["pools"].as_array().unwrap().iter().map(pid).collect()
    };
    assert_eq!(pids(&before), pids(&after));
    assert_eq!(daemon.get_json("/v2/admin/reload").await["state"], "none");
}

#[tokio::test]
async fn the_command_waits_until_the_pools_are_ready() {
    let daemon = with_pools(&Script::default(), &["a", "b"]).await;
    let before = daemon.until_ready("a").await;
    daemon.rewrite_config(|config| {
        config["pools"]["a"]["ctx"] = json!(512);
        config["pools"].as_object_mut().unwrap().remove("b");
    });
    let output = daemon.beside(&["reload"]);
    let (stdout, stderr) = said(&output);
    assert!(output.status.success(), "{stderr}");
    insta::assert_snapshot!(stdout, @r"
    pool a: reloaded: ctx (default) → 512
    pool b: removed (drained)
    ");
    assert!(stderr.contains("waiting for: a"), "{stderr}");
    let after = daemon.get_json("/v2/pools/a").await;
    assert_eq!(after["state"], "ready");
    assert_ne!(pid(&after), pid(&before));

    // The same again is nothing to do.
    let output = daemon.beside(&["reload"]);
    assert!(output.status.success());
    assert_eq!(said(&output).0, "pool a: unchanged\n");
    assert_eq!(pid(&daemon.get_json("/v2/pools/a").await), pid(&after));
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_at_all() {
    let daemon = with_pools(&Script::default(), &["a"]).await;
    let before = pid(&daemon.until_ready("a").await);
    daemon.rewrite_config(|config| {
        config["pools"]["new"] = config["pools"]["a"].clone();
        config["pools"]["a"]["slotz"] = json!(2);
    });
    for args in [&["reload"][..], &["reload", "--dry-run"]] {
        let output = daemon.beside(args);
        assert_eq!(output.status.code(), Some(1));
        let (stdout, stderr) = said(&output);
        assert!(stdout.is_empty(), "{stdout}");
        let file = daemon.config_file();
        assert!(
            stderr.contains(&format!("{}:", file.display())) && stderr.contains("`slotz`"),
            "{stderr}"
        );
        assert!(stderr.contains("hint: did you mean `slots`?"), "{stderr}");
    }
    daemon.signal(Signal::SIGHUP);
    // Nobody waits for a signal's answer, so it is shown.
    let shown = daemon
        .until("the refusal is shown", async || {
            let report = daemon.get_json("/v2/admin/reload").await;
            (!report["refused"].is_null()).then(|| report["refused"].clone())
        })
        .await;
    assert_eq!(
        (&shown["file"], &shown["key"]),
        (&json!(daemon.config_file()), &json!("slotz")),
        "{shown}"
    );
    let text = std::fs::read_to_string(daemon.config_file()).unwrap();
    let line = text
        .lines()
        .position(|line| line.contains("slotz"))
        .unwrap();
    assert_eq!(shown["line"], line + 1, "{shown}");
    assert!(shown["at"].as_str().unwrap().ends_with('Z'), "{shown}");
    let refused = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(refused.status(), 400);
    let error = refused.json::<Value>().await.unwrap();
    assert_eq!(shown["error"]["message"], error["error"]["message"]);
    assert_eq!(error["error"]["code"], "INVALID_PARAMS", "{error}");
    assert_eq!(daemon.get_json("/v2/admin/reload").await["id"], 0);
    assert_eq!(daemon.get("/v2/pools/new").await.status(), 404);
    assert_eq!(pid(&daemon.until_ready("a").await), before);

    // What was refused is of no interest once a file is taken over.
    daemon.rewrite_config(|config| {
        let pools = config["pools"].as_object_mut().unwrap();
        pools.remove("new");
        pools["a"].as_object_mut().unwrap().remove("slotz");
    });
    let begun = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(begun.status(), 202);
    let report = reloaded(&daemon, 1).await;
    assert!(report.get("refused").is_none(), "{report}");

    // A file that is gone is wrong, too; it does not stand for the defaults.
    std::fs::remove_file(daemon.config_file()).unwrap();
    let refused = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(refused.status(), 400);
    assert_eq!(pid(&daemon.until_ready("a").await), before);
}

#[tokio::test]
async fn a_file_is_compared_with_what_a_pools_own_reload_gave_it() {
    let daemon = with_pools(&Script::default(), &["a"]).await;
    let request = json!({ "flags": ["--verbose"] });
    let answer = daemon.post("/v2/pools/a/reload", request).await;
    assert_eq!(answer.status(), 202);
    let own = daemon
        .until("the pool's own reload is over", async || {
            let pool = daemon.get_json("/v2/pools/a").await;
            (pool["reload"]["state"] == "done").then_some(pool)
        })
        .await;
    assert_eq!(own["flags"], json!(["--verbose"]));
    daemon.rewrite_config(|config| config["pools"]["a"]["queue_capacity"] = json!(128));
    let differs = "pool a: reloaded: flags [\"--verbose\"] → [], queue_capacity 64 → 128\n";
    let planned = daemon.beside(&["reload", "--dry-run"]);
    assert_eq!(said(&planned).0, differs);
    let done = daemon.beside(&["reload"]);
    assert_eq!(said(&done).0, differs);
    let after = daemon.until_ready("a").await;
    assert_ne!(pid(&after), pid(&own));
    assert_eq!(after["flags"], json!([]));
    assert_eq!(said(&daemon.beside(&["reload"])).0, "pool a: unchanged\n");
}

#[tokio::test]
async fn a_pool_whose_new_engine_fails_goes_back_to_what_it_was() {
    let daemon = with_pools(&Script::default(), &["a"]).await;
    let broken = Script {
        load_failure: Some(LoadFailure {
            exit_code: 1,
            message: "no room for the tensors".to_owned(),
        }),
        ..Script::default()
    };
    let engine = install(&daemon.runtime_dir().join("broken"), &broken);
    daemon.rewrite_config(|config| config["pools"]["a"]["provision"]["path"] = json!(engine));
    let output = daemon.beside(&["reload"]);
    assert_eq!(output.status.code(), Some(1));
    let (stdout, _) = said(&output);
    assert!(
        stdout.starts_with("pool a: rolled back; reloaded: provision.path"),
        "{stdout}"
    );
    assert!(stdout.contains("no room for the tensors"), "{stdout}");
    let task = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 1 }))
        .await;
    assert_eq!(
        shape(&daemon.events(id(&task), None).await),
        ["started", "token", "end"]
    );
    // The file still says otherwise, and so it is tried again.
    let again = daemon.beside(&["reload", "--dry-run"]);
    assert!(said(&again).0.contains("pool a: reloaded: provision.path"));
}

#[tokio::test]
async fn no_admitted_task_is_lost_when_its_pool_gets_another_engine() {
    let script = Script {
        token_ms: 20,
        ..Script::endless(20)
    };
    let daemon = with_pools(&script, &["a"]).await;
    let before = pid(&daemon.until_ready("a").await);
    let running = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 60 }))
        .await;
    let mut reader = daemon.open_events(id(&running), "", None).await;
    let mut events = vec![reader.next().await.unwrap()];
    let queued = daemon
        .submit(json!({ "prompt": "b", "max_tokens": 2 }))
        .await;
    daemon.rewrite_config(|config| config["pools"]["a"]["ctx"] = json!(512));
    let output = daemon.beside(&["reload"]);
    assert!(output.status.success(), "{}", said(&output).1);
    assert_ne!(pid(&daemon.until_ready("a").await), before);
    while let Some(event) = reader.next().await {
        events.push(event);
    }
    assert_eq!(shape(&events), ["started", "token", "end"]);
    text(&events);
    let events = daemon.events(id(&queued), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"]);
}

#[tokio::test]
async fn a_file_that_was_corrected_meanwhile_is_what_counts() {
    let daemon = with_pools(&Script::default(), &["a", "b"]).await;
    let untouched = pid(&daemon.until_ready("b").await);
    let slow = Script {
        load_ms: 2000,
        ..Script::default()
    };
    let wrong = install(&daemon.runtime_dir().join("slow"), &slow);
    let right = install(&daemon.runtime_dir().join("right"), &Script::default());
    daemon.rewrite_config(|config| config["pools"]["a"]["provision"]["path"] = json!(wrong));
    let begun = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(begun.status(), 202);
    daemon.rewrite_config(|config| config["pools"]["a"]["provision"]["path"] = json!(right));
    // Refused only while the first drains and stops the pool.
    daemon
        .until("the second reload begins", async || {
            let begun = daemon.post("/v2/admin/reload", json!({})).await;
            (begun.status() == 202).then_some(())
        })
        .await;
    let report = reloaded(&daemon, 2).await;
    assert_eq!(report["state"], "done", "{report}");
    let pool = daemon.until_ready("a").await;
    let engine = std::fs::read(format!("/proc/{}/cmdline", pid(&pool))).unwrap();
    let engine = String::from_utf8_lossy(&engine);
    assert!(engine.contains("/right/"), "{engine}");
    assert_eq!(pid(&daemon.until_ready("b").await), untouched);
}

#[tokio::test]
async fn the_token_changes_at_once_and_so_does_who_may_ask() {
    let setup = Setup::new(&Script::default());
    let file = setup.engine_dir().join("token");
    std::fs::write(&file, "first\n").unwrap();
    let daemon = setup.top("auth", json!({ "token_file": file })).start();
    let status = async |token: &str| {
        let request = daemon.client.get(format!("{}/v2/pools", daemon.url));
        request.bearer_auth(token).send().await.unwrap().status()
    };
    assert_eq!(status("first").await, 200);
    let refused = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(refused.status(), 401);
    std::fs::write(&file, "second\n").unwrap();
    let output = daemon.beside(&["reload"]);
    assert!(!output.status.success(), "it has the new token only");
    assert!(said(&output).1.contains("SIGHUP"), "{}", said(&output).1);
    daemon.signal(Signal::SIGHUP);
    daemon
        .until("the new token opens", async || {
            (status("second").await == 200).then_some(())
        })
        .await;
    assert_eq!(status("first").await, 401);
    let output = daemon.beside(&["reload"]);
    assert!(output.status.success(), "{}", said(&output).1);
    assert!(!said(&output).0.contains("second"));
}

#[tokio::test]
async fn a_stop_in_the_middle_of_a_reload_ends_cleanly() {
    let setup = Setup::new(&Script::endless(5));
    let pool = setup.pool_settings();
    let setup = setup.top("pools", json!({ "a": pool, "b": pool }));
    let mut daemon = setup.top("drain_seconds", 3600).start();
    let engines = [
        pid(&daemon.until_ready("a").await),
        pid(&daemon.until_ready("b").await),
    ];
    let task = daemon
        .submit(json!({ "prompt": "a", "pool_id": "b", "max_tokens": 4000 }))
        .await;
    let mut reader = daemon.open_events(id(&task), "", None).await;
    reader.next().await.unwrap();
    daemon.rewrite_config(|config| {
        config["pools"].as_object_mut().unwrap().remove("b");
    });
    let begun = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(begun.status(), 202);
    // The pool drains: its task goes on, and a second reload is refused.
    let busy = daemon.post("/v2/admin/reload", json!({})).await;
    assert_eq!(busy.status(), 409);
    let draining = daemon.get_json("/v2/pools/b").await;
    assert_eq!(draining["state"], "draining", "{draining}");
    assert!(reader.next().await.is_some());
    daemon.signal(Signal::SIGTERM);
    daemon
        .until("the other pool drains, too", async || {
            let pool = daemon.get_json("/v2/pools/a").await;
            (pool["state"] != "ready").then_some(())
        })
        .await;
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(engines.iter().all(|engine| !is_alive(*engine)));
    assert!(!daemon.runtime_dir().join("orchestratord.json").exists());
}

#[test]
fn without_a_daemon_the_command_says_where_it_looked() {
    let output = output(&Setup::new(&Script::default()), &["reload"]);
    assert_eq!(output.status.code(), Some(1));
    let (_, stderr) = said(&output);
    assert!(
        stderr.contains("runtime/orchestratord.json") && stderr.contains("--url"),
        "{stderr}"
    );
}

#[tokio::test]
async fn a_hangup_of_a_terminal_that_was_closed_stops_the_daemon() {
    let setup = Setup::new(&Script::default());
    let terminal = nix::pty::openpty(None, None).unwrap();
    // Ours alone: held by the daemon it would never be closed.
    let close_on_exec = FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC);
    fcntl(&terminal.master, close_on_exec).unwrap();
    let mut child = setup
        .command(&["serve"])
        .stdin(terminal.slave)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap());
    // It listens for signals before it says where it listens.
    let presence = setup
        .engine_dir()
        .with_file_name("runtime/orchestratord.json");
    support::until_exists(&presence);
    // With the terminal open the signal asks for a reload, and it lives on.
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    let text = std::fs::read_to_string(&presence).unwrap();
    let url = serde_json::from_str::<Value>(&text).unwrap()["url"].clone();
    let url = format!("{}/v2/admin/reload", url.as_str().unwrap());
    let client = reqwest::Client::new();
    let begun = std::time::Instant::now();
    loop {
        let report: Value = client.get(&url).send().await.unwrap().json().await.unwrap();
        if report["id"] == 1 {
            break;
        }
        assert!(begun.elapsed() < support::DEADLINE, "it was not reloaded");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(child.try_wait().unwrap().is_none());
    drop(terminal.master);
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    assert!(support::wait(&mut child).success());
    assert!(!presence.exists());
}

/// Directories that nothing can be written to are noticed before a port is
/// bound.
#[test]
fn a_start_without_a_place_to_write_is_refused_with_the_key_and_a_hint() {
    for key in ["cache_dir", "runtime_dir"] {
        let setup = Setup::new(&Script::default());
        let file = setup.engine_dir().join("a-file");
        std::fs::write(&file, "").unwrap();
        let setup = setup.top(key, file.join("below").to_str().unwrap());
        let output = output(&setup, &["serve"]);
        assert_eq!(output.status.code(), Some(1));
        let (_, stderr) = said(&output);
        assert!(
            stderr.contains(&format!("`{key}`")) && stderr.contains("hint:"),
            "{stderr}"
        );
        assert!(!stderr.contains("listening"), "{stderr}");
    }
}
