//! A provisioner with a cache of its own, a recorder, and a server that can
//! misbehave.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use llama_orch_types::{Digest, ModelMetadata};
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::fs::sha256_bytes;
use provision_kit::progress::{ProgressEvent, Reporter};
use provision_kit::secret::Secret;
use provisioners_model_provisioner::provenance::ModelProvenance;
use provisioners_model_provisioner::{
    HubSettings, ModelError, ModelProvisioner, ModelProvisionerConfig, ProfileConfig,
};

use crate::gguf::Gguf;

#[derive(Debug, Default)]
pub(crate) struct Recorder(Mutex<Vec<ProgressEvent>>);

impl Reporter for Recorder {
    fn report(&self, event: ProgressEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Recorder {
    pub(crate) fn events(&self) -> Vec<ProgressEvent> {
        self.0.lock().unwrap().clone()
    }

    pub(crate) fn notes(&self) -> Vec<String> {
        let note = |event| match event {
            ProgressEvent::Note { text, .. } => Some(text),
            _ => None,
        };
        self.events().into_iter().filter_map(note).collect()
    }
}

/// Everything one test needs, in a directory of its own.
pub(crate) struct Bench {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) recorder: Arc<Recorder>,
    pub(crate) config: ModelProvisionerConfig,
    /// The Hub's address.
    pub(crate) hub: String,
    pub(crate) token: Option<&'static str>,
}

impl Bench {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            recorder: Arc::default(),
            config: ModelProvisionerConfig {
                stall_timeout_seconds: 5,
                attempts: 2,
                ..ModelProvisionerConfig::default()
            },
            // Nobody listens on port 1.
            hub: "http://127.0.0.1:1".to_owned(),
            token: None,
        }
    }

    pub(crate) fn cache(&self) -> CacheDirs {
        CacheDirs::new(self.dir.path().join("cache"))
    }

    pub(crate) fn provisioner(&self) -> ModelProvisioner {
        let runtime = RuntimeDirs::new(self.dir.path().join("runtime"));
        ModelProvisioner::new(
            self.config.clone(),
            &self.cache(),
            &runtime,
            self.recorder.clone(),
        )
        .unwrap()
        .with_backoff(Duration::from_millis(5))
        .with_hub(HubSettings {
            endpoint: Some(self.hub.clone()),
            token: self.token.map(Secret::new),
        })
    }

    pub(crate) async fn ensure(&self, reference: &str) -> Result<ModelMetadata, ModelError> {
        self.provisioner().ensure(reference).await
    }

    /// Adds a profile named `tiny`.
    pub(crate) fn profile(&mut self, digest: Digest, size_bytes: Option<u64>, sources: &[&str]) {
        let profile = ProfileConfig {
            digest,
            size_bytes,
            sources: sources
                .iter()
                .map(|source| source.parse().unwrap())
                .collect(),
            license: None,
        };
        self.config.profiles.insert("tiny".to_owned(), profile);
    }

    pub(crate) fn provenance(&self) -> Vec<ModelProvenance> {
        let path = self.dir.path().join("runtime/provenance/models.jsonl");
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Files that have a final name in the store.
    pub(crate) fn stored(&self) -> Vec<PathBuf> {
        files(&self.cache().models().join("sha256"))
    }

    pub(crate) fn downloads(&self) -> Vec<PathBuf> {
        files(&self.cache().downloads())
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.map(|entry| entry.unwrap().path()).collect()
}

/// A model of about a megabyte, so that cuts fall into the middle.
pub(crate) fn model() -> (Vec<u8>, Digest) {
    let mut file = Gguf::tiny();
    file.tensor("blk.0.weight", &[300_000], 0, 1_200_000);
    let bytes = file.bytes();
    let digest = sha256_bytes(&bytes);
    (bytes, digest)
}

/// A model of two whole chunks and a third.
pub(crate) fn large_model() -> (Vec<u8>, Digest) {
    let mut file = Gguf::tiny();
    file.tensor("blk.0.weight", &[4_400_000], 0, 17_600_000);
    let bytes = file.bytes();
    let digest = sha256_bytes(&bytes);
    (bytes, digest)
}

/// How the server answers a GET; one entry for each, the last for all others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Behaviour {
    Honest,
    CutAfter(usize),
    IgnoreRange,
    /// The byte at this place of the file is wrong.
    Flip(usize),
    Status(u16),
    /// Sends the client back to where it came from.
    Circle,
    /// Announces more bytes than any disk has room for.
    Huge,
}

#[derive(Debug)]
pub(crate) struct Server {
    content: Vec<u8>,
    script: Vec<Behaviour>,
    token: Option<&'static str>,
    says_commit: std::sync::atomic::AtomicBool,
    seen: Mutex<Vec<(Method, String, HeaderMap)>>,
    /// Bytes of files in all answers.
    sent: AtomicUsize,
}

impl Server {
    pub(crate) async fn start(content: &[u8], script: &[Behaviour]) -> (String, Arc<Self>) {
        Self::start_for(content, script, None).await
    }

    /// Wants this token of everybody.
    pub(crate) async fn start_for(
        content: &[u8],
        script: &[Behaviour],
        token: Option<&'static str>,
    ) -> (String, Arc<Self>) {
        let server = Arc::new(Self {
            content: content.to_vec(),
            script: script.to_vec(),
            token,
            says_commit: true.into(),
            seen: Mutex::default(),
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

    /// Whether it names the commit of what it sends, as the Hub does.
    pub(crate) fn says_commit(&self, says: bool) {
        self.says_commit.store(says, Ordering::SeqCst);
    }

    /// Bytes of files in all answers since the last call.
    pub(crate) fn sent(&self) -> usize {
        self.sent.swap(0, Ordering::SeqCst)
    }

    pub(crate) fn gets(&self) -> usize {
        self.count(&Method::GET)
    }

    pub(crate) fn count(&self, method: &Method) -> usize {
        self.seen
            .lock()
            .unwrap()
            .iter()
            .filter(|seen| seen.0 == *method)
            .count()
    }

    pub(crate) fn requests(&self) -> Vec<(Method, String, HeaderMap)> {
        self.seen.lock().unwrap().clone()
    }

    /// Where each GET asked to begin.
    pub(crate) fn ranges(&self) -> Vec<Option<String>> {
        let header = |headers: &HeaderMap| Some(headers.get("range")?.to_str().unwrap().to_owned());
        let requests = self.requests();
        let gets = requests
            .iter()
            .filter(|(method, ..)| *method == Method::GET);
        gets.map(|(_, _, headers)| header(headers)).collect()
    }
}

async fn answer(State(server): State<Arc<Server>>, request: Request) -> Response {
    let gets = server.gets();
    let seen = (
        request.method().clone(),
        request.uri().path().to_owned(),
        request.headers().clone(),
    );
    server.seen.lock().unwrap().push(seen);
    let status = |status: u16| {
        Response::builder()
            .status(status)
            .body(Body::from("an error page"))
            .unwrap()
    };
    let header = |name: &str| Some(request.headers().get(name)?.to_str().unwrap().to_owned());
    if let Some(token) = server.token
        && header("authorization") != Some(format!("Bearer {token}"))
    {
        return status(401);
    }
    let behaviour = server.script[gets.min(server.script.len() - 1)];
    if let Behaviour::Status(code) = behaviour {
        return status(code);
    }
    if behaviour == Behaviour::Circle && request.method() == Method::GET {
        return Response::builder()
            .status(302)
            .header("location", request.uri().path())
            .body(Body::empty())
            .unwrap();
    }
    let total = server.content.len();
    let mut response = Response::builder().header("etag", "\"abc\"");
    if server.says_commit.load(Ordering::SeqCst) {
        let commit = "0123456789012345678901234567890123456789";
        response = response.header("x-repo-commit", commit);
    }
    if request.method() == Method::HEAD {
        return response
            .header("content-length", total)
            .body(Body::empty())
            .unwrap();
    }
    let range = header("range").filter(|_| behaviour != Behaviour::IgnoreRange);
    let mut content = server.content.clone();
    if let Behaviour::Flip(at) = behaviour {
        content[at] ^= 0x10;
    }
    let bytes = match range {
        Some(range) => {
            let (start, end) = range["bytes=".len()..].split_once('-').unwrap();
            let start: usize = start.parse().unwrap();
            let end = end.parse().map_or(total, |end: usize| end + 1);
            response = response.status(206).header(
                "content-range",
                format!("bytes {start}-{}/{total}", end - 1),
            );
            content[start..end].to_vec()
        }
        None => content,
    };
    let length = match behaviour {
        Behaviour::Huge => 1_000_000_000_000_000_000,
        _ => bytes.len(),
    };
    response = response.header("content-length", length);
    server.sent.fetch_add(bytes.len(), Ordering::SeqCst);
    let body = match behaviour {
        Behaviour::Huge => cut_body(bytes),
        Behaviour::CutAfter(count) => cut_body(bytes[..count].to_vec()),
        _ => Body::from(bytes),
    };
    response.body(body).unwrap()
}

/// Sends the bytes, then breaks the connection.
fn cut_body(bytes: Vec<u8>) -> Body {
    let pieces = [Ok(bytes), Err(std::io::Error::other("cut"))];
    let stream = futures::stream::unfold(pieces.into_iter(), |mut pieces| async move {
        let piece = pieces.next()?;
        if piece.is_err() {
            // Let the server hand on what came before.
            tokio::task::yield_now().await;
        }
        Some((piece, pieces))
    });
    Body::from_stream(stream)
}
