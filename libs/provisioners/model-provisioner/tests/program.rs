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

/// Answers every request with what is made of it, and closes the connection.
fn serve(answer: impl Fn(&str) -> Vec<u8> + Send + 'static) -> String {
    use std::io::{Read as _, Write as _};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut request = Vec::new();
            let mut piece = [0; 1024];
            while !request.ends_with(b"\r\n\r\n") {
                match connection.read(&mut piece) {
                    Ok(count @ 1..) => request.extend_from_slice(&piece[..count]),
                    _ => break,
                }
            }
            // A client that has heard enough may be gone.
            let _ = connection.write_all(&answer(&String::from_utf8_lossy(&request)));
        }
    });
    address
}

/// What the program says and writes of a download that fails holds neither the Hub's token nor what an address hides.
#[test]
fn a_failing_download_never_says_a_secret() {
    const TOKEN: &str = "hf_FakeTokenOfTheTest0123456789";
    let head = move |status: &str| {
        format!("HTTP/1.1 {status}\r\ncontent-length: 5000\r\nconnection: close\r\netag: \"a\"\r\nx-repo-commit: 0123456789012345678901234567890123456789\r\n\r\n")
            .into_bytes()
    };
    for status in ["401 Unauthorized", "500 Internal Server Error", "200 OK"] {
        let dir = tempfile::tempdir().unwrap();
        let address = serve(move |_| head(status));
        for reference in [
            "hf:owner/repo/tiny.gguf".to_owned(),
            format!("{address}/tiny.gguf?sig={TOKEN}"),
        ] {
            let config = format!(
                "models:\n  stall_timeout_seconds: 2\n  attempts: 1\nensure: ['{reference}']\n"
            );
            std::fs::write(dir.path().join("models.yaml"), config).unwrap();
            let output = Command::new(env!("CARGO_BIN_EXE_model-provisioner"))
                .args(["--config", "models.yaml", "ensure"])
                .current_dir(dir.path())
                .env("XDG_CACHE_HOME", dir.path().join("cache"))
                .env("HF_TOKEN", TOKEN)
                .env("HF_ENDPOINT", &address)
                .output()
                .unwrap();
            let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
            assert!(!output.status.success(), "{said}");
            let lines: Vec<_> = said.lines().filter(|line| line.contains(TOKEN)).collect();
            assert!(lines.is_empty(), "{lines:#?}");
            for file in walk(dir.path()) {
                let written = std::fs::read(&file).unwrap();
                let secret = written
                    .windows(TOKEN.len())
                    .any(|part| part == TOKEN.as_bytes());
                // The user's own configuration holds what the user wrote.
                assert!(
                    !secret || file.ends_with("models.yaml"),
                    "{}",
                    file.display()
                );
            }
        }
    }
}

fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(directory).unwrap();
    entries
        .flat_map(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path)
            } else {
                vec![path]
            }
        })
        .collect()
}

/// A file system that takes no more bytes in the middle of a download: what has
/// arrived is kept, and the next start goes on from there.
#[test]
fn a_download_that_finds_no_room_is_kept_and_continued() {
    use std::fmt::Write as _;
    let mut file = Gguf::tiny();
    file.tensor("blk.0.weight", &[3_000_000], 0, 12_000_000);
    let bytes = file.bytes();
    let length = bytes.len();
    let (seen, starts) = std::sync::mpsc::channel();
    let answer = move |request: &str| {
        let from = request
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("range: bytes=")
                    .map(str::to_owned)
            })
            .map(|range| range.trim_end_matches('-').parse::<usize>().unwrap());
        let start = from.unwrap_or(0);
        let mut answer = match from {
            Some(_) => "HTTP/1.1 206 Partial Content\r\n".to_owned(),
            None => "HTTP/1.1 200 OK\r\n".to_owned(),
        };
        write!(
            answer,
            "connection: close\r\netag: \"a\"\r\ncontent-length: {}\r\n",
            length - start
        )
        .unwrap();
        if from.is_some() {
            write!(
                answer,
                "content-range: bytes {start}-{}/{length}\r\n",
                length - 1
            )
            .unwrap();
        }
        let mut answer = format!("{answer}\r\n").into_bytes();
        answer.extend(&bytes[start..]);
        let _ = seen.send(start);
        answer
    };
    let address = serve(answer);
    let dir = tempfile::tempdir().unwrap();
    let mut config = String::new();
    writeln!(config, "ensure: ['{address}/tiny.gguf']").unwrap();
    std::fs::write(dir.path().join("models.yaml"), config).unwrap();
    let run = |limit: &str| {
        // 512-byte blocks in `sh`. Ignored signals stay ignored, and the write fails.
        let script = format!("trap '' XFSZ; ulimit -f {limit}; exec \"$@\"");
        Command::new("sh")
            .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_model-provisioner")])
            .args(["--config", "models.yaml", "ensure"])
            .current_dir(dir.path())
            .env("XDG_CACHE_HOME", dir.path().join("cache"))
            .output()
            .unwrap()
    };
    // Between the first chunk's end and the file's.
    let output = run("20000");
    let said = text(&output.stderr);
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("bytes are free") && said.contains("ulimit -f"),
        "{said}"
    );
    let output = run("unlimited");
    assert!(output.status.success(), "{}", text(&output.stderr));
    let starts: Vec<usize> = starts.try_iter().collect();
    assert!(starts[0] == 0 && starts.len() == 2, "{starts:?}");
    // The first chunk at least needed not come again.
    assert!(starts[1] >= 8 * 1024 * 1024, "{starts:?}");
}

/// Killed in the middle of a download: the next start goes on behind the last
/// chunk of which the digest was written down.
#[test]
fn a_killed_download_is_gone_on_with() {
    use std::io::{Read as _, Write as _};
    const CHUNK: usize = 8 * 1024 * 1024;
    let mut file = Gguf::tiny();
    file.tensor("blk.0.weight", &[6_000_000], 0, 24_000_000);
    let bytes = file.bytes();
    let length = bytes.len();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let config = format!("ensure: ['{address}/tiny.gguf']\n");
    std::fs::write(dir.path().join("models.yaml"), config).unwrap();
    let start = || {
        Command::new(env!("CARGO_BIN_EXE_model-provisioner"))
            .args(["--config", "models.yaml", "ensure"])
            .current_dir(dir.path())
            .env("XDG_CACHE_HOME", dir.path().join("cache"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let accept = || {
        let (mut connection, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let count = connection.read(&mut request).unwrap();
        let request = String::from_utf8_lossy(&request[..count]).to_ascii_lowercase();
        (connection, request)
    };
    let mut killed = start();
    let (mut connection, request) = accept();
    assert!(!request.contains("range:"), "{request}");
    let head = format!("HTTP/1.1 200 OK\r\netag: \"a\"\r\ncontent-length: {length}\r\n\r\n");
    connection.write_all(head.as_bytes()).unwrap();
    // Two chunks and some of the third, and then nothing.
    connection
        .write_all(&bytes[..2 * CHUNK + 3_000_000])
        .unwrap();
    let downloads = dir.path().join("cache/llama-orch/downloads");
    let lines = || {
        let files = std::fs::read_dir(&downloads)
            .into_iter()
            .flatten()
            .flatten();
        files
            .filter(|file| file.path().extension().is_some_and(|kind| kind == "chunks"))
            .filter_map(|file| std::fs::read_to_string(file.path()).ok())
            .map(|text| text.lines().count())
            .sum::<usize>()
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_mins(1);
    while lines() < 3 {
        assert!(
            std::time::Instant::now() < deadline,
            "two chunks never arrived"
        );
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    killed.kill().unwrap();
    killed.wait().unwrap();

    let again = start();
    let (mut connection, request) = accept();
    assert!(
        request.contains(&format!("range: bytes={}-\r\n", 2 * CHUNK)),
        "{request}"
    );
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\netag: \"a\"\r\ncontent-range: bytes {}-{}/{length}\r\ncontent-length: {}\r\n\r\n",
        2 * CHUNK,
        length - 1,
        length - 2 * CHUNK
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(&bytes[2 * CHUNK..]).unwrap();
    let output = again.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(std::fs::read_dir(&downloads).unwrap().count(), 0);
}
