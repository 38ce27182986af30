//! The bearer token: with one configured, every route but `/health` wants it, as
//! `Authorization: Bearer` or, as Anthropic's clients send it, as `x-api-key`.

use std::net::IpAddr;

use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, HeaderName, StatusCode, Uri};
use llama_orch_types::ErrorCode;
use subtle::ConstantTimeEq;

use super::error::ApiError;
use crate::app::config::Token;
use crate::app::state::AppState;
use crate::services::event_log::Failure;

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Whether a request may be served.
pub fn check(state: &AppState, request: &Request) -> Result<(), ApiError> {
    let open = request.uri().path() == "/health";
    // The one in force now: it can change by a reload.
    let token = state.token.get();
    match token.as_ref() {
        Some(token) if !open && !carries(request.headers(), token) => Err(refused()),
        None if !open && !from_this_machine(request.uri(), request.headers()) => Err(foreign()),
        _ => Ok(()),
    }
}

/// Whether a request without a token can be trusted to come from a program of
/// this machine. A web page in a browser here could also send one: its `Origin`
/// gives it away, and under a name of its own that leads here, its `Host`.
fn from_this_machine(target: &Uri, headers: &HeaderMap) -> bool {
    let all = |name, fits: fn(&str) -> bool| {
        let mut values = headers.get_all(name).iter();
        values.all(|value| fits(value.to_str().unwrap_or_default()))
    };
    let named_origin = |origin: &str| {
        let authority = origin.split_once("://").map(|(_, authority)| authority);
        authority.is_some_and(is_loopback)
    };
    let target = target
        .authority()
        .is_none_or(|authority| is_loopback(authority.as_str()));
    target && all(HOST, is_loopback) && all(ORIGIN, named_origin)
}

/// Whether `host` or `host:port` names this machine.
fn is_loopback(authority: &str) -> bool {
    let host = match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => authority,
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

fn foreign() -> ApiError {
    let failure = Failure::new(
        ErrorCode::Unauthorized,
        "without a token only programs of this machine are served, and this request is a web page's or names another host",
    )
    .with_hint("use http://127.0.0.1, or set a token with `auth.token_file`");
    ApiError::from(failure).with_status(StatusCode::FORBIDDEN)
}

/// Either header will do: a client's library may send both, one with a word of its
/// own choice.
fn carries(headers: &HeaderMap, token: &Token) -> bool {
    let bearer = only(headers, &AUTHORIZATION)
        .and_then(|value| value.split_at_checked(7))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"bearer "))
        .map(|(_, word)| word);
    [bearer, only(headers, &API_KEY)]
        .into_iter()
        .flatten()
        .any(|word| is_token(word, token))
}

/// A header's value, if there is exactly one: with two, whoever stands between may
/// have looked at the other one.
fn only<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a [u8]> {
    let mut all = headers.get_all(name).iter();
    let value = all.next()?.as_bytes();
    all.next().is_none().then_some(value)
}

/// Compared in constant time, so that the time of the answer tells nothing
/// about the token but its length.
fn is_token(word: &[u8], token: &Token) -> bool {
    bool::from(word.trim_ascii().ct_eq(token.as_bytes()))
}

fn refused() -> ApiError {
    Failure::new(
        ErrorCode::Unauthorized,
        "the bearer token is missing or wrong",
    )
    .with_hint("send the header `Authorization: Bearer <token>`, or `x-api-key: <token>`")
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_web_page_is_not_a_program_of_this_machine() {
        let with = |pairs: &[(axum::http::HeaderName, &str)]| {
            let headers = pairs
                .iter()
                .map(|(name, value)| (name.clone(), value.parse().unwrap()));
            let mut all = HeaderMap::new();
            for (name, value) in headers {
                all.append(name, value);
            }
            from_this_machine(&Uri::from_static("/v2/pools"), &all)
        };
        assert!(with(&[]));
        for host in [
            "127.0.0.1:8080",
            "localhost:8080",
            "LOCALHOST",
            "[::1]:8080",
            "127.0.0.9",
        ] {
            assert!(with(&[(HOST, host)]), "{host}");
        }
        assert!(!with(&[(HOST, "localhost"), (HOST, "evil.example")]));
        let target = Uri::from_static("http://evil.example/v2/pools");
        assert!(!from_this_machine(&target, &HeaderMap::new()));
        assert!(with(&[
            (HOST, "localhost:1"),
            (ORIGIN, "http://localhost:3000")
        ]));
        for host in [
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:8080",
            "10.0.0.1",
        ] {
            assert!(!with(&[(HOST, host)]), "{host}");
        }
        for origin in [
            "http://evil.example",
            "null",
            "http://127.0.0.1.evil.example",
        ] {
            assert!(!with(&[(HOST, "localhost"), (ORIGIN, origin)]), "{origin}");
        }
    }

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
        let mut two = HeaderMap::new();
        two.append(AUTHORIZATION, "Bearer right".parse().unwrap());
        two.append(AUTHORIZATION, "Bearer wrong".parse().unwrap());
        assert!(!carries(&two, &token), "which of them counts?");
    }

    #[test]
    fn the_token_opens_as_an_api_key_too() {
        let token = Token::try_from("right".to_owned()).unwrap();
        let with = |pairs: &[(HeaderName, &str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in pairs {
                headers.append(name, value.parse().unwrap());
            }
            carries(&headers, &token)
        };
        assert!(with(&[(API_KEY, "right")]));
        assert!(with(&[(API_KEY, "dummy"), (AUTHORIZATION, "Bearer right")]));
        assert!(with(&[(API_KEY, "right"), (AUTHORIZATION, "Bearer dummy")]));
        assert!(!with(&[(API_KEY, "wrong")]));
        assert!(!with(&[(API_KEY, "Bearer right")]));
        assert!(!with(&[(API_KEY, "right"), (API_KEY, "wrong")]));
        assert!(!with(&[
            (API_KEY, "wrong"),
            (AUTHORIZATION, "Bearer wrong")
        ]));
    }
}
