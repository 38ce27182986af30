//! Mode `release` against a small local server.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use futures::StreamExt as _;
use llama_orch_types::{Digest, Hinted as _, ProvisioningMode};
use provision_kit::download::DownloadError;
use provision_kit::fs::sha256_bytes;
use provisioners_engine_provisioner::{EngineConfig, EngineError, Mode};
use support::{Machine, refusing, until};

const ARCHIVE: &str = "llama-b7-bin-test-x64.tar.gz";
const CUDA_ARCHIVE: &str = "llama-b7-bin-test-cuda-x64.tar.gz";

/// An archive as llama.cpp packs it: everything in one directory, libraries beside the binary.
fn archive(engine_script: &str) -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut tar = tar::Builder::new(gzip);
    let mut add = |name: &str, mode: u32, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(mode);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    add("llama-b7/llama-server", 0o755, engine_script.as_bytes());
    // Something that does not compress, so that a cut lands in the middle.
    let noise: Vec<u8> = (0..200_000u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    add("llama-b7/libllama.so", 0o644, &noise);
    tar.into_inner().unwrap().finish().unwrap()
}

/// An engine that only knows its version, and fails without the library beside it.
const ENGINE: &str = "#!/bin/sh\n[ -e \"$(dirname \"$0\")/libllama.so\" ] || exit 127\necho 'version: 0.1.0 (build 7, commit test)'\n";

#[derive(Clone)]
struct Server {
    archive: Bytes,
    digest: Option<Digest>,
    /// How many requests are cut in the middle.
    cuts: usize,
    requests: Arc<AtomicUsize>,
    ranges: Arc<AtomicUsize>,
    /// Downloads wait for a permit, where this is set.
    gate: Option<Arc<tokio::sync::Semaphore>>,
}

impl Server {
    fn new(archive: Vec<u8>) -> Self {
        Self {
            digest: Some(sha256_bytes(&archive)),
            archive: archive.into(),
            cuts: 0,
            requests: Arc::default(),
            ranges: Arc::default(),
            gate: None,
        }
    }

    /// Serves until the test's runtime ends.
    async fn start(&self) -> SocketAddr {
        let router = axum::Router::new()
            .route("/api/b7", get(list))
            .route(&format!("/download/b7/{ARCHIVE}"), get(download))
            .route(&format!("/download/b7/{CUDA_ARCHIVE}"), get(download))
            .with_state(self.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        address
    }
}

async fn list(State(server): State<Server>) -> Json<serde_json::Value> {
    Json(serde_json::json!({
        "tag_name": "b7",
        "assets": [
            { "name": "other.zip", "digest": null },
            { "name": ARCHIVE, "digest": server.digest.map(|digest| digest.to_string()) },
        ],
    }))
}

async fn download(State(server): State<Server>, headers: HeaderMap) -> Response {
    let number = server.requests.fetch_add(1, Ordering::SeqCst);
    if let Some(gate) = &server.gate {
        gate.acquire().await.unwrap().forget();
    }
    let whole = server.archive.clone();
    let total = whole.len();
    let from = headers.get(header::RANGE).and_then(|range| {
        range
            .to_str()
            .ok()?
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    if from.is_some() {
        server.ranges.fetch_add(1, Ordering::SeqCst);
    }
    let start = from.unwrap_or(0);
    let rest = whole.slice(start..);
    let body = if number < server.cuts {
        let half = rest.slice(..rest.len() / 2);
        Body::from_stream(cut_after(half))
    } else {
        Body::from(rest)
    };
    let length = total - start;
    let mut response = (
        StatusCode::OK,
        [(header::CONTENT_LENGTH, length.to_string())],
        body,
    )
        .into_response();
    if from.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let range = format!("bytes {start}-{}/{total}", total - 1);
        response
            .headers_mut()
            .insert(header::CONTENT_RANGE, range.parse().unwrap());
    }
    response
}

/// Some bytes, then a broken connection. The pause lets the bytes go out first.
fn cut_after(bytes: Bytes) -> impl futures::Stream<Item = Result<Bytes, std::io::Error>> {
    let broken = async {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        Err(std::io::ErrorKind::ConnectionReset.into())
    };
    futures::stream::iter([Ok(bytes)]).chain(futures::stream::once(broken))
}

fn config(address: SocketAddr) -> EngineConfig {
    let mut config = EngineConfig {
        mode: Some(Mode::Release),
        version: "b7".into(),
        ..EngineConfig::default()
    };
    config.release.base_url = format!("http://{address}/download");
    config.release.api_url = format!("http://{address}/api");
    config.release.archive = Some(ARCHIVE.into());
    config
}

fn nothing_is_installed(machine: &Machine) -> bool {
    std::fs::read_dir(machine.cache.engines())
        .into_iter()
        .flatten()
        .flatten()
        .all(|entry| entry.file_name().to_string_lossy().starts_with('.'))
}

#[tokio::test]
async fn a_good_archive_is_installed_once() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = config(server.start().await);
    let provisioner = machine.provisioner();
    let first = provisioner.ensure(&config).await.unwrap();
    assert_eq!(first.mode, ProvisioningMode::Release);
    assert_eq!(first.version, "b7");
    assert!(first.binary.with_file_name("libllama.so").exists());
    assert_eq!(first.digest, sha256_bytes(ENGINE.as_bytes()));

    let second = provisioner.ensure(&config).await.unwrap();
    assert_eq!(second.mode, ProvisioningMode::Cache);
    assert_eq!(second.binary, first.binary);
    // Mode cache finds it too.
    let cached = EngineConfig {
        mode: Some(Mode::Cache),
        ..config.clone()
    };
    assert_eq!(provisioner.ensure(&cached).await.unwrap(), second);
    assert_eq!(server.requests.load(Ordering::SeqCst), 1);
    assert!(
        std::fs::read_dir(machine.cache.downloads())
            .unwrap()
            .next()
            .is_none()
    );

    let records = machine.provenance();
    assert_eq!(records.len(), 1);
    assert_eq!(records[0]["event"], "provided");
    assert_eq!(
        records[0]["origin_digest"],
        server.digest.unwrap().to_string()
    );
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_to_serves_its_engine() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = config(server.start().await);
    let provisioner = machine.provisioner();
    let first = provisioner.ensure(&config).await.unwrap();
    // Where no lock can be made, by root either.
    std::fs::remove_dir_all(machine.cache.locks()).unwrap();
    std::os::unix::fs::symlink("/proc/self", machine.cache.locks()).unwrap();
    for mode in [Mode::Release, Mode::Cache] {
        let config = EngineConfig {
            mode: Some(mode),
            ..config.clone()
        };
        let again = provisioner.ensure(&config).await.unwrap();
        assert_eq!((&again.binary, again.digest), (&first.binary, first.digest));
        assert_eq!(again.mode, ProvisioningMode::Cache);
    }
    std::fs::remove_dir_all(first.binary.parent().unwrap()).unwrap();
    let error = provisioner.ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::Lock(_)), "{error}");
    assert!(error.hint().unwrap().contains("cache_dir"));
    assert_eq!(server.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_changed_engine_is_noticed_and_fetched_again() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = config(server.start().await);
    let first = machine.provisioner().ensure(&config).await.unwrap();
    let mut file = std::fs::File::options()
        .append(true)
        .open(&first.binary)
        .unwrap();
    file.write_all(b"# something else").unwrap();
    drop(file);
    let cached = EngineConfig {
        mode: Some(Mode::Cache),
        ..config.clone()
    };
    let error = machine.provisioner().ensure(&cached).await.unwrap_err();
    assert!(
        matches!(error, EngineError::BinaryChanged { .. }),
        "{error}"
    );
    let again = machine.provisioner().ensure(&config).await.unwrap();
    assert_eq!(
        (again.mode, again.digest),
        (ProvisioningMode::Release, first.digest)
    );
}

#[tokio::test]
async fn a_wrong_digest_installs_nothing() {
    let machine = Machine::new();
    let server = Server {
        digest: Some(Digest::from_bytes([7; 32])),
        ..Server::new(archive(ENGINE))
    };
    let error = machine
        .provisioner()
        .ensure(&config(server.start().await))
        .await
        .unwrap_err();
    let EngineError::Download {
        source: DownloadError::WrongDigest { .. },
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert!(nothing_is_installed(&machine));
    assert!(
        std::fs::read_dir(machine.cache.downloads())
            .unwrap()
            .next()
            .is_none()
    );
}

#[tokio::test]
async fn the_configs_digest_goes_before_the_published_one() {
    let machine = Machine::new();
    let server = Server {
        digest: None,
        ..Server::new(archive(ENGINE))
    };
    let mut config = config(server.start().await);
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::NoDigest { .. }), "{error}");
    config.release.archive_digest = Some(sha256_bytes(&server.archive));
    machine.provisioner().ensure(&config).await.unwrap();
}

#[tokio::test]
async fn an_archive_that_is_not_there_is_said() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let mut config = config(server.start().await);
    config.release.archive = Some("llama-b7-bin-other-x64.tar.gz".into());
    config.release.archive_digest = server.digest;
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    let EngineError::Download {
        source: DownloadError::Status { status, .. },
        ..
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert!(nothing_is_installed(&machine));
}

#[tokio::test]
async fn a_cut_transfer_is_gone_on_with() {
    let machine = Machine::new();
    let server = Server {
        cuts: 1,
        ..Server::new(archive(ENGINE))
    };
    let installation = machine
        .provisioner()
        .ensure(&config(server.start().await))
        .await
        .unwrap();
    assert_eq!(installation.digest, sha256_bytes(ENGINE.as_bytes()));
    assert_eq!(server.requests.load(Ordering::SeqCst), 2);
    assert_eq!(
        server.ranges.load(Ordering::SeqCst),
        1,
        "the second began where the first ended"
    );
}

#[tokio::test]
async fn an_engine_of_another_version_is_not_installed() {
    let machine = Machine::new();
    let server = Server::new(archive(
        "#!/bin/sh\necho 'version: 0.1.0 (build 8, commit test)'\n",
    ));
    let error = machine
        .provisioner()
        .ensure(&config(server.start().await))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::WrongVersion { .. }), "{error}");
    for directory in [machine.cache.engines(), machine.cache.downloads()] {
        let left: Vec<_> = std::fs::read_dir(directory).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test]
async fn without_a_network_it_is_said_quickly() {
    let machine = Machine::new();
    let (_socket, address) = refusing();
    let begin = std::time::Instant::now();
    let error = machine
        .provisioner()
        .ensure(&config(address))
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::ReleaseList { .. }), "{error}");
    assert!(error.retriable());
    assert!(begin.elapsed() < std::time::Duration::from_secs(5));
}

#[tokio::test]
async fn two_engines_of_one_file_do_not_disturb_each_other() {
    let machine = Machine::new();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let server = Server {
        gate: Some(gate.clone()),
        ..Server::new(archive(ENGINE))
    };
    // One is told the digest and the other asks for it: two recipes, and the same file.
    let asking = config(server.start().await);
    let mut told = asking.clone();
    told.release.archive_digest = server.digest;
    let (one, other) = (machine.provisioner(), machine.provisioner());
    let open_gate = async {
        until("one waits for the other", || {
            let notes = machine.recorder.notes();
            notes.iter().any(|note| note.contains("same download"))
        })
        .await;
        assert_eq!(server.requests.load(Ordering::SeqCst), 1);
        gate.add_permits(2);
    };
    let (one, other, ()) = tokio::join!(one.ensure(&asking), other.ensure(&told), open_gate);
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_ne!(one.binary, other.binary);
    assert_eq!(one.digest, other.digest);
}

#[tokio::test]
async fn a_version_that_was_never_released_is_not_asked_for_again() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = EngineConfig {
        version: "b8".into(),
        ..config(server.start().await)
    };
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::ReleaseList { .. }), "{error}");
    assert!(!error.retriable());
}

#[tokio::test]
async fn an_engine_that_cannot_be_looked_at_is_not_removed() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = config(server.start().await);
    let installed = machine.provisioner().ensure(&config).await.unwrap();
    // Reading the manifest fails, and not because it is gone or no manifest.
    let manifest = installed.binary.with_file_name("manifest.json");
    std::fs::remove_file(&manifest).unwrap();
    std::fs::create_dir(&manifest).unwrap();
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::File(_)), "{error}");
    assert!(installed.binary.exists());
}

#[tokio::test]
async fn a_changed_library_is_noticed() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let config = config(server.start().await);
    let installed = machine.provisioner().ensure(&config).await.unwrap();
    std::fs::write(installed.binary.with_file_name("libllama.so"), "trojan").unwrap();
    let again = machine.provisioner().ensure(&config).await.unwrap();
    assert_eq!(again.mode, ProvisioningMode::Release);
    assert_eq!(server.requests.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_required_gpu_must_be_found_by_a_fetched_engine_too() {
    let machine = Machine::new();
    let server = Server::new(archive(ENGINE));
    let mut config = EngineConfig {
        require_gpu: true,
        ..config(server.start().await)
    };
    config.release.archive = Some(CUDA_ARCHIVE.into());
    config.release.archive_digest = server.digest;
    let cached = EngineConfig {
        mode: Some(Mode::Cache),
        ..config.clone()
    };
    for config in [config, cached] {
        let error = machine.provisioner().ensure(&config).await.unwrap_err();
        assert!(matches!(error, EngineError::NoGpu { .. }), "{error}");
        assert!(error.to_string().contains("lists no GPU"), "{error}");
    }
}
