//! `download::fetch` against a small server that can misbehave.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use llama_orch_types::{Digest, Hinted};
use provision_kit::download::{Download, DownloadError, Fetched, fetch, http_client};
use provision_kit::fs::sha256_bytes;
use provision_kit::part::{Sidecar, sidecar};
use provision_kit::progress::{ProgressEvent, Reporter, Step, StepKind, Unit};
use provision_kit::secret::Secret;

/// How the server answers; one entry for each request, the last one for all
/// that follow.
#[derive(Debug, Clone, Copy)]
enum Behaviour {
    Honest,
    /// Sends this many bytes of the answer, then breaks the connection.
    CutAfter(usize),
    IgnoreRange,
    Status(u16),
    /// Sends the client back to where it came from.
    Circle,
    /// Sends the headers and never a byte.
    Silent,
    /// Announces more bytes than any disk has room for.
    Huge,
    /// Answers a range request with another range.
    WrongRange,
    IgnoreIfRange,
    /// The file is another one of the same length by now.
    Replaced,
}

#[derive(Debug)]
struct Server {
    content: Mutex<Vec<u8>>,
    etag: Mutex<Option<&'static str>>,
    script: Vec<Behaviour>,
    requests: AtomicUsize,
    seen: Mutex<Vec<HeaderMap>>,
}

impl Server {
    async fn start(content: &[u8], script: &[Behaviour]) -> (String, Arc<Self>) {
        let server = Arc::new(Self {
            content: Mutex::new(content.to_vec()),
            etag: Mutex::new(Some("\"v1\"")),
            script: script.to_vec(),
            requests: AtomicUsize::new(0),
            seen: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/file.bin", listener.local_addr().unwrap());
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&server));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (url, server)
    }

    fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }

    fn header(&self, request: usize, name: &str) -> Option<String> {
        let seen = self.seen.lock().unwrap();
        Some(seen[request].get(name)?.to_str().unwrap().to_owned())
    }
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let index = server.requests.fetch_add(1, Ordering::SeqCst);
    server.seen.lock().unwrap().push(request.headers().clone());
    let behaviour = server.script[index.min(server.script.len() - 1)];
    let mut content = server.content.lock().unwrap().clone();
    let replaced = matches!(behaviour, Behaviour::Replaced);
    if replaced {
        content.reverse();
    }
    let etag = *server.etag.lock().unwrap();
    if let Behaviour::Status(status) = behaviour {
        return Response::builder()
            .status(status)
            .body(Body::from("no"))
            .unwrap();
    }
    if let Behaviour::Circle = behaviour {
        return Response::builder()
            .status(StatusCode::FOUND)
            .header("location", "/file.bin")
            .body(Body::empty())
            .unwrap();
    }
    let header = |name: &str| Some(request.headers().get(name)?.to_str().unwrap().to_owned());
    let current = header("if-range").is_none_or(|wanted| Some(wanted.as_str()) == etag)
        || matches!(behaviour, Behaviour::IgnoreIfRange);
    let from = header("range")
        .filter(|_| current && !matches!(behaviour, Behaviour::IgnoreRange))
        .map(|range| {
            range["bytes=".len()..]
                .trim_end_matches('-')
                .parse::<usize>()
                .unwrap()
        });
    let day = if replaced { 2 } else { 1 };
    let modified = format!("Thu, 0{day} Jan 2026 00:00:00 GMT");
    let mut response = Response::builder().header("last-modified", modified);
    if let Some(etag) = etag {
        response = response.header("etag", etag);
    }
    let (status, start) = match from {
        Some(from) if from >= content.len() => {
            return response
                .status(StatusCode::RANGE_NOT_SATISFIABLE)
                .header("content-range", format!("bytes */{}", content.len()))
                .body(Body::empty())
                .unwrap();
        }
        Some(from) => (StatusCode::PARTIAL_CONTENT, from),
        None => (StatusCode::OK, 0),
    };
    let bytes = content[start..].to_vec();
    let length = match behaviour {
        Behaviour::Huge => 1_000_000_000_000_000_000,
        _ => bytes.len(),
    };
    response = response.status(status).header("content-length", length);
    if status == StatusCode::PARTIAL_CONTENT {
        let start = if matches!(behaviour, Behaviour::WrongRange) {
            0
        } else {
            start
        };
        let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
        response = response.header("content-range", range);
    }
    response.body(body(behaviour, bytes)).unwrap()
}

fn body(behaviour: Behaviour, bytes: Vec<u8>) -> Body {
    match behaviour {
        Behaviour::CutAfter(count) => {
            let first = bytes[..count.min(bytes.len())].to_vec();
            // Each piece is flushed by itself, so the client has the first one
            // when the connection breaks.
            let (send, receive) = tokio::sync::mpsc::channel(1);
            tokio::spawn(async move {
                send.send(Ok(first)).await.ok();
                // There is room again once the first piece was taken.
                send.send(Err(std::io::Error::other("cut"))).await.ok();
            });
            channel_body(receive)
        }
        Behaviour::Silent | Behaviour::Huge => {
            let (send, receive) = tokio::sync::mpsc::channel::<Result<Vec<u8>, std::io::Error>>(1);
            // Never dropped: the body never ends.
            std::mem::forget(send);
            channel_body(receive)
        }
        _ => Body::from(bytes),
    }
}

fn channel_body(mut pieces: tokio::sync::mpsc::Receiver<Result<Vec<u8>, std::io::Error>>) -> Body {
    Body::from_stream(futures::stream::poll_fn(move |context| {
        pieces.poll_recv(context)
    }))
}

#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<ProgressEvent>>);

impl Reporter for Recorder {
    fn report(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    fn notes(&self) -> String {
        let events = self.0.lock().unwrap();
        let notes = events.iter().filter_map(|event| match event {
            ProgressEvent::Note { text, .. } => Some(text.as_str()),
            _ => None,
        });
        notes.collect::<Vec<_>>().join("\n")
    }

    fn last_advance(&self) -> (u64, Option<u64>) {
        let events = self.0.lock().unwrap();
        let advances = events.iter().rev().find_map(|event| match event {
            ProgressEvent::Advanced { done, total, .. } => Some((*done, *total)),
            _ => None,
        });
        advances.unwrap()
    }
}

struct Bench {
    dir: tempfile::TempDir,
    stall_timeout: Duration,
    recorder: Arc<Recorder>,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            // A slow machine is not a silent server.
            stall_timeout: Duration::from_secs(20),
            recorder: Arc::default(),
        }
    }

    fn part(&self) -> PathBuf {
        self.dir.path().join("downloads/file.part")
    }

    async fn fetch(
        &self,
        url: &str,
        digest: Option<Digest>,
        size: Option<u64>,
    ) -> Result<Fetched, DownloadError> {
        let part = self.part();
        let reporter: Arc<dyn Reporter> = self.recorder.clone();
        let mut step = Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, None);
        let result = fetch(
            &http_client().unwrap(),
            Download {
                bearer: Some(&Secret::new("token-of-the-test")),
                expected_digest: digest,
                expected_size: size,
                stall_timeout: self.stall_timeout,
                attempts: 2,
                backoff: Duration::from_millis(5),
                ..Download::new(url, &part)
            },
            &mut step,
        )
        .await;
        step.finish();
        result
    }
}

fn content() -> Vec<u8> {
    (0..200_000u32).flat_map(u32::to_le_bytes).collect()
}

#[tokio::test]
async fn a_whole_file_with_its_digest_and_progress() {
    let content = content();
    let (url, server) = Server::start(&content, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let fetched = bench.fetch(&url, None, None).await.unwrap();
    assert_eq!(fetched.digest, sha256_bytes(&content));
    assert_eq!(fetched.size, content.len() as u64);
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    assert_eq!(
        bench.recorder.last_advance(),
        (fetched.size, Some(fetched.size))
    );
    assert_eq!(
        server.header(0, "authorization").unwrap(),
        "Bearer token-of-the-test"
    );
    // Only the file itself stays.
    assert_eq!(
        std::fs::read_dir(bench.part().parent().unwrap())
            .unwrap()
            .count(),
        1
    );
}

#[tokio::test]
async fn a_cut_transfer_goes_on_where_it_was_cut() {
    let content = content();
    let (url, server) =
        Server::start(&content, &[Behaviour::CutAfter(300_000), Behaviour::Honest]).await;
    let bench = Bench::new();
    let fetched = bench
        .fetch(&url, Some(sha256_bytes(&content)), None)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    let range = server.header(1, "range").unwrap();
    let from: u64 = range["bytes=".len()..]
        .trim_end_matches('-')
        .parse()
        .unwrap();
    assert!((1..=300_000).contains(&from), "{range}");
    assert_eq!(server.header(1, "if-range").unwrap(), "\"v1\"");
    assert!(
        bench.recorder.notes().contains("was cut after"),
        "{}",
        bench.recorder.notes()
    );
}

#[tokio::test]
async fn another_process_goes_on_with_the_same_version_only() {
    let first = content();
    let cut = Behaviour::CutAfter(100_000);
    let (url, server) = Server::start(&first, &[cut, cut, Behaviour::Honest]).await;
    let bench = Bench::new();
    let error = bench.fetch(&url, None, None).await.unwrap_err();
    assert!(matches!(error, DownloadError::Cut { .. }), "{error}");
    assert!(error.retriable());
    // The file changes on the server meanwhile.
    let second: Vec<u8> = first.iter().rev().copied().collect();
    server.content.lock().unwrap().clone_from(&second);
    *server.etag.lock().unwrap() = Some("\"v2\"");
    let fetched = bench.fetch(&url, None, None).await.unwrap();
    assert_eq!(server.header(2, "if-range").unwrap(), "\"v1\"");
    assert_eq!(std::fs::read(&fetched.path).unwrap(), second);
}

#[tokio::test]
async fn two_versions_are_not_put_together_where_the_server_ignores_if_range() {
    let first = content();
    let cut = Behaviour::CutAfter(100_000);
    let script = [cut, cut, Behaviour::IgnoreIfRange];
    let (url, server) = Server::start(&first, &script).await;
    let bench = Bench::new();
    bench.fetch(&url, None, None).await.unwrap_err();
    let second: Vec<u8> = first.iter().rev().copied().collect();
    server.content.lock().unwrap().clone_from(&second);
    *server.etag.lock().unwrap() = Some("\"v2\"");
    let fetched = bench.fetch(&url, None, None).await.unwrap();
    assert!(server.header(2, "range").is_some());
    assert_eq!(std::fs::read(&fetched.path).unwrap(), second);
}

#[tokio::test]
async fn a_file_that_is_replaced_between_two_attempts_is_fetched_anew() {
    let content = content();
    let script = [Behaviour::CutAfter(300_000), Behaviour::Replaced];
    let (url, server) = Server::start(&content, &script).await;
    *server.etag.lock().unwrap() = None;
    let bench = Bench::new();
    let fetched = bench.fetch(&url, None, None).await.unwrap();
    assert!(server.header(1, "range").is_some());
    let second: Vec<u8> = content.iter().rev().copied().collect();
    assert!(std::fs::read(&fetched.path).unwrap() == second);
}

#[tokio::test]
async fn bytes_that_nothing_vouches_for_are_fetched_again() {
    let content = content();
    let cut = Behaviour::CutAfter(100_000);
    let (url, _) = Server::start(&content, &[cut, cut, Behaviour::Honest]).await;
    let bench = Bench::new();
    bench.fetch(&url, None, None).await.unwrap_err();
    // As after a crash of the machine: neither the notes nor all of the bytes
    // had reached the disk.
    std::fs::write(sidecar(&bench.part(), Sidecar::Chunks), "").unwrap();
    let mut left = std::fs::read(bench.part()).unwrap();
    assert!(!left.is_empty());
    left.fill(0);
    std::fs::write(bench.part(), left).unwrap();
    let fetched = bench.fetch(&url, None, None).await.unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
}

#[tokio::test]
async fn a_server_that_ignores_range_sends_it_all_again() {
    let content = content();
    let (url, _) = Server::start(
        &content,
        &[Behaviour::CutAfter(300_000), Behaviour::IgnoreRange],
    )
    .await;
    let bench = Bench::new();
    let fetched = bench
        .fetch(&url, Some(sha256_bytes(&content)), None)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
}

#[tokio::test]
async fn a_wrong_range_is_not_appended() {
    let content = content();
    let script = [
        Behaviour::CutAfter(300_000),
        Behaviour::WrongRange,
        Behaviour::Honest,
    ];
    let (url, server) = Server::start(&content, &script).await;
    let bench = Bench::new();
    let fetched = bench
        .fetch(&url, Some(sha256_bytes(&content)), None)
        .await
        .unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    assert_eq!(server.header(2, "range"), None);
}

#[tokio::test]
async fn a_complete_part_file_needs_no_bytes() {
    let content = content();
    let (url, server) = Server::start(&content, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    std::fs::create_dir_all(bench.part().parent().unwrap()).unwrap();
    std::fs::write(bench.part(), &content).unwrap();
    let digest = sha256_bytes(&content);
    // Without a known size the server says that nothing is missing (416).
    assert_eq!(
        bench.fetch(&url, Some(digest), None).await.unwrap().digest,
        digest
    );
    assert_eq!(server.requests(), 1);
    // With it, not even a request is needed.
    assert_eq!(
        bench
            .fetch(&url, Some(digest), Some(content.len() as u64))
            .await
            .unwrap()
            .digest,
        digest
    );
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn a_part_file_of_other_bytes_is_fetched_anew() {
    let content = content();
    let (url, _) = Server::start(&content, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    std::fs::create_dir_all(bench.part().parent().unwrap()).unwrap();
    for stale in [
        vec![9; 1000],
        vec![9; content.len()],
        vec![9; content.len() + 7],
    ] {
        std::fs::write(bench.part(), &stale).unwrap();
        let fetched = bench
            .fetch(&url, Some(sha256_bytes(&content)), None)
            .await
            .unwrap();
        assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    }
}

#[tokio::test]
async fn a_wrong_digest_or_size_leaves_nothing() {
    let content = content();
    let (url, server) = Server::start(&content, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let other = sha256_bytes(b"other");
    let error = bench.fetch(&url, Some(other), None).await.unwrap_err();
    assert!(matches!(&error, DownloadError::WrongDigest { expected, .. } if *expected == other));
    assert!(!error.retriable());
    assert!(error.hint().is_some());
    assert!(!bench.part().exists());
    // It was read twice: one byte may be wrong by accident, a whole file is not.
    assert_eq!(server.requests(), 2);
    let error = bench.fetch(&url, None, Some(5)).await.unwrap_err();
    assert!(
        matches!(error, DownloadError::WrongSize { expected: 5, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn refusals_are_final_and_troubles_are_retried() {
    for (status, requests) in [(401, 1), (404, 1), (503, 2), (429, 2)] {
        let (url, server) = Server::start(b"x", &[Behaviour::Status(status)]).await;
        let error = Bench::new().fetch(&url, None, None).await.unwrap_err();
        assert!(error.to_string().contains(&status.to_string()), "{error}");
        assert!(error.hint().is_some());
        assert_eq!(server.requests(), requests, "{status}");
    }
    let (url, _) = Server::start(b"x", &[Behaviour::Status(500), Behaviour::Honest]).await;
    assert_eq!(Bench::new().fetch(&url, None, None).await.unwrap().size, 1);
}

#[tokio::test]
async fn a_redirect_that_is_not_followed_is_final() {
    let (url, server) = Server::start(b"x", &[Behaviour::Circle]).await;
    let error = Bench::new().fetch(&url, None, None).await.unwrap_err();
    assert!(matches!(error, DownloadError::Redirect { .. }), "{error}");
    assert!(!error.retriable());
    assert!(error.hint().unwrap().contains("https://"));
    // One round of redirects, not one for each attempt.
    assert_eq!(server.requests(), 11);
}

#[tokio::test]
async fn a_file_too_large_for_the_disk_is_not_begun() {
    let (url, server) = Server::start(b"abc", &[Behaviour::Huge]).await;
    let error = Bench::new().fetch(&url, None, None).await.unwrap_err();
    assert!(matches!(&error, DownloadError::NoSpace { needed, free, .. } if needed > free));
    assert!(error.hint().unwrap().contains("free at least"));
    // Worth another start once somebody has freed space, not another request now.
    assert!(error.retriable());
    assert_eq!(server.requests(), 1);
}

#[tokio::test]
async fn silence_has_a_bound() {
    let (url, _) = Server::start(b"abc", &[Behaviour::Silent]).await;
    let mut bench = Bench::new();
    bench.stall_timeout = Duration::from_millis(200);
    let error = bench.fetch(&url, None, None).await.unwrap_err();
    assert!(matches!(error, DownloadError::Stalled { .. }), "{error}");
}

#[tokio::test]
async fn nobody_there_is_said_without_secrets_of_the_url() {
    // Nobody listens on port 1; a port that was just freed may be taken again.
    let address = "127.0.0.1:1";
    let url = format!("http://user:password@{address}/f?signature=abc");
    let error = Bench::new().fetch(&url, None, None).await.unwrap_err();
    assert!(
        matches!(error, DownloadError::Unreachable { .. }),
        "{error}"
    );
    let text = format!("{error} {error:?}");
    assert!(text.contains(address));
    for secret in ["password", "signature=abc", "token-of-the-test"] {
        assert!(!text.contains(secret), "{text}");
    }
    assert!(error.hint().unwrap().contains("network"));
}
