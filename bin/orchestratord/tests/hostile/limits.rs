//! Requests at the edge of HTTP and beyond, and clients that take their time.

use std::time::Duration;

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::raw::{Answer, Raw, ask, submission};
use crate::support::Setup;
use crate::{Footprint, a_task_completes, until_descriptors_are_back};

const GET: &[u8] = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n";

fn code(answer: &Answer) -> Value {
    answer.json()["error"]["code"].clone()
}

#[tokio::test]
async fn what_is_no_request_is_refused_in_the_one_shape() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let many = "X-A: b\r\n".repeat(200);
    let cases: Vec<(Vec<u8>, u16)> = vec![
        (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n".to_vec(),
            400,
        ),
        (b"GET /health HTTP/3.0\r\n\r\n".to_vec(), 400),
        (b"GET  /health  HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"G\0T /health HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"GET /\0 HTTP/1.1\r\n\r\n".to_vec(), 400),
        (b"GET /health HTTP/1.1\r\nBad Name: x\r\n\r\n".to_vec(), 400),
        (b"GET /health HTTP/1.1\r\nX: a\0b\r\n\r\n".to_vec(), 400),
        (
            b"GET /health HTTP/1.1\r\nX: a\r\n folded\r\n\r\n".to_vec(),
            400,
        ),
        (
            b"POST /v2/tasks HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab".to_vec(),
            400,
        ),
        (
            b"POST /v2/tasks HTTP/1.1\r\nContent-Length: -1\r\n\r\n".to_vec(),
            400,
        ),
        (
            b"POST /v2/tasks HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n".to_vec(),
            400,
        ),
        (
            b"POST /v2/tasks HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n".to_vec(),
            400,
        ),
        (
            b"POST /v2/tasks HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_vec(),
            400,
        ),
        (
            format!("GET /health HTTP/1.1\r\n{many}\r\n").into_bytes(),
            431,
        ),
        (
            format!(
                "GET /health HTTP/1.1\r\nX: {}\r\n\r\n",
                "y".repeat(32 * 1024)
            )
            .into_bytes(),
            431,
        ),
        (
            format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(40 * 1024)).into_bytes(),
            431,
        ),
    ];
    for (request, status) in cases {
        let shown = String::from_utf8_lossy(&request[..request.len().min(80)]).into_owned();
        let answer = ask(&daemon.url, &request);
        assert_eq!(answer.status, status, "{shown:?}");
        assert_eq!(code(&answer), "INVALID_PARAMS", "{shown:?}");
        assert_eq!(answer.header("connection"), Some("close"), "{shown:?}");
    }
    a_task_completes(&daemon).await;
}

#[tokio::test]
async fn odd_but_lawful_requests_are_answered() {
    let daemon = Setup::new(&Script::default()).ready().await;
    let ask = |request: &str| ask(&daemon.url, request.as_bytes());
    let local = "Host: localhost\r\n\r\n";
    for (line, status) in [
        ("GET /health HTTP/1.0", 200),
        ("GET http://localhost/health HTTP/1.1", 200),
        ("HEAD /health HTTP/1.1", 200),
        ("OPTIONS /v2/tasks HTTP/1.1", 405),
        ("OPTIONS * HTTP/1.1", 404),
        ("CONNECT localhost:80 HTTP/1.1", 404),
        ("BREW /health HTTP/1.1", 405),
        ("TRACE / HTTP/1.1", 405),
        ("GET //health HTTP/1.1", 404),
        ("GET /v2/tasks/%00%ff/events HTTP/1.1", 400),
        ("GET /v2/tasks/%00 HTTP/1.1", 404),
        ("GET /v2/pools/..%2f..%2fetc%2fpasswd HTTP/1.1", 404),
        ("GET /v2/tasks/x/events?verbose=%ff&a HTTP/1.1", 400),
        ("GET http://evil.example/v2/pools HTTP/1.1", 403),
    ] {
        assert_eq!(ask(&format!("{line}\r\n{local}")).status, status, "{line}");
    }
    let task = r#"{"prompt":"a"}"#;
    let chunked = format!(
        "POST /v2/tasks HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTrailer: X-T\r\n\r\n{:x}\r\n{task}\r\n0\r\nX-T: 1\r\n\r\n",
        task.len()
    );
    assert_eq!(ask(&chunked).status, 202);
    let unlawful_chunk = "POST /v2/tasks HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n";
    assert_eq!(ask(unlawful_chunk).status, 400);

    // Whoever asks first is told to go on, then answered.
    let mut raw = Raw::connect(&daemon.url);
    let head = format!(
        "POST /v2/tasks HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: {}\r\n\r\n",
        task.len()
    );
    raw.send(head.as_bytes());
    assert_eq!(raw.answer(false).unwrap().status, 100);
    raw.send(task.as_bytes());
    assert_eq!(raw.answer(false).unwrap().status, 202);

    // Several requests at once are answered in their order.
    let mut raw = Raw::connect(&daemon.url);
    let mut requests = GET.to_vec();
    requests.extend(submission(task.as_bytes()));
    requests.extend_from_slice(b"GET /v2/nothing HTTP/1.1\r\n\r\n");
    requests.extend_from_slice(b"nonsense\r\n\r\n");
    raw.send(&requests);
    for status in [200, 202, 404, 400] {
        assert_eq!(raw.answer(false).unwrap().status, status);
    }
    assert!(raw.answer(false).is_none(), "closed after nonsense");
}

#[tokio::test]
async fn huge_and_deep_bodies_are_refused() {
    let daemon = Setup::new(&Script::default())
        .top("tasks", json!({ "max_body_bytes": 300_000 }))
        .top("limits", json!({ "max_prompt_bytes": 2000 }))
        .ready()
        .await;
    let deep = "[".repeat(100_000);
    let stops: Vec<String> = (0..10_000).map(|n| n.to_string()).collect();
    let long = "x".repeat(100_000);
    let messages = vec![json!({ "role": "user", "content": "x".repeat(100) }); 30];
    for (what, body, status) in [
        ("deep", deep.clone(), 400),
        (
            "deep schema",
            format!(r#"{{"prompt":"a","json_schema":{deep}"#),
            400,
        ),
        (
            "stops",
            json!({ "prompt": "a", "stop": stops }).to_string(),
            400,
        ),
        (
            "grammar",
            json!({ "prompt": "a", "grammar": long }).to_string(),
            400,
        ),
        (
            "schema",
            json!({ "prompt": "a", "json_schema": [long] }).to_string(),
            400,
        ),
        ("prompt", json!({ "prompt": long }).to_string(), 400),
        ("messages", json!({ "messages": messages }).to_string(), 400),
        (
            "body",
            json!({ "prompt": "x".repeat(299_990) }).to_string(),
            413,
        ),
    ] {
        let answer = ask(&daemon.url, &submission(body.as_bytes()));
        assert_eq!(answer.status, status, "{what}");
        assert_eq!(code(&answer), "INVALID_PARAMS", "{what}");
    }
    // Far more than the kernel takes in before the answer is there: whoever
    // sends it is heard out for a while, and so gets to the answer.
    let mut raw = Raw::connect(&daemon.url);
    assert!(raw.send(&submission(&vec![b' '; 8_000_000])), "cut off");
    assert_eq!(raw.answer(false).unwrap().status, 413);
    a_task_completes(&daemon).await;
}

#[tokio::test]
async fn slow_senders_are_told_and_let_go() {
    let limits = json!({ "header_seconds": 1, "body_stall_seconds": 1, "body_seconds": 2, "idle_seconds": 1 });
    let daemon = Setup::new(&Script::default())
        .top("limits", limits)
        .ready()
        .await;
    let before = Footprint::of(&daemon);
    let url = daemon.url.clone();
    let clients = tokio::task::spawn_blocking(move || {
        let connect = |bytes: &[u8]| {
            let mut raw = Raw::connect(&url);
            raw.send(bytes);
            raw
        };
        let half_a_head = connect(b"GET /health HTTP/1.1\r\nHost: loc");
        let half_a_body = connect(b"POST /v2/tasks HTTP/1.1\r\nContent-Length: 100\r\n\r\n{");
        let no_word = connect(b"");
        let mut idle = connect(GET);
        // Bytes that keep trickling in put no limit off.
        let head = trickle(connect(b"GET /health HTTP/1.1\r\nX: "), b"y");
        let body = trickle(
            connect(b"POST /v2/tasks HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"),
            b" ",
        );
        for mut slow in [half_a_head, half_a_body] {
            let answer = slow.answer(false).unwrap();
            assert_eq!(answer.status, 408);
            assert_eq!(answer.json()["error"]["retriable"], true);
            slow.until_closed();
        }
        no_word.until_closed();
        assert_eq!(idle.answer(false).unwrap().status, 200);
        assert!(
            idle.answer(false).is_none(),
            "an idle connection is closed without a word"
        );
        for (mut slow, sent) in [head, body].map(|slow| slow.join().unwrap()) {
            if let Some(answer) = slow.answer(false) {
                assert_eq!(answer.status, 408);
            }
            assert!(sent < Duration::from_secs(30), "{sent:?}");
        }
    });
    clients.await.unwrap();
    until_descriptors_are_back(&daemon, before).await;
    a_task_completes(&daemon).await;
}

/// Sends a byte every 100 ms until the daemon closes the connection, and says
/// for how long.
fn trickle(mut raw: Raw, byte: &'static [u8]) -> std::thread::JoinHandle<(Raw, Duration)> {
    std::thread::spawn(move || {
        let begun = std::time::Instant::now();
        while begun.elapsed() < Duration::from_secs(40) && raw.send(byte) {
            std::thread::sleep(Duration::from_millis(100));
        }
        (raw, begun.elapsed())
    })
}

#[tokio::test]
async fn connections_beyond_the_limit_are_answered_and_closed() {
    let daemon = Setup::new(&Script::default())
        .top("limits", json!({ "connections": 8 }))
        .ready()
        .await;
    let url = daemon.url.clone();
    // The test's own client keeps one or two of the eight.
    let clients = tokio::task::spawn_blocking(move || {
        let open: Vec<Raw> = (0..8).map(|_| Raw::connect(&url)).collect();
        let answer = ask(&url, GET);
        assert_eq!(answer.status, 503);
        assert_eq!(answer.json()["error"]["policy_label"], "connections");
        assert_eq!(answer.header("retry-after"), Some("1"));
        drop(open);
    });
    clients.await.unwrap();
    let url = daemon.url.clone();
    daemon
        .until("there is room again", async || {
            (ask(&url, GET).status == 200).then_some(())
        })
        .await;
}

#[tokio::test]
async fn a_daemon_without_descriptors_waits_and_goes_on() {
    const DESCRIPTORS: u32 = 64;
    let daemon = Setup::new(&Script::default())
        .descriptors(DESCRIPTORS)
        .ready()
        .await;
    let before = Footprint::of(&daemon);
    let url = daemon.url.clone();
    let open = tokio::task::spawn_blocking(move || {
        // Those beyond the limit wait in the listener's queue.
        (0..DESCRIPTORS)
            .map(|_| Raw::connect(&url))
            .collect::<Vec<_>>()
    });
    let open = open.await.unwrap();
    daemon
        .until("it says so", async || {
            daemon
                .log()
                .contains("no connection can be accepted")
                .then_some(())
        })
        .await;
    // A loop that tries without a pause would take all of this second.
    let worked = || Footprint::of(&daemon).ticks;
    let worked_before = worked();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let worked = worked() - worked_before;
    assert!(worked < 30, "{worked} ticks of 10 ms");
    drop(open);
    until_descriptors_are_back(&daemon, before).await;
    a_task_completes(&daemon).await;
    let said = daemon
        .log()
        .matches("no connection can be accepted")
        .count();
    assert!(said < 10, "said {said} times");
}
