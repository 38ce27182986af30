//! A stream of events from the daemon, read as they come.

use std::time::Duration;

use futures::StreamExt;
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde_json::Value;

use super::{ClientError, Daemon};
use crate::api::error::ErrorBody;

/// How long a stream may say nothing: the daemon writes a comment far sooner.
const SILENCE_LIMIT: Duration = Duration::from_mins(1);

/// Longer than any work takes; each silence has a bound of its own.
const WHOLE_LIMIT: Duration = Duration::from_hours(30 * 24);

/// The most bytes that one event may have.
const EVENT_LIMIT: usize = 4 * 1024 * 1024;

/// An open stream.
pub(in crate::cli) struct Events {
    url: String,
    body: futures::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    buffer: Vec<u8>,
}

impl Daemon {
    /// Opens a stream with each token until one is right.
    pub(in crate::cli) async fn events(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Events, ClientError> {
        let tokens = self.tokens.iter().map(Some);
        let none = self.tokens.is_empty().then_some(None);
        for token in tokens.chain(none) {
            let request = self.request(method.clone(), path, token, body);
            let request = request
                .header("accept", "text/event-stream")
                .timeout(WHOLE_LIMIT);
            let response = request.send().await.map_err(|source| self.failed(source))?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED {
                continue;
            }
            if status.is_success() {
                return Ok(Events {
                    url: self.url.clone(),
                    body: response.bytes_stream().boxed(),
                    buffer: Vec::new(),
                });
            }
            let bytes = response.bytes().await;
            let bytes = bytes.map_err(|source| self.failed(source))?;
            let body: ErrorBody =
                serde_json::from_slice(&bytes).map_err(|_| ClientError::Unknown {
                    url: self.url.clone(),
                    status,
                })?;
            return Err(ClientError::Failure(Box::new(body.error)));
        }
        Err(ClientError::Refused {
            url: self.url.clone(),
        })
    }
}

impl Events {
    /// The next event's name and data; `None` at the stream's end.
    pub(in crate::cli) async fn next(&mut self) -> Result<Option<(String, Value)>, ClientError> {
        loop {
            if let Some(block) = take_block(&mut self.buffer) {
                match event(&block) {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            let silent = |_| ClientError::Silent {
                url: self.url.clone(),
            };
            let chunk = tokio::time::timeout(SILENCE_LIMIT, self.body.next()).await;
            let Some(chunk) = chunk.map_err(silent)? else {
                return Ok(None);
            };
            let chunk = chunk.map_err(|source| ClientError::Ask {
                url: self.url.clone(),
                source: source.without_url(),
            })?;
            self.buffer.extend_from_slice(&chunk);
            if self.buffer.len() > EVENT_LIMIT {
                return Err(ClientError::Unknown {
                    url: self.url.clone(),
                    status: StatusCode::OK,
                });
            }
        }
    }
}

/// What stands before the first empty line.
fn take_block(buffer: &mut Vec<u8>) -> Option<String> {
    let end = buffer.windows(2).position(|pair| pair == b"\n\n")?;
    let block = String::from_utf8_lossy(&buffer[..end]).into_owned();
    buffer.drain(..end + 2);
    Some(block)
}

/// Name and data; none of a comment.
fn event(block: &str) -> Option<(String, Value)> {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
    let data = serde_json::from_str(field("data: ")?).ok()?;
    Some((field("event: ")?.to_owned(), data))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_are_found_however_they_are_cut() {
        let text = ": keep-alive\n\nid: 1\nevent: progress\ndata: {\"bytes\":1}\n\nid: 2\nevent: done\ndata: null\n\nid: 3";
        for size in 1..text.len() {
            let (mut buffer, mut seen) = (Vec::new(), Vec::new());
            for piece in text.as_bytes().chunks(size) {
                buffer.extend_from_slice(piece);
                while let Some(block) = take_block(&mut buffer) {
                    seen.extend(event(&block));
                }
            }
            let expected = [
                ("progress".to_owned(), json!({ "bytes": 1 })),
                ("done".to_owned(), Value::Null),
            ];
            assert_eq!(seen, expected, "{size}");
            assert_eq!(buffer, b"id: 3");
        }
    }
}
