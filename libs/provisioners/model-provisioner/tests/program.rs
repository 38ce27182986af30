//! The program `model-provisioner` as people call it.

// The lint spares test functions only; here everything is test.
#![allow(clippy::unwrap_used)]

#[path = "support/gguf.rs"]
mod gguf;

use std::path::Path;
use std::process::{Command, Output};

use gguf::Gguf;

fn run(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_model-provisioner"))
        .args(arguments)
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn ensure_list_and_evict() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("own.gguf"), Gguf::tiny().bytes()).unwrap();
    let config = "ensure: [./own.gguf]\nmodels:\n  max_cache_bytes: 1\n";
    std::fs::write(dir.path().join("models.yaml"), config).unwrap();

    let output = run(dir.path(), &["--config", "models.yaml", "ensure"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let path = dir.path().canonicalize().unwrap().join("own.gguf");
    assert_eq!(
        text(&output.stdout),
        format!("./own.gguf → {}\n", path.display())
    );
    assert!(text(&output.stderr).contains("done: model ./own.gguf"));
    assert!(
        dir.path()
            .join(".runtime/provenance/models.jsonl")
            .is_file()
    );

    let output = run(dir.path(), &["list"]);
    let line = text(&output.stdout);
    assert!(
        line.contains(path.to_str().unwrap()) && line.contains("llama Q4_1"),
        "{line}"
    );
    let output = run(dir.path(), &["list", "--json"]);
    let records: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(records[0]["facts"]["ctx_max"], 8192);

    // A file that lies elsewhere is not the store's to remove.
    let output = run(
        dir.path(),
        &["--config", "models.yaml", "evict", "--dry-run"],
    );
    assert_eq!(
        text(&output.stdout),
        "the store: 0.0 MB before, 0.0 MB after\n"
    );
    assert!(path.is_file());
}

/// As on a small container image.
fn run_without_certificates(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_model-provisioner"))
        .args(arguments)
        .current_dir(dir)
        .env("XDG_CACHE_HOME", dir.join("cache"))
        .env("SSL_CERT_FILE", dir.join("none"))
        .env("SSL_CERT_DIR", dir.join("none"))
        .output()
        .unwrap()
}

#[test]
fn without_certificates_what_is_here_works_and_the_rest_says_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("own.gguf"), Gguf::tiny().bytes()).unwrap();
    let output = run_without_certificates(dir.path(), &["ensure", "./own.gguf"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let output = run_without_certificates(dir.path(), &["ensure", "http://127.0.0.1:1/m.gguf"]);
    let error = text(&output.stderr);
    assert!(!output.status.success());
    assert!(error.contains("cannot make an HTTP client"), "{error}");
    assert!(
        error.contains("hint: install") && error.contains("ca-certificates"),
        "{error}"
    );
}

#[test]
fn an_error_says_what_why_and_what_to_try() {
    let dir = tempfile::tempdir().unwrap();
    let output = run(dir.path(), &["ensure", "haikoo"]);
    assert_eq!(output.status.code(), Some(1));
    let error = text(&output.stderr);
    assert_eq!(
        error,
        "error: no model profile is named `haikoo`\nhint: did you mean `haiku`? Known: haiku\n"
    );

    std::fs::write(dir.path().join("cut.gguf"), &Gguf::tiny().bytes()[..200]).unwrap();
    let error = text(&run(dir.path(), &["ensure", "cut.gguf"]).stderr);
    assert!(error.contains("cut.gguf is no usable GGUF file"), "{error}");
    assert!(
        error.contains("because: it ends in the middle of its header, after 200 bytes"),
        "{error}"
    );
    assert!(error.contains("hint: "), "{error}");

    std::fs::write(dir.path().join("bad.yaml"), "models:\n  verfy: off\n").unwrap();
    let error = text(&run(dir.path(), &["--config", "bad.yaml", "list"]).stderr);
    assert!(
        error.starts_with("error: bad.yaml:2:3: unknown key `verfy`\nhint: did you mean `verify`?"),
        "{error}"
    );

    let error = text(&run(dir.path(), &["ensure"]).stderr);
    assert!(error.contains("model-provisioner ensure haiku"), "{error}");
}

#[test]
fn help_teaches() {
    let dir = tempfile::tempdir().unwrap();
    let help = text(&run(dir.path(), &["--help"]).stdout);
    for word in [
        "hf:owner/repo",
        "pip:package==version",
        "evict --dry-run",
        "max_cache_bytes",
    ] {
        assert!(help.contains(word), "{word}");
    }
}
