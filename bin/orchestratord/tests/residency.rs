//! More pools than fit into memory at once: they take turns, and nothing is
//! lost on the way.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::time::{Duration, Instant};

use futures::future::join_all;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::pools::{engine_of, quick_restarts, send, until_reload};
use support::{Daemon, Setup, id, is_alive, shape, text};
use test_harness_fake_engine::{Script, install, starts};

/// What the engine of the test's model is estimated to take, in bytes, as a daemon
/// tells that has loaded one.
async fn estimated() -> u64 {
    let daemon = Setup::new(&Script::default()).ready().await;
    let pool = daemon.pool().await;
    let ram = pool["memory"]["estimated"]["ram"].as_u64();
    assert_eq!(pool["memory"]["promised"]["ram"].as_u64(), ram, "{pool}");
    ram.unwrap_or_else(|| panic!("no estimate in {pool}"))
}

/// Room for one engine, and not for two, whatever they are measured to use.
async fn room_for_one() -> Value {
    let one = estimated().await;
    json!({ "ram": one + one / 4 })
}

/// Says whose engine it is.
fn script(name: &str) -> Script {
    let pieces = [format!("{name} "), "tells ".to_owned(), name.to_owned()];
    Script {
        pieces: pieces.to_vec(),
        ..Script::default()
    }
}

/// Pools that are loaded on demand, each with an engine of its own.
fn pools(memory: Value, scripts: &[(&str, Script)], change: impl Fn(&str, &mut Value)) -> Setup {
    let setup = Setup::new(&Script::default());
    let mut pools = json!({});
    for (name, script) in scripts {
        let mut pool = setup.pool_settings();
        let dir = setup.engine_dir().with_file_name(format!("engine-{name}"));
        pool["provision"]["path"] = json!(install(&dir, script));
        pool["load"] = json!("on_demand");
        pool["restart"] = quick_restarts(100);
        change(name, &mut pool);
        pools[name] = pool;
    }
    setup.top("pools", pools).top("memory", memory)
}

fn two(memory: Value, first: Script, second: Script) -> Setup {
    pools(memory, &[("a", first), ("b", second)], |_, _| {})
}

async fn ask(daemon: &Daemon, pool: &str) -> Value {
    daemon
        .submit(json!({ "prompt": "who are you", "pool_id": pool }))
        .await
}

/// Reads a task to its end, which must be that pool's whole answer.
async fn whole(daemon: &Daemon, task: &Value, pool: &str) {
    let events = daemon.events(id(task), None).await;
    assert_eq!(shape(&events), ["started", "token", "end"], "{events:?}");
    assert_eq!(text(&events), script(pool).pieces.concat());
}

async fn answered(daemon: &Daemon, pool: &str) {
    let task = ask(daemon, pool).await;
    whole(daemon, &task, pool).await;
}

async fn state(daemon: &Daemon, pool: &str) -> Value {
    daemon.get_json(&format!("/v2/pools/{pool}")).await
}

async fn memory(daemon: &Daemon) -> Value {
    daemon.get_json("/v2/memory").await
}

/// Waits until a pool stands in the line, and returns what is said of it.
async fn waiting(daemon: &Daemon, pool: &str) -> String {
    daemon
        .until(&format!("{pool} waits for memory"), async || {
            let pool = state(daemon, pool).await;
            let steps = pool["preparation"]["steps"].as_array().unwrap();
            let mut words = steps
                .iter()
                .map(|step| step["description"].as_str().unwrap());
            let waits = words.find(|words| words.starts_with("waits for memory"));
            waits.map(str::to_owned)
        })
        .await
}

fn swaps(memory: &Value) -> u64 {
    memory["swaps"].as_u64().unwrap()
}

#[tokio::test]
async fn two_pools_take_turns_and_no_request_is_lost() {
    const CLIENTS: usize = 8;
    const EACH: usize = 12;
    let daemon = two(room_for_one().await, script("a"), script("b")).start();
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(async |client| {
        for turn in 0..EACH {
            answered(&daemon, ["a", "b"][(client + turn) % 2]).await;
            let memory = memory(&daemon).await;
            let (promised, budget) = (&memory["promised"]["ram"], &memory["budget"]["ram"]);
            assert!(
                promised.as_u64() <= budget["bytes"].as_u64(),
                "more is promised than there is: {memory}"
            );
        }
    });
    join_all(clients).await;
    let memory = memory(&daemon).await;
    let requests = (CLIENTS * EACH) as u64;
    eprintln!(
        "{requests} requests of {CLIENTS} clients: {} swaps in {:?}",
        swaps(&memory),
        begun.elapsed()
    );
    // Both had their turn, and a turn was for more than one request.
    assert!(swaps(&memory) >= 1, "{memory}");
    assert!(swaps(&memory) <= requests / 4, "{memory}");
    let metrics = daemon.get("/metrics").await.text().await.unwrap();
    for name in [
        "orchestratord_memory_swaps_total{pool=\"a\"}",
        "orchestratord_memory_wait_seconds_count{pool=\"b\"}",
        "orchestratord_memory_promised_bytes{kind=\"ram\"}",
        "orchestratord_memory_budget_bytes{kind=\"ram\"}",
    ] {
        assert!(metrics.contains(name), "{name} is not in {metrics}");
    }
}

#[tokio::test]
async fn a_pool_with_tasks_finishes_them_before_it_makes_way() {
    let mut memory = room_for_one().await;
    memory["min_dwell_seconds"] = json!(0);
    let slow = Script {
        first_token_ms: 1000,
        ..script("a")
    };
    let daemon = two(memory, slow, script("b")).start();
    let first = ask(&daemon, "a").await;
    let pool = daemon.until_ready("a").await;
    let engine = engine_of(&pool);
    // One more, which waits for the one slot, and has to wait for b then.
    let second = ask(&daemon, "a").await;
    let other = ask(&daemon, "b").await;
    let words = waiting(&daemon, "b").await;
    assert!(words.contains("`a`"), "{words}");
    assert!(is_alive(engine), "a busy pool is not evicted");
    whole(&daemon, &first, "a").await;
    whole(&daemon, &other, "b").await;
    assert!(!is_alive(engine));
    whole(&daemon, &second, "a").await;
    assert!(swaps(&daemon.get_json("/v2/memory").await) >= 2);
    let pool = state(&daemon, "a").await;
    assert_eq!(pool["engine_exits"], 0, "{pool}");
    let measured = &pool["memory"]["measured"]["ram"];
    assert!(measured.is_u64(), "however shortly it was there: {pool}");
}

#[tokio::test]
async fn a_pool_that_waits_no_longer_leaves_the_line() {
    let slow = Script::endless(50);
    let daemon = two(room_for_one().await, slow, script("b")).start();
    let first = ask(&daemon, "a").await;
    daemon.until_ready("a").await;
    let other = ask(&daemon, "b").await;
    waiting(&daemon, "b").await;
    let cancel = format!("/v2/tasks/{}/cancel", id(&other));
    assert!(daemon.post(&cancel, json!({})).await.status().is_success());
    daemon
        .until("nobody waits", async || {
            let waiting = &memory(&daemon).await["waiting"];
            waiting.as_array().unwrap().is_empty().then_some(())
        })
        .await;
    let pool = daemon
        .until("b rests", async || {
            let pool = state(&daemon, "b").await;
            (pool["state"] == "unloaded").then_some(pool)
        })
        .await;
    assert_eq!(pool["restarts"]["load_failure"], 0, "{pool}");
    let cancel = format!("/v2/tasks/{}/cancel", id(&first));
    assert!(daemon.post(&cancel, json!({})).await.status().is_success());
    answered(&daemon, "b").await;
}

#[tokio::test]
async fn a_pinned_pool_stays_and_who_does_not_fit_beside_it_is_told() {
    let scripts = [("a", script("a")), ("b", script("b"))];
    let pin = |name: &str, pool: &mut Value| pool["pin"] = json!(name == "a");
    let daemon = pools(room_for_one().await, &scripts, pin).start();
    answered(&daemon, "a").await;
    let engine = engine_of(&state(&daemon, "a").await);
    let task = ask(&daemon, "b").await;
    let events = daemon.events(id(&task), None).await;
    let error = &events.last().unwrap().data;
    let message = error.to_string();
    assert!(
        message.contains("pinned pools leave no room for it: `a`"),
        "{message}"
    );
    answered(&daemon, "a").await;
    assert!(is_alive(engine));
    assert_eq!(swaps(&memory(&daemon).await), 0);
}

#[tokio::test]
async fn what_can_never_fit_is_refused_with_what_helps() {
    let daemon = two(json!({ "ram": "1MiB" }), script("a"), script("b")).start();
    let task = ask(&daemon, "a").await;
    let events = daemon.events(id(&task), None).await;
    let error = events.last().unwrap().data.to_string();
    assert!(
        error.contains("the budget is 1 MiB") && error.contains("`memory`"),
        "{error}"
    );
    assert_eq!(starts(&daemon.engine_dir().with_file_name("engine-a")), 0);
}

#[tokio::test]
async fn a_reload_to_what_can_never_fit_leaves_the_engine_alone() {
    let budget = room_for_one().await;
    let daemon = Setup::new(&script("default"))
        .top("memory", budget.clone())
        .ready()
        .await;
    let engine = engine_of(&daemon.pool().await);
    // As large as the whole budget, and all but its head a hole.
    let large = daemon.model().with_file_name("large.gguf");
    std::fs::copy(daemon.model(), &large).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&large)
        .unwrap();
    file.set_len(budget["ram"].as_u64().unwrap()).unwrap();
    let body = json!({ "model": large });
    let asked = daemon.post("/v2/pools/default/reload", body).await;
    assert_eq!(asked.status(), 202);
    let pool = until_reload(&daemon, "rolled_back").await;
    let error = pool["reload"]["error"].to_string();
    assert!(error.contains("budget"), "{pool}");
    assert_eq!(
        (&pool["state"], engine_of(&pool)),
        (&json!("ready"), engine)
    );
    answered(&daemon, "default").await;
}

#[tokio::test]
async fn of_a_group_only_so_many_are_loaded_at_once() {
    let memory = json!({ "groups": { "either": { "pools": ["a", "b"] } } });
    let scripts = [("a", script("a")), ("b", script("b")), ("c", script("c"))];
    let daemon = pools(memory, &scripts, |_, _| {}).start();
    for pool in ["a", "b", "c", "a"] {
        answered(&daemon, pool).await;
        let both = [state(&daemon, "a").await, state(&daemon, "b").await];
        let loaded = both.iter().filter(|pool| pool["state"] == "ready").count();
        assert_eq!(loaded, 1, "{both:?}");
    }
    assert_eq!(
        state(&daemon, "c").await["state"],
        "ready",
        "it is in no group"
    );
    assert_eq!(swaps(&self::memory(&daemon).await), 2);
}

#[tokio::test]
async fn a_dead_engines_memory_goes_to_who_waits() {
    let slow = Script {
        first_token_ms: 60_000,
        ..script("a")
    };
    let mut memory = room_for_one().await;
    memory["min_dwell_seconds"] = json!(3600);
    let daemon = two(memory, slow, script("b")).start();
    ask(&daemon, "a").await;
    let engine = engine_of(&daemon.until_ready("a").await);
    let other = ask(&daemon, "b").await;
    let words = waiting(&daemon, "b").await;
    assert!(words.contains("`a` has its turn"), "{words}");
    send(engine, Signal::SIGKILL);
    whole(&daemon, &other, "b").await;
    assert_eq!(state(&daemon, "a").await["engine_exits"], 1);
}

#[tokio::test]
async fn a_daemon_that_ends_keeps_nobody_in_the_line() {
    let slow = Script::endless(50);
    let mut daemon = two(room_for_one().await, slow, script("b"))
        .top("drain_seconds", 0)
        .start();
    ask(&daemon, "a").await;
    let engine = engine_of(&daemon.until_ready("a").await);
    ask(&daemon, "b").await;
    waiting(&daemon, "b").await;
    let begun = Instant::now();
    daemon.signal(Signal::SIGTERM);
    assert!(daemon.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert!(!is_alive(engine));
}

#[tokio::test]
async fn an_eager_pool_without_room_is_loaded_on_demand() {
    let scripts = [("a", script("a")), ("b", script("b"))];
    let eager = |_: &str, pool: &mut Value| pool["load"] = json!("eager");
    let daemon = pools(room_for_one().await, &scripts, eager).start();
    let (ready, unloaded) = daemon
        .until("one is ready and one rests", async || {
            let (a, b) = (state(&daemon, "a").await, state(&daemon, "b").await);
            match (a["state"].as_str().unwrap(), b["state"].as_str().unwrap()) {
                ("ready", "unloaded") => Some(("a", "b")),
                ("unloaded", "ready") => Some(("b", "a")),
                _ => None,
            }
        })
        .await;
    assert_eq!(
        swaps(&memory(&daemon).await),
        0,
        "nobody had to go at start"
    );
    assert!(
        daemon
            .log()
            .contains("no room for the pool beside the others")
    );
    answered(&daemon, unloaded).await;
    answered(&daemon, ready).await;
}

#[tokio::test]
async fn a_gpus_memory_is_counted_where_its_tool_tells_of_it() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (text, tool) = (dir.path().join("text"), dir.path().join("nvidia-smi"));
    let script_text = "#!/bin/sh
case \"$1\" in
    --query-gpu=memory.total) echo 8000 ;;
    --query-gpu=memory.free) echo 7000 ;;
    --query-compute-apps=*) for process in /proc/[0-9]*; do echo \"${process#/proc/}, 100\"; done ;;
esac
";
    std::fs::write(&text, script_text).unwrap();
    // By another process, so that no descriptor of ours keeps it from being run.
    let installed = std::process::Command::new("install")
        .args(["-m", "755"])
        .args([&text, &tool])
        .status();
    assert!(installed.unwrap().success());
    let path = format!(
        "{}:{}",
        dir.path().display(),
        std::env::var("PATH").unwrap()
    );
    let daemon = Setup::new(&Script::default())
        .pool("gpu_layers", 99)
        .env("PATH", &path)
        .ready()
        .await;
    let memory = memory(&daemon).await;
    assert_eq!(memory["budget"]["vram"]["bytes"], 7200 * MIB, "{memory}");
    let estimated = memory["pools"]["default"]["estimated"]["vram"].as_u64();
    assert!(estimated.unwrap() > 0, "{memory}");
    daemon
        .until("the engine's part of it is measured", async || {
            let memory = self::memory(&daemon).await;
            (memory["measured"]["vram"] == 100 * MIB).then_some(())
        })
        .await;
}
