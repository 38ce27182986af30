//! The fake engine's process: arguments, life and death. See the library.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "like the real engine, it logs to stderr and answers on stdout"
)]

mod args;
mod calls;
mod completion;
mod forms;
mod routes;
mod shapes;
mod slots;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio, exit};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::serve::ListenerExt;
use test_harness_fake_engine::{GRANDCHILD_FILE, PORT_FILE, SCRIPT_FILE, STARTS_FILE, Script};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use args::Args;
use routes::Engine;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let home = home();
    let script = read_script(&home);
    let args = Args::parse(std::env::args().skip(1));
    if args.version {
        eprintln!(
            "version: 0.6.0-dev (build {}, commit {})",
            script.build, script.commit
        );
        eprintln!("built with fake-engine 0.1.0 for tests");
        return;
    }
    if args.list_devices {
        println!("Available devices:\n  (none)");
        return;
    }
    if let Some(flag) = &args.refused {
        eprintln!("error: invalid argument: {flag}");
        exit(1);
    }
    let starts = count_start(&home);
    // Handlers stand before the port is open, so a signal is never missed.
    obey_signals(script.ignore_term);
    eprintln!("0.00.000.001 I srv  llama_server: initializing ...");
    if script.grandchild {
        start_grandchild(&home);
    }
    let listener = match TcpListener::bind((args.host.as_str(), args.port)).await {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!(
                "0.00.000.002 E srv  start: couldn't bind HTTP server socket, hostname: {}, port: {}: {error}",
                args.host, args.port
            );
            exit(1);
        }
    };
    if let Ok(address) = listener.local_addr() {
        write_whole(&home.join(PORT_FILE), &address.port().to_string());
    }
    let engine = Arc::new(Engine::new(script, args, home));
    tokio::spawn(load(Arc::clone(&engine), starts));
    let counted = Arc::clone(&engine);
    let listener = listener.tap_io(move |stream| {
        counted.connections.fetch_add(1, Ordering::Relaxed);
        // Without it the kernel may join writes that a test wants apart.
        let _ = stream.set_nodelay(true);
    });
    if let Err(error) = axum::serve(listener, routes::router(engine)).await {
        eprintln!("0.00.000.003 E srv  server stopped: {error}");
        exit(1);
    }
}

/// Where the binary lies; the script and the notes lie beside it.
fn home() -> PathBuf {
    std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(Path::to_path_buf))
        .unwrap_or_else(|| PathBuf::from("."))
}

/// A binary without a script is a healthy engine. A script that cannot be read
/// is a mistake in the test, and must not look like a healthy engine.
fn read_script(home: &Path) -> Script {
    let path = home.join(SCRIPT_FILE);
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Script::default();
    };
    serde_json::from_str(&text).unwrap_or_else(|error| {
        eprintln!("{}: {error}", path.display());
        exit(64);
    })
}

/// Counts this start and says which one it is, from 1.
fn count_start(home: &Path) -> u64 {
    let path = home.join(STARTS_FILE);
    let earlier: u64 = std::fs::read_to_string(&path)
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0);
    write_whole(&path, &(earlier + 1).to_string());
    earlier + 1
}

/// A reader never sees half a file. A directory that cannot be written to only
/// costs the note.
fn write_whole(path: &Path, text: &str) {
    let staged = path.with_extension(format!("tmp{}", std::process::id()));
    if std::fs::write(&staged, text).is_ok() {
        let _ = std::fs::rename(&staged, path);
    }
}

fn start_grandchild(home: &Path) {
    let child = Command::new("sleep")
        .arg("1000")
        .stdin(Stdio::null())
        .spawn();
    match child {
        Ok(child) => write_whole(&home.join(GRANDCHILD_FILE), &child.id().to_string()),
        Err(error) => {
            eprintln!("no grandchild: {error}");
            exit(65);
        }
    }
}

fn obey_signals(ignore_term: bool) {
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let Ok(mut signals) = signal(kind) else {
            eprintln!("no handler for signal {kind:?}");
            exit(66);
        };
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                if !ignore_term {
                    eprintln!("0.00.000.004 I srv  operator(): cleaning up before exit...");
                    exit(0);
                }
                eprintln!("0.00.000.004 I srv  signal ignored, as the script says");
            }
        });
    }
}

/// Takes the time that loading takes, with or without a sign of progress.
async fn tell_progress(script: &Script) {
    let load = tokio::time::sleep(Duration::from_millis(script.load_ms));
    if script.log_every_ms == 0 {
        return load.await;
    }
    tokio::pin!(load);
    loop {
        tokio::select! {
            () = &mut load => return,
            () = tokio::time::sleep(Duration::from_millis(script.log_every_ms)) => {
                eprintln!("0.00.005.000 I llm    load_tensors: one more");
            }
        }
    }
}

/// Loads the model that is none.
async fn load(engine: Arc<Engine>, starts: u64) {
    let script = &engine.script;
    eprintln!(
        "0.00.003.000 I srv    load_model: loading model '{}'",
        engine.args.model
    );
    for line in 0..script.log_lines {
        eprintln!(
            "0.00.004.000 I llm    load_tensors: line {line:>9} of a flood that nobody reads but that must not block us"
        );
    }
    tell_progress(script).await;
    if script.load_hang {
        return;
    }
    let fails = script
        .failing_starts
        .is_none_or(|failing| starts <= failing);
    if let Some(failure) = script.load_failure.as_ref().filter(|_| fails) {
        eprintln!("{}", failure.message);
        exit(failure.exit_code);
    }
    engine.set_ready();
    eprintln!("0.00.250.000 I srv  llama_server: model loaded");
}
