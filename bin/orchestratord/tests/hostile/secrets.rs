//! The token is never shown, wherever a client puts it.

use test_harness_fake_engine::Script;

use crate::raw::{Raw, ask};
use crate::support::Setup;

const TOKEN: &str = "s3cret-T0ken-0123456789";
const WRONG: &str = "wr0ng-T0ken-9876543210";

#[tokio::test]
async fn no_log_line_and_no_answer_shows_the_token() {
    let daemon = Setup::new(&Script::default())
        .env("ORCHD_TOKEN", TOKEN)
        .env("RUST_LOG", "trace")
        .start();
    let mut answers = String::new();
    for (line, header) in [
        (
            format!("GET /v2/pools?token={TOKEN} HTTP/1.1"),
            String::new(),
        ),
        (
            format!("GET /v2/pools?token={TOKEN} HTTP/1.1"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            format!("GET /v2/pools/{TOKEN} HTTP/1.1"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            format!("GET /{TOKEN}/x HTTP/1.1"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            format!("GET /v2/tasks/{TOKEN} HTTP/1.1"),
            format!("Authorization: Bearer {WRONG}"),
        ),
        (
            format!("GET /v2/tasks/a/events?{TOKEN} HTTP/1.1"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            format!("DELETE /v2/tasks/{TOKEN} HTTP/1.1"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            "GET /v2/pools HTTP/1.1".to_owned(),
            format!("Authorization: {TOKEN}"),
        ),
        (
            "GET /v2/pools HTTP/1.1".to_owned(),
            format!("Authorization: Bearer {TOKEN}{TOKEN}"),
        ),
        (
            "GET /v2/pools HTTP/1.1".to_owned(),
            format!("Authorization: Bearer {WRONG}"),
        ),
        (
            "GET /v2/pools HTTP/1.1".to_owned(),
            format!("Authorization: Bearer {TOKEN}\r\nAuthorization: Bearer {WRONG}"),
        ),
        (
            "GET /v2/pools HTTP/1.1".to_owned(),
            format!("X-Correlation-Id: {TOKEN}"),
        ),
        (
            format!("GET http://{TOKEN}@localhost/v2/pools HTTP/1.1"),
            String::new(),
        ),
        (
            format!("GET /v2/pools HTTP/1.1{TOKEN}"),
            format!("Authorization: Bearer {TOKEN}"),
        ),
        (
            format!(
                "POST /v2/tasks HTTP/1.1\r\nContent-Length: {}",
                TOKEN.len() + 15
            ),
            format!("Authorization: Bearer {TOKEN}\r\n\r\n{{\"pool_id\": \"{TOKEN}\""),
        ),
        (
            format!(
                "POST /v2/tasks HTTP/1.1\r\nContent-Length: {}",
                TOKEN.len() + 8
            ),
            format!("Authorization: Bearer {TOKEN}\r\n\r\n{{\"{TOKEN}\": 1}}"),
        ),
    ] {
        let answer = ask(
            &daemon.url,
            format!("{line}\r\n{header}\r\n\r\n").as_bytes(),
        );
        answers.push_str(&answer.head);
        answers.push_str(&String::from_utf8_lossy(&answer.body));
    }
    let mut broken = Raw::connect(&daemon.url);
    broken.send(format!("POST /v2/tasks HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 99\r\n\r\n{TOKEN}").as_bytes());
    drop(broken);
    // What is logged of a request is logged before its answer; this one is the
    // last, so all of it has arrived when its line has.
    let marked = "GET /nothing HTTP/1.1\r\nX-Correlation-Id: the-last-one\r\nAuthorization: Bearer";
    ask(&daemon.url, format!("{marked} {TOKEN}\r\n\r\n").as_bytes());
    daemon
        .until("the log is whole", async || {
            daemon.log().contains("the-last-one").then_some(())
        })
        .await;
    let log = daemon.log();
    assert!(log.contains("request refused"), "nothing was logged at all");
    for secret in [TOKEN, WRONG] {
        assert!(!answers.contains(secret), "{answers}");
        let line = log.lines().find(|line| line.contains(secret));
        assert_eq!(line, None);
    }
}
