//! A web server that holds one file and may stop in its middle.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Method;
use axum::response::Response;
use futures::StreamExt;
use tokio::sync::watch;

/// Serves the same bytes for every path.
pub(crate) struct Server {
    content: Vec<u8>,
    /// Whether what comes after the first half is sent.
    open: watch::Sender<bool>,
    missing: AtomicBool,
    /// Where each GET asked to begin.
    begins: Mutex<Vec<usize>>,
    sent: AtomicUsize,
}

impl Server {
    /// `open`: sends everything at once; else only half until it is let.
    pub(crate) async fn start(content: &[u8], open: bool) -> (String, Arc<Self>) {
        let server = Arc::new(Self {
            content: content.to_vec(),
            open: watch::Sender::new(open),
            missing: AtomicBool::new(false),
            begins: Mutex::default(),
            sent: AtomicUsize::new(0),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&server));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (address, server)
    }

    pub(crate) fn let_through(&self) {
        self.open.send_replace(true);
    }

    /// From now on it knows no file.
    pub(crate) fn forget(&self) {
        self.missing.store(true, Ordering::SeqCst);
    }

    pub(crate) fn begins(&self) -> Vec<usize> {
        self.begins.lock().unwrap().clone()
    }

    /// Bytes of the file that went out since the last call.
    pub(crate) fn sent(&self) -> usize {
        self.sent.swap(0, Ordering::SeqCst)
    }
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let total = server.content.len();
    let answer = Response::builder().header("etag", "\"abc\"");
    if server.missing.load(Ordering::SeqCst) {
        return answer.status(404).body(Body::empty()).unwrap();
    }
    if request.method() == Method::HEAD {
        let answer = answer.header("content-length", total);
        return answer.body(Body::empty()).unwrap();
    }
    let range = request.headers().get("range");
    let range = range.map(|range| range.to_str().unwrap()["bytes=".len()..].to_owned());
    let (begin, end) = match range.as_deref().and_then(|range| range.split_once('-')) {
        Some((begin, end)) => (
            begin.parse().unwrap(),
            end.parse().map_or(total, |end: usize| end + 1),
        ),
        None => (0, total),
    };
    server.begins.lock().unwrap().push(begin);
    let answer = match range {
        Some(_) => answer.status(206).header(
            "content-range",
            format!("bytes {begin}-{}/{total}", end - 1),
        ),
        None => answer,
    };
    // What lies beyond the middle waits.
    let middle = (total / 2).clamp(begin, end);
    let pieces = [
        server.content[begin..middle].to_vec(),
        server.content[middle..end].to_vec(),
    ];
    let body = futures::stream::iter(pieces.into_iter().enumerate()).then(move |(at, piece)| {
        let server = Arc::clone(&server);
        async move {
            if at == 1 {
                let mut open = server.open.subscribe();
                open.wait_for(|open| *open).await.unwrap();
            }
            server.sent.fetch_add(piece.len(), Ordering::SeqCst);
            Ok::<_, std::io::Error>(piece)
        }
    });
    let answer = answer.header("content-length", end - begin);
    answer.body(Body::from_stream(body)).unwrap()
}
