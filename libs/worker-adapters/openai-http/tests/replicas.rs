//! Several servers as one engine: where tasks go, and what becomes of them when a
//! server fails.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use support::{
    After, DEADLINE, Reply, Server, answer, chat, chunks, endpoint, first_event, healthy, replicas,
    rest, text, waits,
};
use worker_adapters_adapter_api::{EngineHealth, TimeoutPhase, WorkerAdapter, WorkerError};
use worker_adapters_openai_http::{Endpoint, Replicas};

/// One that fails every task so, and one that answers: the first is asked first.
async fn beside_a_good_one(reply: Reply) -> (Server, Server) {
    let bad = Server::answering(reply).await;
    (bad, Server::answering(Reply::chat(&["go", "od"])).await)
}

#[tokio::test]
async fn who_breaks_off_before_the_first_token_is_replaced_unseen() {
    for reply in [
        Reply::Stream(String::new(), vec![], After::Cut),
        Reply::Stream(String::new(), vec![], After::End),
        Reply::Stream(
            String::new(),
            vec![r#"{"error":{"message":"boom"}}"#.to_owned()],
            After::End,
        ),
        Reply::Status(500, String::new(), "{}".to_owned()),
        Reply::Status(502, String::new(), String::new()),
        Reply::Status(
            307,
            "location: http://127.0.0.1:1/\r\n".to_owned(),
            String::new(),
        ),
    ] {
        let (bad, good) = beside_a_good_one(reply.clone()).await;
        let replicas = replicas(&[&bad, &good]).await;
        assert_eq!(answer(&replicas, chat()).await, "good", "{reply:?}");
        assert_eq!((bad.tasks().len(), good.tasks().len()), (1, 1), "{reply:?}");
        assert_eq!(replicas.running(), 0);
    }
}

#[tokio::test]
async fn who_is_gone_is_taken_out_and_comes_back() {
    let (mut gone, good) = beside_a_good_one(Reply::Nothing).await;
    let replicas = replicas(&[&gone, &good]).await;
    assert_eq!(
        (healthy(&replicas), replicas.capacity()),
        (vec![true, true], 4)
    );
    gone.stop().await;
    assert_eq!(answer(&replicas, chat()).await, "good");
    assert_eq!(
        (healthy(&replicas), replicas.capacity()),
        (vec![false, true], 2)
    );
    let told = replicas.replicas()[0].last_error.clone().unwrap();
    assert!(told.contains("could not be reached"), "{told}");
    tokio::time::timeout(DEADLINE, replicas.changed())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_hung_one_is_left_for_another_and_has_to_prove_itself() {
    let (hung, good) = beside_a_good_one(Reply::Stream(String::new(), vec![], After::Hang)).await;
    let replicas = replicas(&[&hung, &good]).await;
    assert_eq!(answer(&replicas, chat()).await, "good");
    assert_eq!(healthy(&replicas), [false, true]);
    let told = replicas.replicas()[0].last_error.clone().unwrap();
    assert!(told.contains("first token"), "{told}");
}

#[tokio::test]
async fn nothing_is_begun_anew_after_the_first_token() {
    for (after, timeout) in [
        (After::Cut, false),
        (After::End, false),
        (After::Hang, true),
    ] {
        let (bad, good) =
            beside_a_good_one(Reply::Stream(String::new(), chunks(&["half"]), after)).await;
        let replicas = replicas(&[&bad, &good]).await;
        let (events, failure) = rest(replicas.submit(chat()).await.unwrap()).await;
        assert_eq!(text(&events), "half");
        match failure.unwrap() {
            WorkerError::Reset { .. } if !timeout => {}
            WorkerError::Timeout {
                phase: TimeoutPhase::NextToken,
                ..
            } if timeout => {}
            other => panic!("{other}"),
        }
        assert!(good.tasks().is_empty());
        assert_eq!(replicas.running(), 0);
    }
}

#[tokio::test]
async fn a_denied_token_is_told_by_its_file_and_never_shown() {
    let server = Server::start(|request| {
        if request.head.contains("authorization: bearer hunter2") {
            Reply::Status(
                401,
                String::new(),
                r#"{"error":{"message":"bad key hunter2"}}"#.to_owned(),
            )
        } else {
            Reply::Status(400, String::new(), String::new())
        }
    })
    .await;
    let endpoint = Endpoint {
        bearer: Some(provision_kit::secret::Secret::new("hunter2")),
        token_file: Some("/keys/far".into()),
        ..endpoint(&server.url)
    };
    let replicas = Replicas::new(vec![endpoint], waits()).unwrap();
    replicas.check_due().await;
    let complaint = replicas.complaint();
    assert!(complaint.contains("/keys/far"), "{complaint}");
    assert!(!complaint.contains("hunter2"), "{complaint}");
    assert!(!format!("{replicas:?}").contains("hunter2"));
    let error = replicas.health().await.unwrap_err();
    assert!(error.retriable() && error.to_string().contains("/keys/far"));
}

#[tokio::test]
async fn a_busy_server_is_waited_for_and_a_free_one_preferred() {
    let busy_once = || {
        let asked = Arc::new(AtomicU32::new(0));
        Server::start(move |request| match request.line.as_str() {
            "GET /v1/models" => Reply::ok("{}"),
            _ if asked.fetch_add(1, Ordering::Relaxed) == 0 => {
                Reply::Status(429, "retry-after: 1\r\n".to_owned(), String::new())
            }
            _ => Reply::chat(&["late"]),
        })
    };
    let alone = busy_once().await;
    let only = replicas(&[&alone]).await;
    let begun = Instant::now();
    assert_eq!(answer(&only, chat()).await, "late");
    assert!(begun.elapsed().as_millis() >= 1000, "as long as it said");
    assert_eq!(healthy(&only), [true], "who is busy is well");

    let (busy, free) = (
        busy_once().await,
        Server::answering(Reply::chat(&["free"])).await,
    );
    let both = replicas(&[&busy, &free]).await;
    assert_eq!(answer(&both, chat()).await, "free");
}

#[tokio::test]
async fn a_refused_task_is_refused_everywhere() {
    let (bad, good) = beside_a_good_one(Reply::Status(
        400,
        String::new(),
        r#"{"error":{"message":"no such thing"}}"#.to_owned(),
    ))
    .await;
    let replicas = replicas(&[&bad, &good]).await;
    let refused = replicas.submit(chat()).await.err().unwrap();
    assert!(
        matches!(refused, WorkerError::InvalidParams { message } if message == "no such thing")
    );
    assert!(good.tasks().is_empty());
    assert_eq!(healthy(&replicas), [true, true]);
}

#[tokio::test]
async fn tasks_go_where_the_smallest_part_is_in_use() {
    let endless = Reply::Stream(String::new(), chunks(&["x"]), After::Hang);
    let (small, large) = (
        Server::answering(endless.clone()).await,
        Server::answering(endless).await,
    );
    let sized = |server: &Server, slots| Endpoint {
        slots,
        ..endpoint(&server.url)
    };
    let waits = support::waits();
    let waits = worker_adapters_openai_http::Waits {
        next_token: DEADLINE,
        ..waits
    };
    let replicas = Replicas::new(vec![sized(&small, 1), sized(&large, 3)], waits).unwrap();
    replicas.check_due().await;
    let mut streams = Vec::new();
    for _ in 0..4 {
        let mut stream = replicas.submit(chat()).await.unwrap();
        first_event(&mut stream).await;
        streams.push(stream);
    }
    assert_eq!((small.tasks().len(), large.tasks().len()), (1, 3));
    let running: Vec<u32> = replicas
        .replicas()
        .iter()
        .map(|status| status.running)
        .collect();
    assert_eq!(running, [1, 3]);
    drop(streams);
    assert_eq!(replicas.running(), 0);
    assert!(replicas.replicas().iter().all(|status| status.running == 0));
}

#[tokio::test]
async fn health_that_flaps_has_to_hold_before_tasks_come_again() {
    let well = Arc::new(AtomicBool::new(true));
    let seen = Arc::clone(&well);
    let server = Server::start(move |_| {
        if seen.load(Ordering::Relaxed) {
            Reply::ok("{}")
        } else {
            Reply::Status(502, String::new(), String::new())
        }
    })
    .await;
    let replicas = replicas(&[&server]).await;
    assert_eq!(replicas.health().await.unwrap(), EngineHealth::Ready);
    let mut checks = Vec::new();
    for _ in 0..2 {
        well.store(false, Ordering::Relaxed);
        // A task that meets it takes it out at once.
        assert!(replicas.submit(chat()).await.is_err());
        assert_eq!(replicas.capacity(), 0);
        well.store(true, Ordering::Relaxed);
        let mut needed = 0;
        while replicas.capacity() == 0 {
            tokio::time::sleep_until(replicas.next_check()).await;
            replicas.check_due().await;
            needed += 1;
        }
        checks.push(needed);
    }
    assert_eq!(checks, [1, 2]);
}
