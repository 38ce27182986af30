//! `X-Correlation-Id`: taken from the request or made, put on every answer,
//! and written into every error body.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use uuid::Uuid;

use super::error::{ApiError, ErrorBody};

pub const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
pub const BACKOFF_MS: HeaderName = HeaderName::from_static("x-backoff-ms");

/// Longest id taken from a client, in bytes.
const MAX_LEN: usize = 128;

/// A request's correlation id, for handlers.
#[derive(Debug, Clone)]
pub struct CorrelationId(pub Arc<str>);

/// The client's id if it is short and visible, else a new one: what a client
/// sends ends up in logs, and must not be able to forge a line there.
fn take_or_make(headers: &HeaderMap) -> Arc<str> {
    let given = headers
        .get(&CORRELATION_ID)
        .and_then(|value| value.to_str().ok());
    let usable = |id: &&str| {
        !id.is_empty() && id.len() <= MAX_LEN && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    given
        .filter(usable)
        .map_or_else(|| Uuid::new_v4().to_string().into(), Into::into)
}

/// Outermost layer: every answer passes through it, whoever made it.
pub async fn correlate(mut request: Request, next: Next) -> Response {
    let id = take_or_make(request.headers());
    request
        .extensions_mut()
        .insert(CorrelationId(Arc::clone(&id)));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        log_error(&method, &path, &id, &error);
        response = with_body(response, error, &id);
    }
    // Checked above to be visible ASCII, or made by us.
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(CORRELATION_ID, value);
    }
    response
}

fn log_error(method: &axum::http::Method, path: &str, id: &str, error: &ApiError) {
    let (status, code, message) = (
        error.status.as_u16(),
        error.failure.code,
        &error.failure.message,
    );
    if error.status.is_server_error() {
        tracing::warn!(%method, path, correlation_id = id, status, %code, reason = ?message, "request failed");
    } else {
        tracing::debug!(%method, path, correlation_id = id, status, %code, reason = ?message, "request refused");
    }
}

fn with_body(mut response: Response, error: ApiError, id: &str) -> Response {
    let mut failure = error.failure;
    failure.correlation_id = Some(id.to_owned());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if let Some(after) = failure.retry_after_ms {
        // Retry-After counts whole seconds; rounded up, so that nobody comes
        // back too early.
        headers.insert(RETRY_AFTER, HeaderValue::from(after.div_ceil(1000)));
        headers.insert(BACKOFF_MS, HeaderValue::from(after));
    }
    if error.status == StatusCode::UNAUTHORIZED {
        headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    }
    // A Failure is strings and numbers, which JSON always holds.
    let body = serde_json::to_vec(&ErrorBody { error: failure }).unwrap_or_default();
    *response.body_mut() = Body::from(body);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_for(given: &[u8]) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(CORRELATION_ID, HeaderValue::from_bytes(given).unwrap());
        take_or_make(&headers).to_string()
    }

    #[test]
    fn a_plain_id_is_kept_and_any_other_replaced() {
        assert_eq!(id_for(b"abc-123"), "abc-123");
        for bad in [&b""[..], b"a b", b"\xff", "x".repeat(129).as_bytes()] {
            let made = id_for(bad);
            assert!(Uuid::parse_str(&made).is_ok(), "{made}");
        }
    }
}
