//! A small file server on loopback: one file, with ranges, that breaks off the
//! first answer in the middle if it is told to.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, Response, StatusCode, header};
use axum::routing::get;
use bytes::Bytes;
use futures::stream;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

/// Small enough that an answer comes in many pieces.
const PIECE: usize = 1 << 20;

/// What the server was asked for.
#[derive(Debug, Default)]
pub struct Asked {
    /// Answers with the file or a part of it.
    pub answers: AtomicU64,
    /// How many of them were for a part.
    pub parts: AtomicU64,
    /// Bytes that were given away.
    pub bytes: AtomicU64,
}

#[derive(Debug)]
struct Shelved {
    bytes: Bytes,
    /// After so many bytes the first answer breaks off.
    break_after: Option<usize>,
    asked: Arc<Asked>,
}

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct Shelf {
    pub url: String,
    pub asked: Arc<Asked>,
    server: JoinHandle<()>,
}

impl Shelf {
    /// Serves a file as `/<name>`.
    pub async fn with(path: PathBuf, name: &str, break_after: Option<usize>) -> Self {
        let bytes = tokio::fs::read(&path)
            .await
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let asked = Arc::new(Asked::default());
        let shelved = Arc::new(Shelved {
            bytes: bytes.into(),
            break_after,
            asked: Arc::clone(&asked),
        });
        let router = Router::new()
            .route(&format!("/{name}"), get(file))
            .with_state(shelved);
        let listener = TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("loopback has a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let server = tokio::spawn(async move {
            // It ends by being aborted.
            let _ = axum::serve(listener, router).await;
        });
        Self {
            url: format!("http://{address}/{name}"),
            asked,
            server,
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn file(State(shelved): State<Arc<Shelved>>, headers: HeaderMap) -> Response<Body> {
    let whole = shelved.bytes.len();
    let range = headers.get(header::RANGE).and_then(|range| {
        let (first, last) = range
            .to_str()
            .ok()?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        let last = last.parse().unwrap_or(whole - 1).min(whole - 1);
        Some((first.parse::<usize>().ok()?, last))
    });
    let (first, last) = range.unwrap_or((0, whole - 1));
    if first > last {
        let answer = Response::builder().status(StatusCode::RANGE_NOT_SATISFIABLE);
        return answer
            .header(header::CONTENT_RANGE, format!("bytes */{whole}"))
            .body(Body::empty())
            .expect("a plain answer");
    }
    let earlier = shelved.asked.answers.fetch_add(1, Ordering::Relaxed);
    shelved
        .asked
        .parts
        .fetch_add(u64::from(range.is_some()), Ordering::Relaxed);
    let wanted = shelved.bytes.slice(first..=last);
    let length = wanted.len();
    let broken = shelved.break_after.filter(|_| earlier == 0);
    let answer = Response::builder()
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::ETAG, "\"one\"")
        .header(header::CONTENT_LENGTH, length);
    let answer = match range {
        Some(_) => answer.status(StatusCode::PARTIAL_CONTENT).header(
            header::CONTENT_RANGE,
            format!("bytes {first}-{last}/{whole}"),
        ),
        None => answer,
    };
    answer
        .body(pieces(wanted, broken, Arc::clone(&shelved.asked)))
        .expect("a plain answer")
}

/// The bytes in pieces; an error, and so a broken connection, after `broken`.
fn pieces(bytes: Bytes, broken: Option<usize>, asked: Arc<Asked>) -> Body {
    Body::from_stream(stream::unfold(0, move |at| {
        let end = (at + PIECE).min(bytes.len());
        let piece = match broken {
            _ if at == bytes.len() => None,
            Some(limit) if at >= limit => Some(Err(std::io::Error::other("broken off"))),
            _ => Some(Ok(bytes.slice(at..end))),
        };
        if let Some(Ok(piece)) = &piece {
            asked.bytes.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        async move { piece.map(|piece| (piece, end)) }
    }))
}
