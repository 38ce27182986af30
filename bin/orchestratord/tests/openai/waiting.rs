//! What clients see while their task waits, and when it goes wrong on the way.

use serde_json::Value;
use test_harness_fake_engine::{Fault, Script};

use crate::support::Setup;
use crate::{Piece, Reading, chat, streamed, task_of, until_status};

const CHAT: &str = "/v1/chat/completions";

#[tokio::test]
async fn a_stream_is_kept_alive_while_its_pool_loads_and_then_answered() {
    let script = Script {
        load_ms: 2500,
        ..Script::with_pieces(&["late"])
    };
    let daemon = Setup::new(&script).start();
    let whole = daemon.client.post(format!("{}{CHAT}", daemon.url));
    let whole = tokio::spawn(whole.json(&chat(4)).send());
    let mut stream = Reading::of(daemon.post(CHAT, streamed(chat(4))).await);
    let first = stream.next().await.unwrap();
    let Piece::Comment(comment) = &first else {
        panic!("{first:?} instead of a word about what is waited for")
    };
    assert!(comment.starts_with("preparing: "), "{comment}");
    let pieces = stream.rest().await;
    assert!(
        pieces
            .iter()
            .any(|piece| matches!(piece, Piece::Event { data, .. } if data.contains("late"))),
        "{pieces:?}"
    );
    let whole: Value = whole.await.unwrap().unwrap().json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "late");
}

#[tokio::test]
async fn a_crash_in_mid_stream_is_an_error_and_no_end() {
    let script = Script {
        fault: Some(Fault::Crash {
            after_tokens: 2,
            exit_code: 3,
        }),
        faulty_completions: Some(2),
        token_ms: 20,
        ..Script::default()
    };
    let daemon = Setup::new(&script).ready().await;
    let pieces = Reading::of(daemon.post(CHAT, streamed(chat(9))).await)
        .rest()
        .await;
    let error = pieces.last().unwrap().data();
    assert_eq!(error["error"]["code"], "worker_reset", "{error}");
    assert!(pieces.len() > 2, "what had come was passed on: {pieces:?}");
    daemon.until_state("ready").await;
    let pieces = Reading::of(daemon.post("/v1/messages", streamed(chat(9))).await)
        .rest()
        .await;
    let last = pieces.last().unwrap();
    assert!(
        matches!(last, Piece::Event { name: Some(name), .. } if name == "error"),
        "{last:?}"
    );
    assert_eq!(last.data()["error"]["type"], "api_error");
}

#[tokio::test]
async fn a_task_that_somebody_cancelled_is_an_error_to_its_client() {
    let daemon = Setup::new(&Script::endless(5)).ready().await;
    let response = daemon.post(CHAT, streamed(chat(4000))).await;
    let task = task_of(&response);
    let mut stream = Reading::of(response);
    stream.next().await.unwrap();
    let cancel = format!("/v2/tasks/{task}/cancel");
    daemon.post(&cancel, Value::Null).await;
    let pieces = stream.rest().await;
    let error = pieces.last().unwrap().data();
    assert_eq!(error["error"]["code"], "cancelled", "{error}");
    assert_eq!(error["error"]["type"], "request_cancelled");
    // Waiting in the queue, where no header has told its id.
    let request = daemon.client.post(format!("{}{CHAT}", daemon.url));
    let request = request.header("X-Correlation-Id", "mine").json(&chat(4000));
    let waiting = tokio::spawn(request.send());
    crate::until_running(&daemon, 1).await;
    let task = running_task(&daemon).await;
    daemon
        .post(&format!("/v2/tasks/{task}/cancel"), Value::Null)
        .await;
    let response = waiting.await.unwrap().unwrap();
    assert_eq!(response.status(), 499);
    assert_eq!(response.headers()["x-should-retry"], "false");
    assert_eq!(task_of(&response), task);
    until_status(&daemon, &task, "cancelled").await;
}

/// The id of the one task that runs, as the daemon's log has it.
async fn running_task(daemon: &crate::support::Daemon) -> String {
    daemon
        .until("the log names the task", async || {
            let log = daemon.log();
            let line = log.lines().rev().find(|line| line.contains("mine"))?;
            let (_, rest) = line.split_once("task=")?;
            Some(rest.split_whitespace().next()?.to_owned())
        })
        .await
}
