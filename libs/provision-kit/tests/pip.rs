//! The machine's pip, fed from a directory of ours instead of an index.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::Path;
use std::time::Duration;

use llama_orch_types::{Digest, Hinted};
use provision_kit::fs::sha256_file;
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
        .download_wheel("tiny-model", "1.0", &destination)
        .await
        .unwrap();
    assert_eq!(file, destination.join("tiny_model-1.0-py3-none-any.whl"));
    assert_eq!(std::fs::read_dir(&destination).unwrap().count(), 1);
    let target = dir.path().join("target");
    // A setting that contradicts a target.
    let settings = dir.path().join("pip.conf");
    std::fs::write(&settings, "[install]\nuser = true\n").unwrap();
    let pip = pip.with_env("PIP_CONFIG_FILE", settings.to_str().unwrap());
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
        .download_wheel("no-such-package", "1.0", &dir.path().join("d"))
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
            .download_wheel(package, version, here)
            .await
            .unwrap_err();
        assert!(matches!(error, PipError::BadRequirement { .. }), "{error}");
        let requirement = format!("{package}=={version}");
        let error = pip.install_target(&[&requirement], here).await.unwrap_err();
        assert!(matches!(error, PipError::BadRequirement { .. }), "{error}");
    }
    assert!(!here.exists());
}

/// A source distribution whose build program leaves a mark when it is run.
fn make_sdist(directory: &Path, mark: &Path) -> Digest {
    let backend = format!(
        r#"
import os
open("{}", "w").close()
def prepare_metadata_for_build_wheel(directory, settings=None):
    os.mkdir(os.path.join(directory, "tiny_source-1.0.dist-info"))
    with open(os.path.join(directory, "tiny_source-1.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\nName: tiny-source\nVersion: 1.0\n")
    return "tiny_source-1.0.dist-info"
"#,
        mark.display()
    );
    let project = "[build-system]\nrequires = []\nbuild-backend = \"backend\"\nbackend-path = [\".\"]\n\
                   [project]\nname = \"tiny-source\"\nversion = \"1.0\"\n";
    let path = directory.join("tiny_source-1.0.zip");
    let mut sdist = zip::ZipWriter::new(std::fs::File::create(&path).unwrap());
    let options = zip::write::SimpleFileOptions::default();
    for (name, content) in [
        ("tiny_source-1.0/pyproject.toml", project),
        ("tiny_source-1.0/backend.py", &backend),
    ] {
        sdist.start_file(name, options).unwrap();
        sdist.write_all(content.as_bytes()).unwrap();
    }
    sdist.finish().unwrap();
    sha256_file(&path).unwrap().0
}

#[tokio::test]
async fn nothing_of_a_source_distribution_runs_before_its_digest_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("it-ran");
    let digest = make_sdist(dir.path(), &mark);
    let pip = offline_pip(dir.path()).await;
    let destination = dir.path().join("downloads");
    let fetch = |digest| {
        pip.download_pinned(
            "tiny-source",
            "1.0",
            PipArtifact::Sdist,
            digest,
            &destination,
        )
    };
    let other = Digest::from_bytes([7; 32]);
    let error = fetch(other).await.unwrap_err();
    assert!(
        matches!(&error, PipError::WrongDigest { expected, .. } if *expected == other),
        "{error}"
    );
    assert!(error.to_string().contains(&digest.hex()), "{error}");
    assert!(!error.retriable() && error.hint().is_some());
    assert!(!mark.exists());
    assert_eq!(std::fs::read_dir(&destination).unwrap().count(), 0);

    let file = fetch(digest).await.unwrap();
    assert_eq!(file, destination.join("tiny_source-1.0.zip"));
    assert_eq!(std::fs::read_dir(&destination).unwrap().count(), 1);
    // It does leave its mark, so that the check above can tell.
    assert!(mark.exists());
}

#[tokio::test]
async fn a_wheel_may_be_pinned_too() {
    let dir = tempfile::tempdir().unwrap();
    make_wheel(dir.path());
    let wheel = dir.path().join("tiny_model-1.0-py3-none-any.whl");
    let (digest, _) = sha256_file(&wheel).unwrap();
    let pip = offline_pip(dir.path()).await;
    let destination = dir.path().join("downloads");
    let fetch = |digest| {
        pip.download_pinned(
            "tiny-model",
            "1.0",
            PipArtifact::Wheel,
            digest,
            &destination,
        )
    };
    let error = fetch(Digest::from_bytes([7; 32])).await.unwrap_err();
    assert!(matches!(error, PipError::WrongDigest { .. }), "{error}");
    let file = fetch(digest).await.unwrap();
    assert_eq!(std::fs::read(file).unwrap(), std::fs::read(wheel).unwrap());
}

/// Names the file where the inner run of the next test leaves what pip saw.
const SEEN: &str = "PROVISION_KIT_TEST_SEEN";

#[tokio::test]
async fn secrets_of_ours_are_kept_from_pip() {
    let Ok(seen) = std::env::var(SEEN) else {
        // Only a process of its own can be given another environment.
        let dir = tempfile::tempdir().unwrap();
        let seen = dir.path().join("seen");
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "secrets_of_ours_are_kept_from_pip"])
            .env(SEEN, &seen)
            .env("HF_TOKEN", "secret-1")
            .env("ORCHD_LISTEN", "secret-2")
            .env("SOME_API_KEY", "secret-3")
            .env("PIP_INDEX_URL", "https://index.example.org")
            .env("HTTPS_PROXY", "http://proxy.example.org")
            .status()
            .unwrap();
        assert!(status.success());
        let seen = std::fs::read_to_string(seen).unwrap();
        assert!(!seen.contains("secret-"), "{seen}");
        assert!(seen.contains("index.example.org") && seen.contains("proxy.example.org"));
        assert!(seen.contains("SET_TOKEN=on-purpose"), "{seen}");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let script = format!("env > {seen}");
    let pip = Pip::from_command(&["sh", "-c", &script]).with_env("SET_TOKEN", "on-purpose");
    pip.install_target(&["a"], dir.path()).await.unwrap();
}

#[tokio::test]
async fn what_a_killed_pip_left_is_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let pip = Pip::from_command(&["false"]);
    let age = |name: &str, age: Duration| {
        let path = dir.path().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("a.whl"), "x").unwrap();
        let directory = std::fs::File::open(&path).unwrap();
        directory
            .set_modified(std::time::SystemTime::now() - age)
            .unwrap();
        path
    };
    let dead = age(".pip-4194305-x", Duration::ZERO);
    let live = age(".pip-1-x", Duration::ZERO);
    let old = age(".pip-old", Duration::from_hours(48));
    let new = age(".pip-new", Duration::ZERO);
    let other = age("other", Duration::from_hours(48));
    pip.download_wheel("a", "1", dir.path()).await.unwrap_err();
    assert!(!old.exists() && new.exists() && other.exists());
    // Above the kernel's largest possible process id: whoever made it is gone.
    assert!(!dead.exists() && live.exists());
}

#[tokio::test]
async fn a_pip_that_hangs_is_ended_with_all_it_started() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("sleep 60 & echo $! > {}; wait", pid_file.display());
    // Long enough for a slow machine to have started the program.
    let pip = Pip::from_command(&["sh", "-c", &script]).with_timeout(Duration::from_secs(3));
    let error = pip
        .download_wheel("a", "1", &dir.path().join("d"))
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
