//! The bearer token: with one configured, every route but `/health` wants it.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use llama_orch_types::ErrorCode;
use subtle::ConstantTimeEq;

use super::error::ApiError;
use crate::app::config::Token;
use crate::app::state::AppState;
use crate::services::event_log::Failure;

pub async fn require_token(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    let open = request.uri().path() == "/health";
    match &state.token {
        Some(token) if !open && !carries(request.headers(), token) => refused().into_response(),
        _ => next.run(request).await,
    }
}

/// Compared in constant time, so that the time of the answer tells nothing
/// about the token but its length.
fn carries(headers: &HeaderMap, token: &Token) -> bool {
    let given = headers
        .get(AUTHORIZATION)
        .map(axum::http::HeaderValue::as_bytes);
    let Some((scheme, word)) = given.and_then(|value| value.split_at_checked(7)) else {
        return false;
    };
    scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(word.trim_ascii().ct_eq(token.as_bytes()))
}

fn refused() -> ApiError {
    Failure::new(
        ErrorCode::Unauthorized,
        "the bearer token is missing or wrong",
    )
    .with_hint("send the header `Authorization: Bearer <token>`")
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_itself_opens() {
        let token = Token::try_from("right".to_owned()).unwrap();
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(AUTHORIZATION, value.parse().unwrap());
            carries(&headers, &token)
        };
        assert!(with("Bearer right"));
        assert!(with("bearer right"));
        for wrong in [
            "Bearer wrong",
            "Bearer righ",
            "Bearer rightt",
            "Bearer ",
            "Basic right",
            "right",
            "",
        ] {
            assert!(!with(wrong), "{wrong}");
        }
        assert!(!carries(&HeaderMap::new(), &token));
    }
}
