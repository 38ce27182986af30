//! Clients that go away: their tasks are cancelled, unless they said otherwise.

use std::time::Duration;

use serde_json::Value;
use test_harness_fake_engine::Script;

use crate::support::{Daemon, Setup};
use crate::{Reading, chat, streamed, task_of, until_running, until_status};

const CHAT: &str = "/v1/chat/completions";

fn ask(daemon: &Daemon, body: &Value) -> reqwest::RequestBuilder {
    daemon
        .client
        .post(format!("{}{CHAT}", daemon.url))
        .json(body)
}

async fn until_idle(daemon: &Daemon) {
    daemon
        .until("nothing runs or waits", async || {
            let pool = daemon.pool().await;
            let idle = pool["running"] == 0 && pool["queue"]["interactive"] == 0;
            idle.then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_stream_that_is_dropped_cancels_its_task() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let response = daemon.post(CHAT, streamed(chat(4000))).await;
    let task = task_of(&response);
    let mut stream = Reading::of(response);
    stream.next().await.unwrap();
    drop(stream);
    until_status(&daemon, &task, "cancelled").await;
    until_idle(&daemon).await;
}

#[tokio::test]
async fn a_client_that_waits_no_longer_cancels_its_task_running_or_queued() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let running = tokio::spawn(ask(&daemon, &chat(4000)).send());
    until_running(&daemon, 1).await;
    let queued = tokio::spawn(ask(&daemon, &chat(4000)).send());
    daemon
        .until("the other waits", async || {
            (daemon.pool().await["queue"]["interactive"] == 1).then_some(())
        })
        .await;
    queued.abort();
    daemon
        .until("the queue is empty", async || {
            (daemon.pool().await["queue"]["interactive"] == 0).then_some(())
        })
        .await;
    assert_eq!(
        daemon.pool().await["running"],
        1,
        "the other is not touched"
    );
    running.abort();
    until_idle(&daemon).await;
}

#[tokio::test]
async fn a_header_lets_a_task_run_on() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let stays = ask(&daemon, &streamed(chat(200))).header("X-Cancel-On-Disconnect", "false");
    let stays = stays.send().await.unwrap();
    let task = task_of(&stays);
    drop(stays);
    until_status(&daemon, &task, "completed").await;
    let events = daemon.events(&task, None).await;
    assert!(!crate::support::text(&events).is_empty());
}

#[tokio::test]
async fn a_timeout_in_the_grace_of_a_stream_cancels_too() {
    // Nothing comes within the first second.
    let script = Script {
        first_token_ms: 60_000,
        ..Script::endless(5)
    };
    let daemon = Setup::new(&script).ready().await;
    let hasty = ask(&daemon, &streamed(chat(10))).timeout(Duration::from_millis(300));
    hasty.send().await.unwrap_err();
    until_idle(&daemon).await;
}
