//! `https:` and `file:` sources, profiles, and what is refused.

use llama_orch_types::Hinted;
use provision_kit::fs::sha256_bytes;
use provision_kit::progress::{ProgressEvent, StepKind, Unit};
use provisioners_model_provisioner::provenance::How;
use provisioners_model_provisioner::verify::{SignatureRejected, SignatureVerifier, SignedModel};
use provisioners_model_provisioner::{ModelError, VerifyPolicy};

use crate::bench::{Behaviour, Bench, Server, model};
use crate::gguf::Gguf;

#[tokio::test]
async fn a_web_file_becomes_a_stored_model_with_facts_and_provenance() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/tiny.gguf");
    let model = bench.ensure(&reference).await.unwrap();
    assert_eq!(model.id, reference);
    assert_eq!(model.digest, digest);
    assert_eq!(model.size_bytes, bytes.len() as u64);
    assert_eq!(model.architecture.as_deref(), Some("llama"));
    assert_eq!(model.quantization.as_deref(), Some("Q4_1"));
    assert_eq!(model.ctx_max, Some(8192));
    assert_eq!(model.parameter_count, Some(256 + 300_000));
    assert_eq!(std::fs::read(&model.path).unwrap(), bytes);
    assert!(
        model
            .path
            .ends_with(format!("models/sha256/{}", digest.hex()))
    );
    assert!(bench.downloads().is_empty());

    // A second time, from another process as it were, asks nobody.
    bench.ensure(&reference).await.unwrap();
    assert_eq!(server.gets(), 1);
    let provenance = bench.provenance();
    assert_eq!(provenance.len(), 2);
    assert_eq!(
        (provenance[0].how, provenance[1].how),
        (How::Fetched, How::Cached)
    );
    assert_eq!(provenance[1].source, reference);
    assert_eq!(provenance[1].digest, digest);

    let events = bench.recorder.events();
    let started = |event: &&ProgressEvent| {
        matches!(
            event,
            ProgressEvent::Started {
                kind: StepKind::ModelFetch,
                unit: Unit::Bytes,
                ..
            }
        )
    };
    assert_eq!(events.iter().filter(started).count(), 2);
    let whole = Some(bytes.len() as u64);
    assert!(events.iter().any(|event| matches!(
        event,
        ProgressEvent::Advanced { done, total, .. } if Some(*done) == whole && *total == whole
    )));
    assert!(matches!(
        events.last(),
        Some(ProgressEvent::Finished { .. })
    ));
}

#[tokio::test]
async fn sources_are_tried_in_order_and_only_the_digest_decides() {
    let (bytes, digest) = model();
    let (missing, _) = Server::start(&bytes, &[Behaviour::Status(404)]).await;
    let (wrong, _) = Server::start(&Gguf::tiny().bytes(), &[Behaviour::Honest]).await;
    let (right, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    let local = bench.write("wrong.gguf", &Gguf::tiny().bytes());
    let sources = [
        format!("{missing}/m.gguf"),
        format!("{wrong}/m.gguf"),
        local.display().to_string(),
        format!("{right}/m.gguf"),
    ];
    bench.profile(digest, None, &sources.each_ref().map(String::as_str));
    let model = bench.ensure("tiny").await.unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(model.id, "tiny");
    let notes = bench.recorder.notes();
    assert_eq!(notes.len(), 3, "{notes:?}");
    assert!(notes[0].contains("404"), "{notes:?}");
    assert!(
        notes[1].contains("digest") && notes[2].contains("digest"),
        "{notes:?}"
    );
    assert!(notes.iter().all(|note| !note.contains('\n')));
    assert_eq!(bench.provenance()[0].source, sources[3]);
}

#[tokio::test]
async fn when_no_source_serves_each_one_is_named() {
    let (bytes, digest) = model();
    let (missing, _) = Server::start(&bytes, &[Behaviour::Status(404)]).await;
    let mut bench = Bench::new();
    let first = format!("{missing}/m.gguf");
    bench.profile(digest, None, &[&first, "/no/such/m.gguf"]);
    let error = bench.ensure("tiny").await.unwrap_err();
    assert!(matches!(&error, ModelError::AllSources { attempts, .. } if attempts.len() == 2));
    let text = error.to_string();
    assert!(
        text.contains(&first) && text.contains("404") && text.contains("/no/such/m.gguf"),
        "{text}"
    );
    assert!(error.hint().is_some());
    assert!(bench.stored().is_empty());
    assert!(matches!(
        bench.recorder.events().last(),
        Some(ProgressEvent::Failed { .. })
    ));
}

#[tokio::test]
async fn a_wrong_digest_leaves_nothing_under_a_final_name() {
    let (bytes, digest) = model();
    let mut other = bytes.clone();
    *other.last_mut().unwrap() ^= 1;
    let (address, _) = Server::start(&other, &[Behaviour::Honest]).await;
    let mut bench = Bench::new();
    bench.profile(digest, None, &[&format!("{address}/m.gguf")]);
    let error = bench.ensure("tiny").await.unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(
        text.contains(&digest.to_string()) && text.contains(&sha256_bytes(&other).to_string()),
        "{text}"
    );
    assert!(!error.retriable());
    assert!(bench.stored().is_empty() && bench.downloads().is_empty());
    // `verify: off` lets it through, under the digest that it has.
    bench.config.verify = VerifyPolicy::Off;
    let model = bench.ensure("tiny").await.unwrap();
    assert_eq!(model.digest, sha256_bytes(&other));
    assert_eq!(bench.ensure("tiny").await.unwrap(), model);
    assert_eq!(bench.provenance()[1].how, How::Cached);
}

#[tokio::test]
async fn a_truncated_or_foreign_file_is_refused_with_the_reason() {
    let (bytes, _) = model();
    let bench = Bench::new();
    for (content, sign) in [
        (&bytes[..bytes.len() / 2], "truncated"),
        (b"<html>sorry</html>", "`<htm`"),
    ] {
        let (address, _) = Server::start(content, &[Behaviour::Honest]).await;
        let reference = format!("{address}/m.gguf");
        let error = bench.ensure(&reference).await.unwrap_err();
        assert!(
            matches!(&error, ModelError::Gguf { file, .. } if *file == reference),
            "{error}"
        );
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains(sign), "{source}");
        assert!(error.hint().is_some());
    }
    assert!(bench.stored().is_empty() && bench.downloads().is_empty());
}

#[tokio::test]
async fn a_part_of_a_split_model_is_refused() {
    let mut file = Gguf::tiny();
    file.pair("split.count", crate::gguf::number(3));
    let (address, _) = Server::start(&file.bytes(), &[Behaviour::Honest]).await;
    let error = Bench::new()
        .ensure(&format!("{address}/m.gguf"))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ModelError::Split { count: 3, .. }),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("--merge"));
}

#[tokio::test]
async fn a_local_file_is_used_where_it_lies() {
    let (bytes, digest) = model();
    let bench = Bench::new();
    let path = bench.write("own.gguf", &bytes);
    let model = bench.ensure(&path.display().to_string()).await.unwrap();
    assert_eq!(model.path, path.canonicalize().unwrap());
    assert_eq!(model.digest, digest);
    assert!(bench.stored().is_empty());
    assert_eq!(bench.provenance()[0].how, How::InPlace);
    assert_eq!(
        bench.provisioner().list().await.unwrap()[0].path,
        model.path
    );
    // Changed by its owner: hashed again and taken as it is now.
    let tiny = Gguf::tiny().bytes();
    std::fs::write(&path, &tiny).unwrap();
    let model = bench.ensure(&path.display().to_string()).await.unwrap();
    assert_eq!(model.digest, sha256_bytes(&tiny));
    // Cut off: refused.
    std::fs::write(&path, &bytes[..1000]).unwrap();
    let error = bench.ensure(&path.display().to_string()).await.unwrap_err();
    assert!(matches!(error, ModelError::Gguf { .. }), "{error}");
    let error = bench.ensure("no/such.gguf").await.unwrap_err();
    assert!(error.to_string().contains("no/such.gguf"), "{error}");
}

#[tokio::test]
async fn a_local_source_that_served_once_needs_no_network() {
    let (bytes, digest) = model();
    let (address, server) = Server::start(&bytes, &[Behaviour::Status(404)]).await;
    let mut bench = Bench::new();
    let path = bench.write("own.gguf", &bytes).display().to_string();
    bench.profile(digest, None, &[&format!("{address}/m.gguf"), &path]);
    bench.ensure("tiny").await.unwrap();
    assert_eq!(server.gets(), 1);
    bench.ensure("tiny").await.unwrap();
    assert_eq!(server.gets(), 1);
    // The profile pins it: a changed file does not serve any more.
    std::fs::write(&path, Gguf::tiny().bytes()).unwrap();
    let error = bench.ensure("tiny").await.unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
}

#[tokio::test]
async fn a_signed_address_is_recorded_and_shown_without_its_signature() {
    let (bytes, _) = model();
    let (address, server) =
        Server::start(&bytes, &[Behaviour::Status(503), Behaviour::Honest]).await;
    let bench = Bench::new();
    let reference = format!("{address}/m.gguf?sig=hidden");
    let model = bench.ensure(&reference).await.unwrap();
    assert!(
        model.id.starts_with(&format!("{address}/m.gguf?…")),
        "{}",
        model.id
    );
    // The same address finds it again, another one of the same path does not.
    bench.ensure(&reference).await.unwrap();
    assert_eq!(server.gets(), 2);
    bench
        .ensure(&format!("{address}/m.gguf?sig=hidden2"))
        .await
        .unwrap();
    assert_eq!(server.gets(), 3);
    let missing = format!("{address}x/m.gguf?sig=hidden");
    let error = bench.ensure(&missing).await.unwrap_err();
    let shown = format!("{model:?} {error} {error:?} {:?}", bench.recorder.events());
    assert!(!shown.contains("hidden"), "{shown}");
    let mut read = 0;
    let mut directories = vec![bench.dir.path().to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
                continue;
            }
            let content = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
            assert!(!content.contains("hidden"), "{}: {content}", path.display());
            read += 1;
        }
    }
    assert!(read > 3);
}

#[cfg(feature = "hf")]
#[tokio::test]
async fn what_one_source_noted_goes_with_its_bytes() {
    let (bytes, digest) = model();
    let (web, _) = Server::start(&bytes, &[Behaviour::CutAfter(1_000_000)]).await;
    let (hub, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    for verify in [VerifyPolicy::Off, VerifyPolicy::WhenKnown] {
        let mut bench = Bench::new();
        bench.config.verify = verify;
        bench.hub.clone_from(&hub);
        bench.profile(digest, None, &[&format!("{web}/m.gguf"), "hf:o/r/m.gguf"]);
        assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
        assert!(bench.downloads().is_empty(), "{:?}", bench.downloads());
    }
}

#[tokio::test]
async fn nobody_there_is_a_network_problem_with_a_way_out() {
    let bench = Bench::new();
    let error = bench.ensure("http://127.0.0.1:1/m.gguf").await.unwrap_err();
    assert!(error.retriable());
    assert!(error.hint().unwrap().contains("network"));
    assert!(bench.stored().is_empty());
}

#[tokio::test]
async fn unknown_names_and_missing_digests_are_refused_before_anything_is_done() {
    let mut bench = Bench::new();
    let error = bench.ensure("haikou").await.unwrap_err();
    assert!(matches!(error, ModelError::UnknownProfile { .. }));
    assert!(error.hint().unwrap().contains("`haiku`"));
    bench.config.verify = VerifyPolicy::Required;
    let error = bench
        .ensure("https://example.org/m.gguf")
        .await
        .unwrap_err();
    assert!(
        matches!(error, ModelError::DigestRequired { .. }),
        "{error}"
    );
    assert!(!bench.cache().root().exists());
}

#[derive(Debug)]
struct Nobody;

impl SignatureVerifier for Nobody {
    fn verify(&self, model: SignedModel<'_>) -> Result<(), SignatureRejected> {
        assert!(model.path.is_file());
        Err(SignatureRejected {
            reason: format!("nobody signed {}", model.digest),
        })
    }
}

#[tokio::test]
async fn an_unsigned_model_is_refused_where_a_verifier_says_so() {
    let (bytes, digest) = model();
    let (address, _) = Server::start(&bytes, &[Behaviour::Honest]).await;
    let bench = Bench::new();
    let provisioner = bench
        .provisioner()
        .with_signature_verifier(std::sync::Arc::new(Nobody));
    let error = provisioner
        .ensure(&format!("{address}/m.gguf"))
        .await
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(source, format!("nobody signed {digest}"));
    assert!(bench.stored().is_empty() && bench.downloads().is_empty());
}
