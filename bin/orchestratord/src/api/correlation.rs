//! `X-Correlation-Id`: taken from the request or made, put on every answer,
//! and written into every error body, whatever API's shape that has.
//!
//! Here is also where it is seen to that the token is never shown: not in the
//! log, and not in an error that repeats what the client sent.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::Response;
use uuid::Uuid;

use super::dialect::Dialect;
use super::error::ApiError;
use super::repeats::Repeats;
use crate::app::config::Token;
use crate::app::state::AppState;

pub const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
pub const BACKOFF_MS: HeaderName = HeaderName::from_static("x-backoff-ms");

/// Longest id taken from a client, in bytes.
const MAX_LEN: usize = 128;

/// A request's correlation id, for handlers.
#[derive(Debug, Clone)]
pub struct CorrelationId(pub Arc<str>);

/// A new id.
pub fn new_id() -> String {
    Uuid::new_v4().to_string()
}

/// The client's id if it is short and visible, else a new one: what a client
/// sends ends up in logs, and must not be able to forge a line there.
fn take_or_make(headers: &HeaderMap, token: Option<&Token>) -> Arc<str> {
    let given = headers
        .get(&CORRELATION_ID)
        .and_then(|value| value.to_str().ok());
    let usable = |id: &&str| {
        !id.is_empty()
            && id.len() <= MAX_LEN
            && id.bytes().all(|byte| byte.is_ascii_graphic())
            && matches!(without_token(id, token), Cow::Borrowed(_))
    };
    given
        .filter(usable)
        .map_or_else(|| new_id().into(), Into::into)
}

/// The text with the token blotted out.
fn without_token<'a>(text: &'a str, token: Option<&Token>) -> Cow<'a, str> {
    /// A shorter token is guessed anyway, and may be a part of any word.
    const SHORTEST: usize = 6;
    let token = token
        .and_then(|token| std::str::from_utf8(token.as_bytes()).ok())
        .filter(|token| token.len() >= SHORTEST && text.contains(token));
    match token {
        Some(token) => Cow::Owned(text.replace(token, "(token)")),
        None => Cow::Borrowed(text),
    }
}

/// Around every answer, whoever made it.
pub async fn correlate(
    state: &AppState,
    mut request: Request,
    answer: impl AsyncFnOnce(Request) -> Response,
) -> Response {
    let held = state.token.get();
    let token = Option::as_ref(&held);
    let id = take_or_make(request.headers(), token);
    request
        .extensions_mut()
        .insert(CorrelationId(Arc::clone(&id)));
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let dialect = Dialect::of(&path);
    let mut response = answer(request).await;
    if let Some(mut error) = response.extensions_mut().remove::<ApiError>() {
        let failure = &mut error.failure;
        failure.message = without_token(&failure.message, token).into_owned();
        failure.hint = failure
            .hint
            .take()
            .map(|hint| without_token(&hint, token).into_owned());
        let method = without_token(method.as_str(), token);
        let path = without_token(without_signature(&path), token);
        log_error(&state.repeats, &method, &path, &id, &error);
        let body = error_parts(response.headers_mut(), error, dialect, &id);
        *response.body_mut() = Body::from(body);
    }
    // Checked above to be visible ASCII, or made by us.
    if let Ok(value) = HeaderValue::from_str(&id) {
        if let Some(name) = dialect.id_header() {
            response.headers_mut().insert(name, value.clone());
        }
        response.headers_mut().insert(CORRELATION_ID, value);
    }
    response
}

/// A path may name a model by its address, whose query may be a signature.
fn without_signature(path: &str) -> &str {
    let query = path.to_ascii_lowercase().find("%3f");
    query.map_or(path, |at| &path[..at])
}

/// What is ours is said aloud, what is the client's only to who looks closely. A
/// pool that takes no tasks is neither's fault, and is not said for every task.
fn log_error(repeats: &Repeats, method: &str, path: &str, id: &str, error: &ApiError) {
    let (status, code, message) = (
        error.status.as_u16(),
        error.failure.code,
        &error.failure.message,
    );
    let pool = error.failure.pool_id.as_deref();
    let told = match error.status {
        StatusCode::SERVICE_UNAVAILABLE => repeats.tell(pool, code, Instant::now()),
        status => status.is_server_error().then_some(0),
    };
    if let Some(not_shown) = told {
        tracing::warn!(method, path, correlation_id = id, status, %code, not_shown, reason = ?message, "request failed");
    } else {
        tracing::debug!(method, path, correlation_id = id, status, %code, reason = ?message, "request refused");
    }
}

/// The body of an error's answer; sets the headers that belong to it.
pub fn error_parts(
    headers: &mut HeaderMap,
    error: ApiError,
    dialect: Dialect,
    id: &str,
) -> Vec<u8> {
    let mut failure = error.failure;
    failure.correlation_id = Some(id.to_owned());
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
    dialect.error_headers(headers, &failure);
    dialect.error_body(error.status, &failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id_for(given: &[u8]) -> String {
        let mut headers = HeaderMap::new();
        headers.insert(CORRELATION_ID, HeaderValue::from_bytes(given).unwrap());
        let token = Token::try_from("s3cret-word".to_owned()).unwrap();
        take_or_make(&headers, Some(&token)).to_string()
    }

    #[test]
    fn a_signature_in_a_path_is_left_out() {
        let path = "/v2/catalog/models/https%3A%2F%2Fhost%2Fm.gguf";
        for query in ["", "%3Fsig%3Dhidden", "%3fsig=hidden%3F"] {
            assert_eq!(without_signature(&format!("{path}{query}")), path);
        }
    }

    #[test]
    fn a_plain_id_is_kept_and_any_other_replaced() {
        assert_eq!(id_for(b"abc-123"), "abc-123");
        for bad in [
            &b""[..],
            b"a b",
            b"\xff",
            "x".repeat(129).as_bytes(),
            b"my-s3cret-word",
        ] {
            let made = id_for(bad);
            assert!(Uuid::parse_str(&made).is_ok(), "{made}");
        }
    }

    #[test]
    fn the_token_is_blotted_out() {
        let token = Token::try_from("s3cret-word".to_owned()).unwrap();
        let text = "no route `/a/s3cret-word/b`";
        assert_eq!(without_token(text, Some(&token)), "no route `/a/(token)/b`");
        assert_eq!(without_token(text, None), text);
        let short = Token::try_from("a".to_owned()).unwrap();
        assert_eq!(without_token(text, Some(&short)), text);
    }
}
