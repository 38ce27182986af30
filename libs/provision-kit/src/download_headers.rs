//! What a server's headers say about a file, and what of it is kept.

use std::path::Path;
use std::time::Duration;

use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RETRY_AFTER};

use crate::part::{Sidecar, sidecar};

pub(crate) fn stored_etag(part: &Path) -> Option<HeaderValue> {
    let bytes = std::fs::read(sidecar(part, Sidecar::Etag)).ok()?;
    HeaderValue::from_bytes(&bytes).ok()
}

#[derive(Debug, PartialEq)]
pub(crate) struct ContentRange {
    pub(crate) start: Option<u64>,
    pub(crate) total: Option<u64>,
}

/// Reads `bytes 5-9/10`, `bytes 5-9/*` and `bytes */10`.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    Some(ContentRange {
        start: range
            .split_once('-')
            .and_then(|(start, _)| start.trim().parse().ok()),
        total: total.trim().parse().ok(),
    })
}

/// `Retry-After` in seconds; its form as a date is not looked at.
pub(crate) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    Some(Duration::from_secs(seconds))
}

/// A URL fit for messages: without user, password and query, which may hold
/// secrets.
pub fn display_url(url: &str) -> String {
    match reqwest::Url::parse(url) {
        Ok(mut parsed) => {
            // Fails only for URLs that cannot carry a user at all.
            let _ = parsed.set_username("");
            let _ = parsed.set_password(None);
            let had_query = parsed.query().is_some();
            parsed.set_query(None);
            parsed.set_fragment(None);
            if had_query {
                format!("{parsed}?…")
            } else {
                parsed.to_string()
            }
        }
        Err(_) => url.split(['?', '#']).next().unwrap_or_default().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> Option<ContentRange> {
        let text = HeaderValue::from_str(text).unwrap();
        content_range(&HeaderMap::from_iter([(CONTENT_RANGE, text)]))
    }

    #[test]
    fn ranges() {
        let of = |start, total| Some(ContentRange { start, total });
        assert_eq!(range("bytes 5-9/10"), of(Some(5), Some(10)));
        assert_eq!(range("bytes 5-9/*"), of(Some(5), None));
        assert_eq!(range("bytes */10"), of(None, Some(10)));
        assert_eq!(range("lines 5-9/10"), None);
        assert_eq!(range("bytes 5"), None);
    }

    #[test]
    fn a_displayed_address_holds_no_secret() {
        assert_eq!(
            display_url("https://u:p@host/a?sig=x#y"),
            "https://host/a?…"
        );
        assert_eq!(display_url("https://host/a"), "https://host/a");
        assert_eq!(display_url("no address?x"), "no address");
    }
}
