//! `orchestratord models`, beside a daemon and without one.

use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use test_harness_fake_engine::Script;

use crate::server::Server;
use crate::support::{Daemon, Setup, output, wait};
use crate::{model, spoil};

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs it and wants it to succeed. Off the runtime: the server of the test
/// runs there.
async fn good(work: impl FnOnce() -> Output + Send + 'static) -> String {
    let output = tokio::task::spawn_blocking(work).await.unwrap();
    assert!(output.status.success(), "{}{}", out(&output), err(&output));
    out(&output)
}

fn setup() -> Setup {
    Setup::new(&Script::default())
}

/// Everything from pull to removal, with `run` as the program.
async fn one_life(run: impl Fn(&[&str]) -> Output + Send + Clone + 'static) {
    let bytes = model(11);
    let (address, server) = Server::start(&bytes, true).await;
    let reference = format!("{address}/m.gguf");
    let run_with = |args: &[&str]| {
        let (run, args) = (
            run.clone(),
            args.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>(),
        );
        move || run(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let pulled = good(run_with(&["models", "pull", &reference])).await;
    assert!(
        pulled.contains("24.00 MiB") && pulled.contains("sha256"),
        "{pulled}"
    );
    let listed = good(run_with(&["models", "list"])).await;
    assert!(listed.starts_with("NAME"), "{listed}");
    assert!(listed.contains("m.gguf"), "{listed}");
    let listed = good(run_with(&["models", "list", "--json"])).await;
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let ours = |model: &&Value| model["size_bytes"] == bytes.len();
    let path = listed["models"]
        .as_array()
        .unwrap()
        .iter()
        .find(ours)
        .unwrap()["path"]
        .clone();
    let path = std::path::PathBuf::from(path.as_str().unwrap());
    let shown = good(run_with(&["models", "show", "m.gguf"])).await;
    assert!(
        shown.contains(&reference) && shown.contains("4096 tokens"),
        "{shown}"
    );
    let sound = good(run_with(&["models", "verify", "m.gguf"])).await;
    assert!(sound.contains("is sound"), "{sound}");

    spoil(&path, 9 << 20);
    let spoilt = tokio::task::spawn_blocking(run_with(&["models", "verify", "m.gguf"]));
    let spoilt = spoilt.await.unwrap();
    assert_eq!(spoilt.status.code(), Some(1));
    assert!(
        err(&spoilt).contains("is spoilt") && err(&spoilt).contains("--repair"),
        "{}",
        err(&spoilt)
    );
    server.sent();
    let mended = good(run_with(&[
        "models", "verify", "m.gguf", "--repair", "--json",
    ]))
    .await;
    let mended: Value = serde_json::from_str(&mended).unwrap();
    assert_eq!(mended[0]["condition"], "mended");
    assert_eq!(server.sent(), 8 << 20);
    assert!(std::fs::read(&path).unwrap() == bytes);

    let removed = good(run_with(&["models", "remove", "m.gguf"])).await;
    assert!(removed.contains("freed") && !path.exists(), "{removed}");
    let again = tokio::task::spawn_blocking(run_with(&["models", "remove", "m.gguf"]));
    let again = again.await.unwrap();
    assert_eq!(again.status.code(), Some(1));
    assert!(err(&again).contains("hint:"), "{}", err(&again));
    // One that cannot be had holds up none.
    let mixed = run_with(&["models", "pull", "hiku", &reference, "--json"]);
    let mixed = tokio::task::spawn_blocking(mixed).await.unwrap();
    assert_eq!(mixed.status.code(), Some(1));
    assert!(
        err(&mixed).contains("did you mean `haiku`"),
        "{}",
        err(&mixed)
    );
    let pulled: Value = serde_json::from_str(&out(&mixed)).unwrap();
    assert_eq!(pulled[0]["size_bytes"], bytes.len());
}

#[tokio::test]
async fn models_are_looked_after_without_a_daemon() {
    let setup = std::sync::Arc::new(setup());
    one_life(move |args| output(&setup, args)).await;
}

#[tokio::test]
async fn models_are_looked_after_through_a_daemon() {
    let daemon = std::sync::Arc::new(setup().start());
    let beside = std::sync::Arc::clone(&daemon);
    one_life(move |args| beside.beside(args)).await;
    let pulls = daemon.get_json("/v2/catalog/pulls").await;
    assert_eq!(
        pulls["pulls"].as_array().unwrap().len(),
        2,
        "it was the owner: {pulls}"
    );
}

/// Whether the first whole chunk of a file has come and is noted, so that it is
/// gone on with. The note is written after its bytes.
fn chunk_has_come(downloads: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(downloads) else {
        return false;
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut notes = paths.filter(|path| path.extension().is_some_and(|it| it == "chunks"));
    notes.any(|path| {
        let notes = std::fs::read_to_string(path).unwrap_or_default();
        let whole = |line: &str| line.starts_with("0 8388608 ");
        notes
            .split_inclusive('\n')
            .any(|line| whole(line) && line.ends_with('\n'))
    })
}

/// Begins a pull that comes to its half, and interrupts the program.
async fn interrupted(mut command: std::process::Command, downloads: &Path) -> Output {
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let begun = std::time::Instant::now();
    while !chunk_has_come(downloads) {
        assert!(begun.elapsed() < crate::support::DEADLINE);
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let pid = Pid::from_raw(child.id().cast_signed());
    // It listens by then: what it watches has begun.
    kill(pid, Signal::SIGINT).unwrap();
    wait(&mut child);
    child.wait_with_output().unwrap()
}

#[tokio::test]
async fn an_interrupted_pull_goes_on_next_time() {
    let bytes = model(12);
    let (address, server) = Server::start(&bytes, false).await;
    let reference = format!("{address}/m.gguf");
    let setup = setup();
    let stopped = interrupted(
        setup.command(&["models", "pull", &reference]),
        &setup.cache_dir().join("downloads"),
    )
    .await;
    assert_eq!(stopped.status.code(), Some(130), "{}", err(&stopped));
    assert!(
        err(&stopped).contains("goes on with it"),
        "{}",
        err(&stopped)
    );
    server.let_through();
    let again = reference.clone();
    good(move || output(&setup, &["models", "pull", &again])).await;
    assert!(
        *server.begins().last().unwrap() > 0,
        "{:?}",
        server.begins()
    );
}

#[tokio::test]
async fn an_interrupted_look_leaves_the_daemons_pull_running() {
    let bytes = model(13);
    let (address, _server) = Server::start(&bytes, false).await;
    let reference = format!("{address}/m.gguf?sig=hidden");
    let daemon = setup().start();
    let command = daemon.command_beside(&["models", "pull", &reference]);
    let stopped = interrupted(command, &daemon.cache_dir().join("downloads")).await;
    assert_eq!(stopped.status.code(), Some(130), "{}", err(&stopped));
    assert!(err(&stopped).contains("models cancel"), "{}", err(&stopped));
    assert!(!err(&stopped).contains("hidden"), "{}", err(&stopped));
    let pulls = daemon.get_json("/v2/catalog/pulls").await;
    assert_eq!(pulls["pulls"][0]["state"], "running");
    let shown = pulls["pulls"][0]["model"].clone();
    let daemon = std::sync::Arc::new(daemon);
    let beside = |args: &[&str]| {
        let daemon: std::sync::Arc<Daemon> = std::sync::Arc::clone(&daemon);
        let args: Vec<String> = args.iter().map(|it| (*it).to_owned()).collect();
        move || daemon.beside(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    let cancelled = good(beside(&["models", "cancel", &reference])).await;
    assert!(cancelled.contains("is cancelled"), "{cancelled}");
    let nothing = tokio::task::spawn_blocking(beside(&["models", "cancel", &reference]));
    let nothing = nothing.await.unwrap();
    assert_eq!(nothing.status.code(), Some(1));
    let missing = tokio::task::spawn_blocking(beside(&["models", "remove", &reference]));
    let missing = missing.await.unwrap();
    assert_eq!(missing.status.code(), Some(1));
    for said in [err(&nothing), err(&missing), daemon.log()] {
        assert!(!said.contains("hidden"), "{said}");
    }
    let begun = good(beside(&[
        "models",
        "pull",
        "--no-wait",
        "--json",
        &reference,
    ]))
    .await;
    let begun: Value = serde_json::from_str(&begun).unwrap();
    assert_eq!(begun[0]["model"], shown);
    assert!(
        begun[0]["pull_id"].is_string() && begun[0]["path"].is_null(),
        "{begun}"
    );
}

#[tokio::test]
async fn a_killed_daemon_is_not_waited_for() {
    let mut daemon = setup().ready().await;
    daemon.signal(Signal::SIGKILL);
    daemon.wait();
    let listed = good(move || daemon.beside(&["models", "list"])).await;
    assert!(listed.contains("0 of 1 in the store"), "{listed}");
}
