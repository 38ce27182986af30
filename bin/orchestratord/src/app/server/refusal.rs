//! Answers to what never becomes a request, in the one error shape.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode};
use llama_orch_types::ErrorCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::api::correlation::{self, CORRELATION_ID};
use crate::api::dialect::Dialect;
use crate::api::error::ApiError;
use crate::services::event_log::Failure;

/// Bounds what a connection that is turned away may take.
const TURN_AWAY_LIMIT: Duration = Duration::from_secs(1);

/// When a client that was turned away shall come back.
const COME_BACK: Duration = Duration::from_secs(1);

/// The answer that stands for hyper's own; `None` if these bytes are none of
/// those. It cannot be mistaken for a part of an answer of ours: no JSON text
/// and no event of a stream holds a raw CR LF after such words.
pub(super) fn instead_of(bytes: &[u8]) -> Option<Vec<u8>> {
    const KNOWN: &[(&[u8], StatusCode)] = &[
        (b" 400 Bad Request\r\n", StatusCode::BAD_REQUEST),
        (b" 414 URI Too Long\r\n", StatusCode::URI_TOO_LONG),
        (
            b" 431 Request Header Fields Too Large\r\n",
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
        ),
    ];
    let (version, rest) = bytes.split_at_checked(8)?;
    if !version.starts_with(b"HTTP/1.") {
        return None;
    }
    let (_, status) = KNOWN.iter().find(|(line, _)| rest.starts_with(line))?;
    // Every answer of ours has one.
    let name = CORRELATION_ID;
    let ours = name.as_str().as_bytes();
    if rest.windows(ours.len()).any(|window| window == ours) {
        return None;
    }
    let (message, hint) = match *status {
        StatusCode::URI_TOO_LONG => ("the request's target is too long", None),
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE => (
            "the request's head has too many headers or bytes",
            Some("see `limits.headers` and `limits.header_bytes`"),
        ),
        _ => ("this is no HTTP/1.1 request", None),
    };
    let mut error = ApiError::invalid(message).with_status(*status);
    error.failure.hint = hint.map(str::to_owned);
    Some(rendered(error))
}

/// For a head that did not come in time.
pub(super) fn slow_head(limit: Duration) -> Vec<u8> {
    let message = format!(
        "the request's head was not complete after {} s",
        limit.as_secs()
    );
    let mut error = ApiError::invalid(message).with_status(StatusCode::REQUEST_TIMEOUT);
    error.failure.retriable = true;
    error.failure.hint = Some("see `limits.header_seconds`".to_owned());
    rendered(error)
}

fn too_many_connections() -> ApiError {
    let mut failure = Failure::new(
        ErrorCode::AdmissionReject,
        "there are as many connections as there may be",
    )
    .retry_after(COME_BACK)
    .with_hint("close some, or raise `limits.connections`");
    failure.policy_label = Some("connections".to_owned());
    ApiError::from(failure).with_status(StatusCode::SERVICE_UNAVAILABLE)
}

/// Answers a connection for which there is no room, and closes it. What the
/// client sent is read, since closing a connection with unread bytes would
/// take the answer away from it.
pub(super) async fn turn_away(mut stream: TcpStream, peer: SocketAddr) {
    tracing::debug!(%peer, "turned away: `limits.connections` are open");
    let answer = rendered(too_many_connections());
    let all = async {
        stream.write_all(&answer).await?;
        stream.shutdown().await?;
        let mut taken = 0;
        let mut sink = [0; 4096];
        while taken < 64 * 1024 {
            match stream.read(&mut sink).await? {
                0 => break,
                count => taken += count,
            }
        }
        std::io::Result::Ok(())
    };
    // An error only says that the client is gone.
    let _ = tokio::time::timeout(TURN_AWAY_LIMIT, all).await;
}

/// A whole HTTP answer that closes the connection.
fn rendered(error: ApiError) -> Vec<u8> {
    let id = correlation::new_id();
    tracing::debug!(
        correlation_id = id,
        status = error.status.as_u16(),
        reason = ?error.failure.message,
        "connection refused"
    );
    let status = error.status;
    let mut headers = HeaderMap::new();
    // Which API was to be asked is not known.
    let body = correlation::error_parts(&mut headers, error, Dialect::Native, &id);
    let mut out = Vec::with_capacity(512);
    // Writing to a Vec cannot fail.
    let _ = write!(out, "HTTP/1.1 {status}\r\n");
    for (name, value) in &headers {
        let _ = write!(out, "{name}: ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
    let _ = write!(
        out,
        "content-length: {}\r\nconnection: close\r\n{CORRELATION_ID}: {id}\r\n\r\n",
        body.len()
    );
    out.extend_from_slice(&body);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_hyper_answers_by_itself_is_replaced() {
        let hypers = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";
        let ours = instead_of(hypers).unwrap();
        assert!(ours.starts_with(b"HTTP/1.1 431 "));
        assert_eq!(instead_of(&ours), None, "what is ours is not replaced");
        for other in [
            &b""[..],
            b"HTTP/1.1",
            b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
            b"HTTP/1.1 400 Bad Request\",\"i\":1}\n\n\r\n0\r\n\r\n",
        ] {
            assert_eq!(instead_of(other), None);
        }
    }

    #[test]
    fn a_refusal_has_the_one_shape() {
        let text = String::from_utf8(slow_head(Duration::from_secs(3))).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.starts_with("HTTP/1.1 408 Request Timeout\r\n"),
            "{head}"
        );
        assert!(head.contains(&format!("content-length: {}", body.len())));
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let id = body["error"]["correlation_id"].as_str().unwrap();
        assert!(head.contains(&format!("x-correlation-id: {id}")));
        assert_eq!(body["error"]["code"], "INVALID_PARAMS");
    }
}
