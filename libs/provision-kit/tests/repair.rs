//! Downloads that go wrong in every way are mended or refused, never accepted.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use llama_orch_types::{Digest, Hinted};
use proptest::prelude::*;
use provision_kit::download::{Download, DownloadError, Fetched, fetch, http_client};
use provision_kit::fs::sha256_bytes;
use provision_kit::progress::{Reporter, Silent, Step, StepKind, Unit};

const CHUNK: usize = 4096;

/// What happens to one answer; the last for all that follow.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// The connection breaks after this many bytes.
    Cut(usize),
    /// The same, and it always begins at the file's start.
    CutAnew(usize),
    /// The byte at this place of the file is wrong, where it is sent at all.
    Flip(usize),
    IgnoreRange,
    WrongRange,
    /// Ends cleanly before its time.
    Short(usize),
    /// Not at once.
    Slow,
    /// The server gives the same file another name.
    NewEtag,
    Busy,
}

#[derive(Debug)]
struct Server {
    content: Vec<u8>,
    faults: Vec<Fault>,
    requests: AtomicUsize,
    sent: AtomicUsize,
    ranges: Mutex<Vec<Option<String>>>,
}

impl Server {
    async fn start(content: &[u8], faults: &[Fault]) -> (String, Arc<Self>) {
        let server = Arc::new(Self {
            content: content.to_vec(),
            faults: faults.to_vec(),
            requests: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
            ranges: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/file.bin", listener.local_addr().unwrap());
        let router = Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&server));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (url, server)
    }
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let index = server.requests.fetch_add(1, Ordering::SeqCst);
    let fault = server.faults[index.min(server.faults.len() - 1)];
    if fault == Fault::Slow {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let header = |name: &str| Some(request.headers().get(name)?.to_str().unwrap().to_owned());
    let range = header("range");
    server.ranges.lock().unwrap().push(range.clone());
    if fault == Fault::Busy {
        return status(StatusCode::SERVICE_UNAVAILABLE);
    }
    let total = server.content.len();
    let etag = match fault {
        Fault::NewEtag => format!("\"v{index}\""),
        _ => "\"v1\"".to_owned(),
    };
    let same = header("if-range").is_none_or(|wanted| wanted == etag);
    let asked = range
        .filter(|_| same && !matches!(fault, Fault::IgnoreRange | Fault::CutAnew(_)))
        .map(|range| {
            let (start, last) = range["bytes=".len()..].split_once('-').unwrap();
            let end = last.parse::<usize>().map_or(total, |last| last + 1);
            (start.parse::<usize>().unwrap(), end.min(total))
        });
    let mut response = Response::builder().header("etag", etag);
    let (start, end) = match asked {
        Some((start, _)) if start >= total => {
            return Response::builder()
                .status(StatusCode::RANGE_NOT_SATISFIABLE)
                .header("content-range", format!("bytes */{total}"))
                .body(Body::empty())
                .unwrap();
        }
        Some((start, end)) => {
            let said = if fault == Fault::WrongRange {
                start + 1
            } else {
                start
            };
            response = response
                .status(StatusCode::PARTIAL_CONTENT)
                .header("content-range", format!("bytes {said}-{}/{total}", end - 1));
            (start, end)
        }
        None => (0, total),
    };
    let mut bytes = server.content[start..end].to_vec();
    let length = bytes.len();
    if let Fault::Flip(at) = fault
        && (start..end).contains(&at)
    {
        bytes[at - start] ^= 0x10;
    }
    let body = match fault {
        Fault::Cut(count) | Fault::CutAnew(count) | Fault::Short(count) => {
            bytes.truncate(count);
            server.sent.fetch_add(bytes.len(), Ordering::SeqCst);
            let breaks = !matches!(fault, Fault::Short(_));
            if breaks {
                response = response.header("content-length", length);
            }
            cut_body(bytes, breaks)
        }
        _ => {
            server.sent.fetch_add(bytes.len(), Ordering::SeqCst);
            response = response.header("content-length", length);
            Body::from(bytes)
        }
    };
    response.body(body).unwrap()
}

fn status(code: StatusCode) -> Response {
    Response::builder()
        .status(code)
        .body(Body::from("no"))
        .unwrap()
}

/// Sends the bytes, then breaks the connection or ends.
fn cut_body(bytes: Vec<u8>, breaks: bool) -> Body {
    let (send, mut receive) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        send.send(Ok(bytes)).await.ok();
        if breaks {
            // There is room again once the first piece was taken.
            send.send(Err(std::io::Error::other("cut"))).await.ok();
        }
    });
    Body::from_stream(futures::stream::poll_fn(move |context| {
        receive.poll_recv(context)
    }))
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn part(&self) -> PathBuf {
        self.dir.path().join("file.part")
    }

    async fn fetch(
        &self,
        url: &str,
        digest: Digest,
        attempts: u32,
    ) -> Result<Fetched, DownloadError> {
        let part = self.part();
        let reporter: Arc<dyn Reporter> = Arc::new(Silent);
        let mut step = Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, None);
        fetch(
            &http_client().unwrap(),
            Download {
                expected_digest: Some(digest),
                stall_timeout: Duration::from_secs(20),
                attempts,
                backoff: Duration::from_millis(1),
                chunk_bytes: CHUNK as u64,
                ..Download::new(url, &part)
            },
            &mut step,
        )
        .await
    }

    /// As a transfer of these bytes leaves it that was given up.
    async fn arrived(&self, content: &[u8]) {
        let cut = [Fault::Cut(content.len() - 1)];
        let (url, _) = Server::start(content, &cut).await;
        let error = self.fetch(&url, sha256_bytes(b"other"), 1).await;
        assert!(error.unwrap_err().retriable());
    }
}

fn content(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 % 251) as u8).collect()
}

#[tokio::test]
async fn a_byte_flipped_on_disk_costs_one_chunk() {
    let content = content(20 * CHUNK + 77);
    let bench = Bench::new();
    bench.arrived(&content).await;
    let mut on_disk = std::fs::read(bench.part()).unwrap();
    assert_eq!(on_disk.len(), content.len() - 1);
    on_disk[5 * CHUNK + 1] ^= 1;
    on_disk[9 * CHUNK] ^= 1;
    std::fs::write(bench.part(), on_disk).unwrap();
    let (url, server) = Server::start(&content, &[Fault::None]).await;
    let digest = sha256_bytes(&content);
    let fetched = bench.fetch(&url, digest, 2).await.unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    assert_eq!(server.sent.load(Ordering::SeqCst), 2 * CHUNK + 1);
}

#[tokio::test]
async fn chunks_that_cannot_be_had_again_cost_what_follows_them() {
    let content = content(20 * CHUNK);
    for fault in [Fault::WrongRange, Fault::Flip(5 * CHUNK + 9)] {
        let bench = Bench::new();
        bench.arrived(&content).await;
        let mut on_disk = std::fs::read(bench.part()).unwrap();
        on_disk[5 * CHUNK] ^= 1;
        std::fs::write(bench.part(), on_disk).unwrap();
        let (url, server) = Server::start(&content, &[fault, Fault::None]).await;
        let digest = sha256_bytes(&content);
        let fetched = bench.fetch(&url, digest, 2).await.unwrap();
        assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
        assert_eq!(server.sent.load(Ordering::SeqCst), 16 * CHUNK);
    }
}

#[tokio::test]
async fn a_byte_flipped_on_its_way_costs_one_more_pass() {
    let content = content(10 * CHUNK + 5);
    let digest = sha256_bytes(&content);
    for at in [0, 3 * CHUNK, content.len() - 1] {
        let (url, server) = Server::start(&content, &[Fault::Flip(at), Fault::None]).await;
        let bench = Bench::new();
        let fetched = bench.fetch(&url, digest, 2).await.unwrap();
        assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
        assert_eq!(server.requests.load(Ordering::SeqCst), 2);
        // Nothing lies beside it.
        assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 1);
    }
}

#[tokio::test]
async fn two_transfers_that_are_both_wrong_are_decided_by_a_third() {
    let content = content(10 * CHUNK);
    let faults = [Fault::Flip(7), Fault::Flip(4 * CHUNK), Fault::None];
    let (url, server) = Server::start(&content, &faults).await;
    let bench = Bench::new();
    let fetched = bench.fetch(&url, sha256_bytes(&content), 2).await.unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
    assert_eq!(
        server.sent.load(Ordering::SeqCst),
        2 * content.len() + 2 * CHUNK
    );
}

#[tokio::test]
async fn a_way_that_always_spoils_is_refused_with_its_places() {
    let content = content(10 * CHUNK);
    let faults: Vec<Fault> = (0..9).map(|turn| Fault::Flip(4 * CHUNK + turn)).collect();
    let (url, server) = Server::start(&content, &faults).await;
    let bench = Bench::new();
    let error = bench
        .fetch(&url, sha256_bytes(&content), 2)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(matches!(&error, DownloadError::Unstable { chunks, .. } if chunks == &[4]));
    assert!(text.contains("bytes 16384–20479"), "{text}");
    assert!(error.hint().is_some() && !error.retriable());
    assert_eq!(server.requests.load(Ordering::SeqCst), 3);
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_second_look_that_is_cut_for_good_keeps_what_is_there() {
    let content = content(10 * CHUNK);
    let faults = [Fault::Flip(4 * CHUNK), Fault::Busy];
    let (url, _) = Server::start(&content, &faults).await;
    let bench = Bench::new();
    let digest = sha256_bytes(&content);
    let error = bench.fetch(&url, digest, 2).await.unwrap_err();
    assert!(error.retriable(), "{error}");
    assert_eq!(std::fs::read(bench.part()).unwrap().len(), content.len());
    let (url, _) = Server::start(&content, &[Fault::None]).await;
    let fetched = bench.fetch(&url, digest, 2).await.unwrap();
    assert_eq!(std::fs::read(&fetched.path).unwrap(), content);
}

#[tokio::test]
async fn a_second_look_waits_for_a_server_that_is_busy() {
    let content = content(10 * CHUNK);
    // Without a length, the first look at one counts as well.
    for first in [Fault::Flip(7), Fault::Short(0)] {
        let faults = [first, Fault::Busy, Fault::Cut(5 * CHUNK), Fault::Busy];
        let faults = [&faults[..], &[Fault::None]].concat();
        let (url, _) = Server::start(&content, &faults).await;
        let bench = Bench::new();
        let fetched = bench.fetch(&url, sha256_bytes(&content), 3).await.unwrap();
        assert_eq!(std::fs::read(&fetched.path).unwrap(), content, "{first:?}");
    }
}

#[tokio::test]
async fn a_server_that_always_begins_anew_and_never_ends_is_given_up() {
    let content = content(10 * CHUNK);
    let faults = [Fault::Flip(7), Fault::CutAnew(5 * CHUNK)];
    let (url, server) = Server::start(&content, &faults).await;
    let digest = sha256_bytes(&content);
    let error = Bench::new().fetch(&url, digest, 3).await.unwrap_err();
    assert!(error.retriable(), "{error}");
    let requests = server.requests.load(Ordering::SeqCst);
    assert!(requests <= 12, "{requests} requests");
}

#[tokio::test]
async fn a_rate_is_kept() {
    let content = content(10 * CHUNK);
    let (url, _) = Server::start(&content, &[Fault::None]).await;
    let bench = Bench::new();
    let part = bench.part();
    let reporter: Arc<dyn Reporter> = Arc::new(Silent);
    let mut step = Step::start(&reporter, StepKind::ModelFetch, "x", Unit::Bytes, None);
    let rate = "80KiB".parse().unwrap();
    let start = std::time::Instant::now();
    let download = Download {
        rate: provision_kit::rate::RateLimit::new(Some(rate)),
        ..Download::new(&url, &part)
    };
    fetch(&http_client().unwrap(), download, &mut step)
        .await
        .unwrap();
    // Half a second's worth, a quarter of it at once: noise can only make it slower.
    assert!(start.elapsed() >= Duration::from_millis(240));
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = prop_oneof![
        Just(Fault::None),
        (0usize..40_000).prop_map(Fault::Cut),
        (0usize..40_000).prop_map(Fault::CutAnew),
        (0usize..40_000).prop_map(Fault::Short),
        (0usize..40_000).prop_map(Fault::Flip),
        Just(Fault::IgnoreRange),
        Just(Fault::WrongRange),
        Just(Fault::Slow),
        Just(Fault::NewEtag),
        Just(Fault::Busy),
    ];
    prop::collection::vec(fault, 0..7)
}

/// Few, unless somebody asks for more: each case has a server of its own.
fn cases() -> u32 {
    let asked = std::env::var("PROPTEST_CASES");
    asked.map_or(60, |text| text.parse().unwrap())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Whatever happens on the way and to the disk in between: what is
    /// accepted is right, it ends, and one wrong byte is always mended.
    #[test]
    fn faults_in_any_order_are_mended_or_refused(
        length in 1usize..40_000,
        mut script in faults(),
        on_disk in prop::option::of((any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        script.push(Fault::None);
        let flips = script.iter().filter(|fault| matches!(fault, Fault::Flip(_))).count();
        // Without a length nobody can tell a short file from a whole one.
        let shorts = script.iter().filter(|fault| matches!(fault, Fault::Short(_))).count();
        let wrong_ranges = script.iter().filter(|fault| **fault == Fault::WrongRange).count();
        let content = content(length);
        let digest = sha256_bytes(&content);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let bench = Bench::new();
            if let Some((at, cut)) = on_disk && length > 1 {
                bench.arrived(&content).await;
                let mut bytes = std::fs::read(bench.part()).unwrap();
                if !bytes.is_empty() {
                    let at = at.index(bytes.len());
                    bytes[at] ^= 0x80;
                    bytes.truncate(cut.index(bytes.len() + 1));
                    std::fs::write(bench.part(), bytes).unwrap();
                }
            }
            let (url, server) = Server::start(&content, &script).await;
            let result = bench.fetch(&url, digest, 10).await;
            let requests = server.requests.load(Ordering::SeqCst);
            assert!(requests <= 60, "{requests} requests");
            match result {
                Ok(fetched) => assert_eq!(std::fs::read(&fetched.path).unwrap(), content),
                Err(error) => assert!(flips + shorts > 1 || wrong_ranges > 0, "{error:?}"),
            }
        });
    }
}
