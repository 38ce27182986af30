//! The token is never shown, wherever a client puts it.

use test_harness_fake_engine::Script;

use crate::raw::{Raw, ask};
use crate::support::Setup;

const TOKEN: &str = "s3cret-T0ken-0123456789";
const WRONG: &str = "wr0ng-T0ken-9876543210";

/// Request lines, headers and bodies; `{T}` stands for the token, `{W}` for a
/// wrong one.
const REQUESTS: &[&str] = &[
    "GET /v2/pools?token={T} HTTP/1.1\r\n\r\n",
    "GET /v2/pools?token={T} HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /v2/pools/{T} HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /{T}/x HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /v2/tasks/{T} HTTP/1.1\r\nAuthorization: Bearer {W}\r\n\r\n",
    "GET /v2/tasks/{T} HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /v2/tasks/a/events?{T} HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "DELETE /v2/tasks/{T} HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "{T} /v2/tasks HTTP/1.1\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\nAuthorization: {T}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\nAuthorization: Bearer {T}{T}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\nAuthorization: Bearer {W}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\nAuthorization: Bearer {T}\r\nAuthorization: Bearer {W}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\nX-Correlation-Id: {T}\r\n\r\n",
    "GET http://{T}@localhost/v2/pools HTTP/1.1\r\n\r\n",
    "GET /v2/pools HTTP/1.1{T}\r\nAuthorization: Bearer {T}\r\n\r\n",
    "GET /v2/pools HTTP/1.1\r\n{T}\r\n\r\n",
    "POST /v2/tasks HTTP/1.1\r\nAuthorization: Bearer {T}\r\nContent-Length: 49\r\n\r\n{\"prompt\": \"a\", \"pool_id\": \"{T}\"}",
    "POST /v2/tasks HTTP/1.1\r\nAuthorization: Bearer {T}\r\nContent-Length: 31\r\n\r\n{\"{T}\": 1}",
];

fn filled(request: &str) -> Vec<u8> {
    let request = request.replace("{T}", TOKEN).replace("{W}", WRONG);
    request.into_bytes()
}

#[tokio::test]
async fn no_log_line_and_no_answer_shows_the_token() {
    let daemon = Setup::new(&Script::default())
        .env("ORCHD_TOKEN", TOKEN)
        .env("RUST_LOG", "trace")
        .top("limits", serde_json::json!({ "body_stall_seconds": 1 }))
        .start();
    let mut answers = String::new();
    for request in REQUESTS {
        let answer = ask(&daemon.url, &filled(request));
        answers.push_str(&answer.head);
        answers.push_str(&String::from_utf8_lossy(&answer.body));
    }
    let mut broken = Raw::connect(&daemon.url);
    broken.send(&filled(
        "POST /v2/tasks HTTP/1.1\r\nAuthorization: Bearer {T}\r\nContent-Length: 99\r\n\r\n{T}",
    ));
    drop(broken);
    // What is logged of a request is logged before its answer; this one is the
    // last, so all of it has arrived when its line has.
    let last = "GET /x HTTP/1.1\r\nX-Correlation-Id: the-last\r\nAuthorization: Bearer {T}\r\n\r\n";
    ask(&daemon.url, &filled(last));
    daemon
        .until("the log is whole", async || {
            daemon.log().contains("the-last").then_some(())
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

#[tokio::test]
async fn no_log_line_and_no_answer_shows_what_signs_a_models_address() {
    const SIGNATURE: &str = "a-signature";
    // Longer than what is repeated of a client's text.
    let rest = "x".repeat(120);
    let model = |signature| format!("https://127.0.0.1:1/model.gguf?sig={signature}&{rest}");
    let daemon = Setup::new(&Script::default())
        .pool("model", model(SIGNATURE))
        .start();
    daemon.rewrite_config(|config| {
        config["pools"]["default"]["model"] = model("a-signature-too").into();
    });
    let plan = daemon.beside(&["reload", "--dry-run"]);
    assert!(plan.status.success());
    let mut answers = String::from_utf8(plan.stdout).unwrap();
    assert!(answers.contains("pool default: reloaded: model https://127.0.0.1:1/model.gguf?…"));
    for path in [
        "/v2/pools",
        "/v2/pools/default",
        "/v2/meta/capabilities",
        "/metrics",
    ] {
        answers.push_str(&daemon.get(path).await.text().await.unwrap());
    }
    let other = serde_json::json!({ "prompt": "a", "model": "other" });
    let unknown = daemon.post("/v2/tasks", other).await;
    assert_eq!(unknown.status(), 404);
    answers.push_str(&unknown.text().await.unwrap());
    assert!(!answers.contains(SIGNATURE), "{answers}");
    assert!(!daemon.log().contains(SIGNATURE));
    // Who knows the address may name it.
    let task = serde_json::json!({ "prompt": "a", "model": model(SIGNATURE) });
    assert_eq!(daemon.post("/v2/tasks", task).await.status(), 202);
}
