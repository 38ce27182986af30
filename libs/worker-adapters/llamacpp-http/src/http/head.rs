//! Heads: the request's as it is sent, the answer's as far as it matters.

use std::fmt;
use std::net::IpAddr;

use bytes::{Buf, BytesMut};
use httparse::{EMPTY_HEADER, Response, Status};
use reqwest::Url;
use reqwest::header::HeaderValue;

use super::HttpError;
use super::body::Framing;

/// The longest head of an answer, in bytes.
const HEAD_LIMIT: usize = 64 << 10;
/// The most header fields that an answer may have.
const HEADER_FIELDS: usize = 100;

/// Where requests go, and what they all say.
#[derive(Clone)]
pub(crate) struct Target {
    pub(super) host: String,
    pub(super) port: u16,
    /// What comes before every path.
    prefix: String,
    /// The header fields that are the same each time; they may hold the key.
    fields: Vec<u8>,
    /// See `AdapterSettings::delayed_acks`.
    pub(super) delayed_acks: bool,
}

impl fmt::Debug for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Target")
            .field("host", &self.host)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

impl Target {
    /// `None` for an address that takes more than plain HTTP: TLS, a user's name, or a
    /// host of several addresses, of which one may be dead.
    pub(crate) fn of(base_url: &str, bearer: Option<&HeaderValue>) -> Option<Self> {
        let url = Url::parse(base_url).ok()?;
        let plain = url.scheme() == "http"
            && url.username().is_empty()
            && url.password().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        let (host, port) = (url.host_str()?, url.port_or_known_default()?);
        // The brackets of an IPv6 address belong to the URL.
        let bare = host.trim_matches(['[', ']']);
        let one_address = bare == "localhost" || bare.parse::<IpAddr>().is_ok();
        if !plain || !one_address {
            return None;
        }
        let port_given = url
            .port()
            .map_or_else(String::new, |port| format!(":{port}"));
        let mut fields = format!("host: {host}{port_given}");
        fields += "\r\naccept: */*\r\ncontent-type: application/json\r\nconnection: close\r\n";
        let mut fields = fields.into_bytes();
        if let Some(bearer) = bearer {
            fields.extend_from_slice(b"authorization: ");
            fields.extend_from_slice(bearer.as_bytes());
            fields.extend_from_slice(b"\r\n");
        }
        Some(Self {
            host: bare.to_owned(),
            port,
            prefix: url.path().trim_end_matches('/').to_owned(),
            fields,
            delayed_acks: false,
        })
    }

    pub(crate) fn with_delayed_acks(self, delayed_acks: bool) -> Self {
        Self {
            delayed_acks,
            ..self
        }
    }

    /// The head of a `POST` with a body of so many bytes.
    pub(super) fn request(&self, path: &str, length: usize) -> Vec<u8> {
        let prefix = &self.prefix;
        let mut head = format!("POST {prefix}{path} HTTP/1.1\r\ncontent-length: {length}\r\n");
        head.reserve(self.fields.len() + 2);
        let mut head = head.into_bytes();
        head.extend_from_slice(&self.fields);
        head.extend_from_slice(b"\r\n");
        head
    }
}

/// What an answer begins with, as far as it matters.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: u16,
    pub(super) framing: Framing,
}

impl Head {
    /// Takes a head off the buffer's front; `None` while it is not whole. Those that
    /// only announce another are passed over.
    pub(super) fn take(buffer: &mut BytesMut) -> Result<Option<Self>, HttpError> {
        loop {
            let mut fields = [EMPTY_HEADER; HEADER_FIELDS];
            let mut response = Response::new(&mut fields);
            let limited = &buffer[..buffer.len().min(HEAD_LIMIT)];
            let length = match response.parse(limited).map_err(HttpError::Head)? {
                Status::Complete(length) => length,
                Status::Partial if buffer.len() >= HEAD_LIMIT => {
                    return Err(HttpError::HeadTooLong { limit: HEAD_LIMIT });
                }
                Status::Partial => return Ok(None),
            };
            let status = response.code.unwrap_or_default();
            let framing = framing(status, response.headers)?;
            buffer.advance(length);
            if !(100..200).contains(&status) {
                return Ok(Some(Self { status, framing }));
            }
        }
    }
}

/// How the end of an answer's body is told.
fn framing(status: u16, fields: &[httparse::Header<'_>]) -> Result<Framing, HttpError> {
    if matches!(status, 100..200 | 204 | 304) {
        return Ok(Framing::length(0));
    }
    let values = |name: &'static str| {
        let of_name = fields
            .iter()
            .filter(move |field| field.name.eq_ignore_ascii_case(name));
        of_name.flat_map(|field| field.value.split(|&byte| byte == b','))
    };
    if let Some(coding) = values("transfer-encoding").last() {
        let chunked = coding.trim_ascii().eq_ignore_ascii_case(b"chunked");
        return Ok(if chunked {
            Framing::chunked()
        } else {
            Framing::to_end()
        });
    }
    let mut length = None;
    for value in values("content-length") {
        let value = decimal(value.trim_ascii()).ok_or(HttpError::Length)?;
        if *length.get_or_insert(value) != value {
            return Err(HttpError::Length);
        }
    }
    Ok(length.map_or_else(Framing::to_end, Framing::length))
}

fn decimal(digits: &[u8]) -> Option<u64> {
    let digits = std::str::from_utf8(digits).ok()?;
    // A sign is no digit.
    let plain = digits.bytes().all(|digit| digit.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(head: &str) -> Result<Option<Head>, HttpError> {
        Head::take(&mut BytesMut::from(head))
    }

    fn framing_of(fields: &str) -> Result<Framing, HttpError> {
        let head = take(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n"))?;
        Ok(head.expect("it is whole").framing)
    }

    #[test]
    fn the_end_of_a_body_is_told_as_http_has_it() {
        assert_eq!(framing_of("").unwrap(), Framing::to_end());
        let chunked = "Content-Length: 5\r\ntransfer-encoding: gzip, Chunked\r\n";
        assert_eq!(framing_of(chunked).unwrap(), Framing::chunked());
        let other = framing_of("Transfer-Encoding: gzip\r\n").unwrap();
        assert_eq!(other, Framing::to_end());
        let twice = framing_of("Content-Length: 5\r\ncontent-length: 5\r\n").unwrap();
        assert_eq!(twice, Framing::length(5));
        for bad in ["5, 6", "+5", "x", "", "99999999999999999999"] {
            let error = framing_of(&format!("Content-Length: {bad}\r\n")).unwrap_err();
            assert!(matches!(error, HttpError::Length), "{bad}");
        }
        let empty = take("HTTP/1.1 204 No Content\r\n\r\n").unwrap().unwrap();
        assert_eq!((empty.status, empty.framing), (204, Framing::length(0)));
    }

    #[test]
    fn heads_that_announce_another_are_passed_over() {
        let mut buffer = BytesMut::from(
            "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 No\r\nContent-Length: 1\r\n\r\nx",
        );
        let head = Head::take(&mut buffer).unwrap().unwrap();
        assert_eq!((head.status, head.framing), (503, Framing::length(1)));
        assert_eq!(&buffer[..], b"x");
    }

    #[test]
    fn a_head_is_bounded_and_must_be_http() {
        assert!(take("HTTP/1.1 200 OK\r\nA: b\r\n").unwrap().is_none());
        let long = format!("HTTP/1.1 200 OK\r\nA: {}", "b".repeat(HEAD_LIMIT));
        let error = take(&long).unwrap_err();
        assert!(matches!(error, HttpError::HeadTooLong { .. }), "{error}");
        let error = take("SSH-2.0-x\r\n").unwrap_err();
        assert!(matches!(error, HttpError::Head(_)), "{error}");
    }

    #[test]
    fn a_request_says_what_it_must_and_its_key_is_never_shown() {
        let bearer = HeaderValue::from_static("Bearer sesame");
        let target = Target::of("http://[::1]:81/base/", Some(&bearer)).unwrap();
        assert_eq!((target.host.as_str(), target.port), ("::1", 81));
        assert!(!format!("{target:?}").contains("sesame"));
        let head = String::from_utf8(target.request("/completion", 7)).unwrap();
        let expected = "POST /base/completion HTTP/1.1\r\ncontent-length: 7\r\nhost: [::1]:81\r\n\
            accept: */*\r\ncontent-type: application/json\r\nconnection: close\r\n\
            authorization: Bearer sesame\r\n\r\n";
        assert_eq!(head, expected);
        let usual = Target::of("http://localhost", None).unwrap();
        assert_eq!((usual.port, usual.prefix.as_str()), (80, ""));
        for other in [
            "http://engine.example",
            "https://localhost",
            "http://a:b@localhost",
            "localhost:80",
        ] {
            assert!(Target::of(other, None).is_none(), "{other}");
        }
    }
}
