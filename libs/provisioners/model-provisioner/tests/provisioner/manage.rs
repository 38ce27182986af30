//! Models at hand: shown, verified, mended, removed.

use llama_orch_types::Hinted;
use provision_kit::download::CHUNK_BYTES;
use provision_kit::progress::ProgressEvent;
use provisioners_model_provisioner::provenance::How;
use provisioners_model_provisioner::{Condition, ModelError};

use crate::bench::{Behaviour, Bench, Server, large_model, model};
use crate::mend::spoil;

#[tokio::test]
async fn a_model_is_shown_with_its_names_and_whether_it_is_in_use() {
    let (bytes, digest) = model();
    let (address, _server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/dir/m.gguf")]);
    let user = bench.provisioner();
    user.ensure("tiny").await.unwrap();
    let own = bench.write("own.gguf", &model().0[..]);
    bench.ensure(own.to_str().unwrap()).await.unwrap();
    let other = bench.provisioner();
    for name in ["tiny", &digest.hex()[..6], "m.gguf"] {
        let entry = other.entry(name).await.unwrap();
        assert!(entry.stored && entry.in_use, "{name}: {entry:?}");
        assert_eq!(entry.profiles, ["tiny"]);
        assert_eq!(entry.record.stamp.size_bytes, bytes.len() as u64);
    }
    // The same bytes, where somebody keeps them.
    let entry = other.entry("own.gguf").await.unwrap();
    assert!(!entry.stored && !entry.in_use);
    drop(user);
    assert!(!other.entry("tiny").await.unwrap().in_use);
    assert!(matches!(
        other.entry("tinny").await,
        Err(ModelError::NotHere { .. })
    ));
}

#[tokio::test]
async fn a_model_in_use_stays_and_then_goes_with_all_that_is_known_of_it() {
    let (bytes, digest) = large_model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf");
    let user = bench.provisioner();
    let path = user.ensure(&reference).await.unwrap().path;
    let manager = bench.provisioner();
    let error = manager.remove(&reference).await.unwrap_err();
    assert!(matches!(error, ModelError::InUse { .. }), "{error:?}");
    assert!(error.retriable() && error.hint().is_some() && path.exists());
    // Whoever tidies up is no user of it.
    manager.verify("m.gguf", false).await.unwrap();
    drop(user);
    let removed = manager.remove("m.gguf").await.unwrap();
    assert_eq!((removed.digest, &removed.kept_file), (digest, &None));
    assert!(removed.bytes_freed > bytes.len() as u64);
    assert!(removed.names.contains(&reference));
    assert!(bench.stored().is_empty() && bench.downloads().is_empty());
    let left = std::fs::read_dir(bench.cache().models().join("records")).unwrap();
    assert_eq!(left.count(), 0);
    assert!(manager.remove("m.gguf").await.is_err());
    // It comes again as if it had never been here.
    server.sent();
    bench.ensure(&reference).await.unwrap();
    assert_eq!(server.sent(), bytes.len());
}

#[tokio::test]
async fn a_file_of_somebody_elses_is_forgotten_and_stays() {
    let bench = Bench::new();
    let own = bench.write("own.gguf", &model().0[..]);
    let manager = bench.provisioner();
    manager.ensure(own.to_str().unwrap()).await.unwrap();
    let removed = manager.remove("own.gguf").await.unwrap();
    assert_eq!(removed.bytes_freed, 0);
    assert_eq!(removed.kept_file, Some(own.canonicalize().unwrap()));
    assert!(own.exists() && manager.list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_sound_model_is_read_whole_and_marked() {
    let (bytes, _) = model();
    let (address, _server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    bench.ensure(&format!("{address}/m.gguf")).await.unwrap();
    let manager = bench.provisioner();
    let before = manager.entry("m.gguf").await.unwrap().record.verified_at;
    let verified = manager.verify("m.gguf", false).await.unwrap();
    assert_eq!(verified.condition, Condition::Sound);
    assert_eq!(verified.bytes, bytes.len() as u64);
    assert!(manager.entry("m.gguf").await.unwrap().record.verified_at > before);
    let whole = bytes.len() as u64;
    let read = |event: &ProgressEvent| matches!(event, ProgressEvent::Advanced { done, total: Some(total), .. } if (*done, *total) == (whole, whole));
    assert!(bench.recorder.events().iter().any(read));
}

/// A disk that forgets changes no time of a file: only reading it again tells.
#[tokio::test]
async fn a_spoilt_model_is_told_marked_and_mended() {
    let (bytes, digest) = large_model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let path = bench.ensure("tiny").await.unwrap().path;
    spoil(&path, CHUNK_BYTES + 1);
    // As a disk would do it: the record says that nothing changed.
    let entry = bench.provisioner().entry("tiny").await.unwrap();
    let record = bench.cache().models().join("records");
    let record = record.join(format!("{}.json", digest.hex()));
    let mut json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&record).unwrap()).unwrap();
    let stamp = provisioners_model_provisioner::store::FileStamp::of(&entry.record.path).unwrap();
    json["stamp"] = serde_json::to_value(stamp).unwrap();
    std::fs::write(&record, json.to_string()).unwrap();
    server.sent();
    bench.ensure("tiny").await.unwrap();
    assert_eq!(server.sent(), 0, "nothing tells that it is spoilt");

    let manager = bench.provisioner();
    let seen = manager.verify("tiny", false).await.unwrap();
    assert!(matches!(seen.condition, Condition::Spoilt { actual } if actual != digest));
    assert!(
        manager
            .entry("tiny")
            .await
            .unwrap()
            .record
            .spoilt_since
            .is_some()
    );
    assert_eq!(server.sent(), 0);
    let mended = manager.verify(&digest.hex()[..8], true).await.unwrap();
    assert!(matches!(mended.condition, Condition::Mended { .. }));
    assert!(std::fs::read(&path).unwrap() == bytes);
    assert_eq!(server.sent(), CHUNK_BYTES as usize);
    let entry = manager.entry("tiny").await.unwrap();
    assert_eq!(entry.record.spoilt_since, None);
    let names = entry.record.references;
    assert!(
        !names.iter().any(|name| digest.hex().starts_with(name)),
        "{names:?}"
    );
    assert_eq!(bench.provenance().last().unwrap().how, How::Mended);
    assert!(bench.downloads().is_empty());
    let again = manager.verify("tiny", true).await.unwrap();
    assert_eq!(again.condition, Condition::Sound);

    // A model that is only marked is mended before it is used again.
    spoil(&path, 9);
    manager.verify("tiny", false).await.unwrap();
    bench.ensure("tiny").await.unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[tokio::test]
async fn a_spoilt_model_without_a_source_stays_and_says_why() {
    let (bytes, _) = model();
    let script = [Behaviour::Honest, Behaviour::Status(404)];
    let (address, _server) = Server::start(&bytes, &script).await;
    let bench = Bench::new();
    let path = bench
        .ensure(&format!("{address}/m.gguf"))
        .await
        .unwrap()
        .path;
    spoil(&path, 9);
    let manager = bench.provisioner();
    let error = manager.verify("m.gguf", true).await.unwrap_err();
    assert!(
        matches!(
            error,
            ModelError::Changed {
                repair: Some(_),
                ..
            }
        ),
        "{error:?}"
    );
    assert!(path.exists());
    let own = bench.write("own.gguf", &bytes);
    manager.ensure(own.to_str().unwrap()).await.unwrap();
    spoil(&own, 9);
    let seen = manager.verify("own.gguf", true).await.unwrap();
    assert!(matches!(seen.condition, Condition::Spoilt { .. }));
}

#[tokio::test]
async fn references_are_known_by_what_they_want() {
    let (_, digest) = model();
    let mut bench = Bench::new();
    bench.profile(digest, None, &["/x.gguf"]);
    let manager = bench.provisioner();
    let identity = |reference: &str| manager.identify(reference).unwrap();
    assert_eq!(identity("tiny").key, digest.hex());
    assert_eq!(
        identity("hf:o/r/m.gguf").key,
        identity(" hf:o/r/m.gguf ").key
    );
    assert_ne!(
        identity("hf:o/r/m.gguf").key,
        identity("hf:o/r@b/m.gguf").key
    );
    assert!(!identity("tiny").has_secret);
    // Written in another way, and secret in none.
    assert!(!identity("https://HOST/m.gguf").has_secret);
    let signed = identity("https://host/m.gguf?sig=secret");
    assert!(
        signed.has_secret && !signed.id.contains("secret"),
        "{signed:?}"
    );
    assert!(manager.identify("nobody").is_err());
    assert!(manager.identify("ftp:x").is_err());
}
