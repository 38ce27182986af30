//! Mode `source` with a tiny source archive: real cmake, real ninja, a real compiler.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use llama_orch_types::{Hinted as _, ProvisioningMode};
use provision_kit::fs::sha256_bytes;
use provision_kit::progress::{ProgressEvent, Unit};
use provisioners_engine_provisioner::{
    ArchiveSource, EngineConfig, EngineError, GitSource, Mode, Source,
};
use support::fake_source::{FakeSource, entries, machine};
use support::{somebody_runs, until};

#[tokio::test]
async fn a_source_is_built_once() {
    let machine = machine();
    let source = FakeSource::new(&machine);
    let config = source.config();
    let provisioner = machine.provisioner();
    let first = provisioner.ensure(&config).await.unwrap();
    assert_eq!(
        (first.mode, first.version.as_str()),
        (ProvisioningMode::Source, "b7")
    );
    assert_eq!(
        entries(machine.cache.engines(), "build-"),
        0,
        "source and build are removed"
    );
    assert!(machine.recorder.saw(|event| matches!(
        event,
        ProgressEvent::Started {
            unit: Unit::BuildSteps,
            ..
        }
    )));
    assert!(machine.recorder.saw(|event| matches!(
        event,
        ProgressEvent::Advanced { done, total: Some(total), .. } if done == total && *total >= 4
    )));

    let second = provisioner.ensure(&config).await.unwrap();
    assert_eq!(second.mode, ProvisioningMode::Cache);
    assert_eq!(
        (&second.binary, second.digest),
        (&first.binary, first.digest)
    );
    let cached = EngineConfig {
        mode: Some(Mode::Cache),
        ..config
    };
    assert_eq!(provisioner.ensure(&cached).await.unwrap(), second);
    assert_eq!(source.counted(), 1);

    // An earlier version of ours may have named it otherwise.
    let directory = first.binary.parent().unwrap();
    let elsewhere = directory.with_file_name("b7-0123456789abcdef");
    std::fs::rename(directory, &elsewhere).unwrap();
    let source_again = EngineConfig {
        mode: Some(Mode::Source),
        ..cached
    };
    let third = provisioner.ensure(&source_again).await.unwrap();
    assert_eq!(third.binary, elsewhere.join("llama-server"));
    assert_eq!(source.counted(), 1);
}

/// Runs git in a directory; what it says.
fn git(directory: &std::path::Path, arguments: &[&str]) -> String {
    let output = std::process::Command::new("git")
        .args(["-c", "user.name=test", "-c", "user.email=test@localhost"])
        .args(arguments)
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn a_tag_is_taken_only_if_it_names_the_commit() {
    let machine = machine();
    let repository = machine.path().join("repository");
    std::fs::create_dir(&repository).unwrap();
    std::fs::write(repository.join("CMakeLists.txt"), "no cmake at all").unwrap();
    git(&repository, &["init", "--quiet"]);
    git(&repository, &["add", "."]);
    git(&repository, &["commit", "--quiet", "--message", "one"]);
    git(&repository, &["tag", "b7"]);
    let commit = git(&repository, &["rev-parse", "HEAD"]);
    let with = |tag: &str, commit: &str| {
        let mut config = FakeSource::new(&machine).config();
        config.version = "b7".into();
        config.source.sources = vec![Source::Git(GitSource {
            url: format!("file://{}", repository.display()),
            tag: tag.into(),
            commit: Some(commit.into()),
        })];
        config
    };
    let provisioner = machine.provisioner();
    let other = "0".repeat(40);
    let error = provisioner.ensure(&with("b7", &other)).await.unwrap_err();
    assert!(
        matches!(&error, EngineError::SourceCommit { found, .. } if *found == commit),
        "{error}"
    );
    assert!(!error.retriable());
    // The right one is taken as far as to CMake, which can do nothing with it.
    let error = provisioner.ensure(&with("b7", &commit)).await.unwrap_err();
    assert!(
        matches!(error, EngineError::Build { tool: "cmake", .. }),
        "{error}"
    );
    let missing = with("nightly", &commit);
    let error = provisioner.ensure(&missing).await.unwrap_err();
    assert!(matches!(error, EngineError::SourceGit { .. }), "{error}");
    assert!(!error.retriable(), "{error}");
}

#[tokio::test]
async fn two_at_once_build_once() {
    let machine = machine();
    let source = FakeSource::new(&machine);
    let config = source.config();
    std::fs::write(source.gate(), "").unwrap();
    let (one, other) = (machine.provisioner(), machine.provisioner());
    let open_gate = async {
        until("one waits", || {
            machine
                .recorder
                .notes()
                .iter()
                .any(|note| note.contains("waiting for it"))
        })
        .await;
        until("the build has begun", || source.counted() == 1).await;
        std::fs::remove_file(source.gate()).unwrap();
    };
    let (one, other, ()) = tokio::join!(one.ensure(&config), other.ensure(&config), open_gate);
    let (one, other) = (one.unwrap(), other.unwrap());
    assert_eq!(one.digest, other.digest);
    let mut modes = [one.mode.to_string(), other.mode.to_string()];
    modes.sort();
    assert_eq!(modes, ["cache", "source"]);
    assert_eq!(source.counted(), 1);
}

#[tokio::test]
async fn an_interrupted_build_leaves_no_engine_and_no_process_and_goes_on() {
    let machine = machine();
    let source = FakeSource::new(&machine);
    let config = source.config();
    std::fs::write(source.gate(), "").unwrap();
    let gate = source.gate().to_string_lossy().into_owned();
    let provisioner = machine.provisioner();
    tokio::select! {
        result = provisioner.ensure(&config) => panic!("the gate is shut: {result:?}"),
        () = until("the build waits", || source.counted() == 1 && somebody_runs(&gate)) => {}
    }
    until("ninja has ended its children", || !somebody_runs(&gate)).await;
    assert_eq!(entries(machine.cache.engines(), "build-"), 1);
    assert_eq!(entries(machine.cache.engines(), "b7-"), 0);
    let cached = EngineConfig {
        mode: Some(Mode::Cache),
        ..config.clone()
    };
    let error = provisioner.ensure(&cached).await.unwrap_err();
    assert!(matches!(error, EngineError::NotInCache { .. }), "{error}");

    std::fs::remove_file(source.gate()).unwrap();
    let installation = provisioner.ensure(&config).await.unwrap();
    assert_eq!(installation.mode, ProvisioningMode::Source);
    assert_eq!(source.counted(), 1, "what was built is not built again");
}

#[tokio::test]
async fn a_failing_build_shows_its_last_lines_and_keeps_its_log() {
    let machine = machine();
    let source = FakeSource {
        program: "int main() { return this_is_no_word; }".into(),
        ..FakeSource::new(&machine)
    };
    let error = machine
        .provisioner()
        .ensure(&source.config())
        .await
        .unwrap_err();
    let EngineError::Build {
        tool: "ninja",
        log,
        tail,
        ..
    } = &error
    else {
        panic!("{error}");
    };
    assert!(
        tail.iter().any(|line| line.contains("this_is_no_word")),
        "{tail:?}"
    );
    assert!(
        std::fs::read_to_string(log)
            .unwrap()
            .contains("this_is_no_word")
    );
    assert!(error.hint().is_some());
    assert_eq!(entries(machine.cache.engines(), "b7-"), 0);
}

#[tokio::test]
async fn a_source_with_another_digest_is_not_built() {
    let machine = machine();
    let source = FakeSource::new(&machine);
    let config = source.config();
    std::fs::write(machine.path().join("source.tar.gz"), "something else").unwrap();
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::SourceDigest { .. }), "{error}");
    assert_eq!(source.counted(), 0);
}

#[tokio::test]
async fn the_next_source_is_tried() {
    let machine = machine();
    let source = FakeSource::new(&machine);
    let mut config = source.config();
    let bad = Source::Archive(ArchiveSource {
        url: format!("file:{}/missing.tar.gz", machine.path().display()),
        digest: sha256_bytes(b"x"),
    });
    config.source.sources.insert(0, bad);
    // A missing file is told like any other: the next source is asked.
    let installation = machine.provisioner().ensure(&config).await;
    assert_eq!(installation.unwrap().mode, ProvisioningMode::Source);
}
