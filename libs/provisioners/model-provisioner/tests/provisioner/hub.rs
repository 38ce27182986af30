//! `hf:` against a small server that speaks the calls the crate makes.

use axum::http::Method;
use llama_orch_types::Hinted;
use provisioners_model_provisioner::ModelError;
use provisioners_model_provisioner::fetch::{FetchError, HubProblem};

use crate::bench::{Behaviour, Bench, Server, model};
use crate::gguf::Gguf;

const PINNED: &str = "hf:owner/repo@0123456789012345678901234567890123456789/sub/tiny.gguf";

async fn bench_with(content: &[u8], script: &[Behaviour]) -> (Bench, std::sync::Arc<Server>) {
    let (address, server) = Server::start(content, script).await;
    let mut bench = Bench::new();
    bench.hub = address;
    (bench, server)
}

fn problem(error: &ModelError) -> HubProblem {
    match error {
        ModelError::Fetch {
            source: FetchError::Hub { problem, .. },
            ..
        } => *problem,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_whole_file() {
    let (bytes, digest) = model();
    let (bench, server) = bench_with(&bytes, &[Behaviour::Honest]).await;
    let model = bench
        .ensure("hf:owner/repo@v1/sub/tiny.gguf")
        .await
        .unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(std::fs::read(&model.path).unwrap(), bytes);
    let requests = server.requests();
    assert_eq!(requests[0].0, Method::HEAD);
    assert_eq!(requests[0].1, "/owner/repo/resolve/v1/sub/tiny.gguf");
    // What is fetched is the commit that the tag meant then.
    for (_, path, _) in &requests[1..] {
        let commit = "0123456789012345678901234567890123456789";
        assert_eq!(*path, format!("/owner/repo/resolve/{commit}/sub/tiny.gguf"));
    }
    assert!(bench.downloads().is_empty());
}

#[tokio::test]
async fn a_cut_is_continued() {
    let (bytes, digest) = model();
    let (bench, server) =
        bench_with(&bytes, &[Behaviour::CutAfter(1_000_000), Behaviour::Honest]).await;
    let model = bench.ensure(PINNED).await.unwrap();
    assert_eq!(model.digest, digest);
    let ranges = server.ranges();
    assert_eq!(ranges[0], None);
    let continued = ranges[1].as_ref().unwrap();
    assert!(
        continued.ends_with(&format!("-{}", bytes.len() - 1)),
        "{continued}"
    );
}

#[tokio::test]
async fn a_cut_of_a_branch_is_continued_at_the_same_commit_only() {
    let (bytes, digest) = model();
    let cut = Behaviour::CutAfter(1_000_000);
    for says_commit in [true, false] {
        let (bench, server) = bench_with(&bytes, &[cut, Behaviour::Honest]).await;
        server.says_commit(says_commit);
        let model = bench.ensure("hf:owner/repo@main/tiny.gguf").await.unwrap();
        assert_eq!(model.digest, digest);
        let gets: Vec<_> = server
            .requests()
            .into_iter()
            .filter(|(method, ..)| *method == Method::GET)
            .map(|(_, path, headers)| (path.contains("/main/"), headers.contains_key("range")))
            .collect();
        let again = (!says_commit, says_commit);
        assert_eq!(gets, [(!says_commit, false), again]);
    }
}

#[tokio::test]
async fn another_process_continues_a_pinned_file_only() {
    let (bytes, digest) = model();
    for (reference, continued) in [(PINNED, true), ("hf:owner/repo/tiny.gguf", false)] {
        let cut = Behaviour::CutAfter(1_000_000);
        let (mut bench, server) = bench_with(&bytes, &[cut, Behaviour::Honest]).await;
        bench.config.attempts = 1;
        let error = bench.ensure(reference).await.unwrap_err();
        assert_eq!(problem(&error), HubProblem::Unavailable);
        assert!(error.retriable());
        assert!(bench.stored().is_empty());
        assert_eq!(bench.ensure(reference).await.unwrap().digest, digest);
        assert_eq!(server.ranges()[1].is_some(), continued, "{reference}");
        assert!(bench.downloads().is_empty());
    }
}

#[tokio::test]
async fn a_hub_that_ignores_the_range_sends_it_all_again() {
    let (bytes, digest) = model();
    let script = [Behaviour::CutAfter(1_000_000), Behaviour::IgnoreRange];
    let (bench, server) = bench_with(&bytes, &script).await;
    let model = bench.ensure(PINNED).await.unwrap();
    assert_eq!(model.digest, digest);
    assert_eq!(std::fs::read(&model.path).unwrap(), bytes);
    assert_eq!(server.ranges().last().unwrap(), &None);
}

#[tokio::test]
async fn an_error_page_is_never_taken_for_a_model() {
    let (bytes, _) = model();
    for (status, expected) in [
        (401, HubProblem::Unauthorized),
        (403, HubProblem::Unauthorized),
        (404, HubProblem::NotFound),
        (500, HubProblem::Unavailable),
    ] {
        let (bench, _) = bench_with(&bytes, &[Behaviour::Status(status)]).await;
        let error = bench.ensure(PINNED).await.unwrap_err();
        assert_eq!(problem(&error), expected, "{status}");
        assert!(error.to_string().contains("sub/tiny.gguf"), "{error}");
        assert!(error.hint().is_some());
        assert!(bench.stored().is_empty());
        assert_eq!(error.retriable(), status == 500);
    }
}

#[tokio::test]
async fn a_redirect_that_is_not_followed_is_final() {
    let (bytes, _) = model();
    let (bench, _) = bench_with(&bytes, &[Behaviour::Circle]).await;
    let error = bench.ensure(PINNED).await.unwrap_err();
    assert_eq!(problem(&error), HubProblem::Other, "{error:?}");
    assert!(!error.retriable());
}

#[tokio::test]
async fn the_token_opens_and_is_never_shown() {
    let (bytes, digest) = model();
    let (address, _) = Server::start_for(&bytes, &[Behaviour::Honest], Some("hf_right")).await;
    let mut bench = Bench::new();
    bench.hub = address;
    bench.token = Some("hf_wrong");
    let provisioner = bench.provisioner();
    let error = provisioner.ensure(PINNED).await.unwrap_err();
    assert_eq!(problem(&error), HubProblem::Unauthorized);
    assert!(error.hint().unwrap().contains("HF_TOKEN"));
    let shown = format!("{error:?} {provisioner:?} {:?}", bench.recorder.events());
    assert!(!shown.contains("hf_wrong"), "{shown}");
    bench.token = Some("hf_right");
    assert_eq!(bench.ensure(PINNED).await.unwrap().digest, digest);
}

#[tokio::test]
async fn a_wrong_digest_or_length_leaves_nothing() {
    let (bytes, digest) = model();
    let other = Gguf::tiny().bytes();
    let (mut bench, _) = bench_with(&other, &[Behaviour::Honest]).await;
    bench.profile(digest, None, &[PINNED]);
    let error = bench.ensure("tiny").await.unwrap_err();
    assert!(
        matches!(&error, ModelError::Fetch { source: FetchError::WrongDigest { expected, .. }, .. } if *expected == digest),
        "{error:?}"
    );
    bench.profile(digest, Some(bytes.len() as u64), &[PINNED]);
    let error = bench.ensure("tiny").await.unwrap_err();
    assert!(
        matches!(
            &error,
            ModelError::Fetch {
                source: FetchError::WrongSize { .. },
                ..
            }
        ),
        "{error:?}"
    );
    assert!(bench.stored().is_empty());
}

#[tokio::test]
async fn a_file_too_large_for_the_disk_is_not_begun() {
    let (bytes, _) = model();
    let (bench, server) = bench_with(&bytes, &[Behaviour::Huge]).await;
    let error = bench.ensure(PINNED).await.unwrap_err();
    assert!(
        matches!(
            &error,
            ModelError::Fetch {
                source: FetchError::NoSpace { .. },
                ..
            }
        ),
        "{error:?}"
    );
    // Worth another start once somebody has freed space, not another request now.
    assert!(error.retriable());
    assert_eq!(server.gets(), 1);
    assert!(error.hint().unwrap().contains("free at least"));
}

#[tokio::test]
async fn bytes_of_an_earlier_transfer_that_are_wrong_are_fetched_anew() {
    let (bytes, digest) = model();
    let (mut bench, server) = bench_with(&bytes, &[Behaviour::Honest]).await;
    bench.profile(digest, Some(bytes.len() as u64), &[PINNED]);
    std::fs::create_dir_all(bench.cache().downloads()).unwrap();
    let part = bench
        .cache()
        .downloads()
        .join(format!("model-{}.part", digest.hex()));
    std::fs::write(&part, vec![0; 1000]).unwrap();
    assert_eq!(bench.ensure("tiny").await.unwrap().digest, digest);
    assert_eq!(server.ranges().len(), 2);
    assert!(server.ranges()[0].is_some() && server.ranges()[1].is_none());
}
