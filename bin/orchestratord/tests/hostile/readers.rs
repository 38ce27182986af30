//! Readers that do not read, and too many of them.

use serde_json::json;
use test_harness_fake_engine::Script;

use crate::raw::{Raw, ask};
use crate::support::{Setup, id};
use crate::{Footprint, a_task_completes, until_descriptors_are_back};

const READERS: usize = 200;

/// What all of them together may make the daemon hold, far below what the
/// answer would take if each had its own copy.
const BOUND_KIB: u64 = 32 * 1024;

fn events_request(task: &str) -> Vec<u8> {
    format!("GET /v2/tasks/{task}/events HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes()
}

#[tokio::test]
async fn readers_that_never_read_cost_little_and_are_let_go() {
    let piece = "x".repeat(200);
    let script = Script {
        pieces: vec![piece],
        cycle: true,
        ..Script::default()
    };
    let daemon = Setup::new(&script)
        .pool("ctx", 100_000)
        .top(
            "limits",
            json!({ "reader_stall_seconds": 4, "streams_per_client": READERS }),
        )
        .env("RUST_LOG", "warn,orchestratord=debug")
        .ready()
        .await;
    a_task_completes(&daemon).await;
    let before = Footprint::of(&daemon);
    // Larger by far than what the kernel keeps for a connection.
    let long = json!({ "prompt": "a", "max_tokens": 20_000 });
    let accepted = daemon.submit(long).await;
    let (url, request) = (daemon.url.clone(), events_request(id(&accepted)));
    let readers = tokio::task::spawn_blocking(move || {
        let connect = |_| {
            let mut raw = Raw::connect(&url);
            assert!(raw.send(&request));
            raw
        };
        (0..READERS).map(connect).collect::<Vec<Raw>>()
    });
    let readers = readers.await.unwrap();
    // They still hold their ends: it is the daemon that lets go.
    daemon
        .until("every reader is let go", async || {
            let gone = daemon.log().matches("the client took nothing").count();
            (gone == READERS).then_some(())
        })
        .await;
    until_descriptors_are_back(&daemon, before).await;
    let after = Footprint::of(&daemon);
    println!("{READERS} readers that never read: {before:?}, after them {after:?}");
    assert!(
        after.peak_kib < before.resident_kib + BOUND_KIB,
        "{before:?}, {after:?}"
    );
    // Nor did they hold the task up.
    daemon
        .until("the task is over", async || {
            let path = format!("/v2/tasks/{}", id(&accepted));
            let view = daemon.get_json(&path).await;
            (view["status"] == "completed").then_some(())
        })
        .await;
    drop(readers);
    a_task_completes(&daemon).await;
}

#[tokio::test]
async fn a_client_has_so_many_streams_and_no_more() {
    let daemon = Setup::new(&Script::endless(5))
        .top("limits", json!({ "streams_per_client": 2 }))
        .ready()
        .await;
    let accepted = daemon
        .submit(json!({ "prompt": "a", "max_tokens": 4000 }))
        .await;
    let request = events_request(id(&accepted));
    let open = || {
        let mut raw = Raw::connect(&daemon.url);
        raw.send(&request);
        let answer = raw.answer(false).unwrap();
        (raw, answer)
    };
    let (first, second) = (open(), open());
    assert_eq!((first.1.status, second.1.status), (200, 200));
    let (_, third) = open();
    assert_eq!(third.status, 429);
    let error = &third.json()["error"];
    assert_eq!(error["code"], "ADMISSION_REJECT");
    assert_eq!(error["policy_label"], "streams_per_client");
    assert!(error["hint"].is_string());
    // Other routes are open, and so is this one when a stream is closed.
    assert_eq!(
        ask(&daemon.url, b"GET /health HTTP/1.1\r\n\r\n").status,
        200
    );
    drop(first);
    daemon
        .until("there is room again", async || {
            (open().1.status == 200).then_some(())
        })
        .await;
}
