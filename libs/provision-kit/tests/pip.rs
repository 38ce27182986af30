//! The machine's pip, fed from a directory of ours instead of an index.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use llama_orch_types::Hinted;
use provision_kit::pip::{Pip, PipArtifact, PipError};

/// A wheel is a zip archive with a few files of metadata.
fn make_wheel(directory: &Path) {
    let path = directory.join("tiny_model-1.0-py3-none-any.whl");
    let mut wheel = zip::ZipWriter::new(std::fs::File::create(path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    for (name, content) in [
        ("tiny_model/data.txt", "hello"),
        (
            "tiny_model-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n",
        ),
        (
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        ),
        ("tiny_model-1.0.dist-info/RECORD", ""),
    ] {
        wheel.start_file(name, options).unwrap();
        wheel.write_all(content.as_bytes()).unwrap();
    }
    wheel.finish().unwrap();
}

async fn offline_pip(index: &Path) -> Pip {
    let pip = Pip::find().await.unwrap();
    pip.with_env("PIP_NO_INDEX", "1")
        .with_env("PIP_FIND_LINKS", index.to_str().unwrap())
        .with_env("PIP_CONFIG_FILE", "/dev/null")
}

#[tokio::test]
async fn a_wheel_is_downloaded_whole_and_a_package_is_unpacked() {
    let dir = tempfile::tempdir().unwrap();
    make_wheel(dir.path());
    let pip = offline_pip(dir.path()).await;
    let destination = dir.path().join("downloads");
    let file = pip
        .download("tiny-model", "1.0", PipArtifact::Wheel, &destination)
        .await
        .unwrap();
    assert_eq!(file, destination.join("tiny_model-1.0-py3-none-any.whl"));
    assert_eq!(std::fs::read_dir(&destination).unwrap().count(), 1);
    let target = dir.path().join("target");
    pip.install_target(&["tiny-model==1.0"], &target)
        .await
        .unwrap();
    assert_eq!(
        std::fs::read_to_string(target.join("tiny_model/data.txt")).unwrap(),
        "hello"
    );
}

#[tokio::test]
async fn what_pip_says_is_in_the_error() {
    let dir = tempfile::tempdir().unwrap();
    let pip = offline_pip(dir.path()).await;
    let error = pip
        .download(
            "no-such-package",
            "1.0",
            PipArtifact::Wheel,
            &dir.path().join("d"),
        )
        .await
        .unwrap_err();
    assert!(matches!(error, PipError::Failed { .. }), "{error}");
    assert!(
        error
            .to_string()
            .contains("No matching distribution found for no-such-package==1.0"),
        "{error}"
    );
    assert!(error.hint().is_some());
    assert_eq!(std::fs::read_dir(dir.path().join("d")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_is_no_name_never_reaches_pip() {
    let pip = Pip::from_command(&["false"]);
    let here = Path::new("unused");
    for (package, version) in [
        ("--index-url=x", "1"),
        ("a", "1 --pre"),
        ("../a", "1"),
        ("", "1"),
        ("a", ""),
    ] {
        let error = pip
            .download(package, version, PipArtifact::Wheel, here)
            .await
            .unwrap_err();
        assert!(matches!(error, PipError::BadRequirement { .. }), "{error}");
        let requirement = format!("{package}=={version}");
        let error = pip.install_target(&[&requirement], here).await.unwrap_err();
        assert!(matches!(error, PipError::BadRequirement { .. }), "{error}");
    }
    assert!(!here.exists());
}

#[tokio::test]
async fn a_pip_that_hangs_is_ended_with_all_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("sleep 60 & echo $! > {}; wait", pid_file.display());
    let pip = Pip::from_command(&["sh", "-c", &script]).with_timeout(Duration::from_millis(500));
    let error = pip
        .download("a", "1", PipArtifact::Wheel, &dir.path().join("d"))
        .await
        .unwrap_err();
    assert!(matches!(error, PipError::TimedOut { .. }), "{error}");
    let grandchild: i32 = std::fs::read_to_string(&pid_file)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while is_running(grandchild) {
        assert!(
            std::time::Instant::now() < deadline,
            "{grandchild} outlived its pip"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A dead process that nobody has waited for yet is not running.
fn is_running(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        !stat
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with('Z')
    })
}
