//! What is left of the program `engine-provisioner` when it is killed: nothing that runs.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use provision_kit::process::ProcessIdentity;
use support::{Machine, somebody_runs, until};
use test_harness_fake_engine::{GRANDCHILD_FILE, Script, grandchild, install};

/// How often each is killed.
const ROUNDS: u32 = 20;

/// A program in the machine's directory, so that its command line tells whose it is. It is never
/// written by this process: a fork of another thread would hold it open for writing.
fn tool(machine: &Machine, name: &str, script: &str) {
    let directory = machine.path().join("bin");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join(name);
    let staged = machine.path().join("staged");
    std::fs::write(&staged, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&staged, &path).unwrap();
}

/// A compiler that takes as long as it is told, in a session of its own, deaf to TERM.
fn compilers(machine: &Machine) -> String {
    let directory = machine.path().join("bin");
    std::fs::create_dir_all(&directory).unwrap();
    let copied = Command::new("cp")
        .args(["/bin/sleep", &directory.join("cc1plus").to_string_lossy()])
        .status();
    assert!(copied.unwrap().success());
    let compiler = directory.join("cc1plus");
    format!(
        "setsid sh -c 'trap \"\" TERM; {0} 600; {0} 600' >/dev/null 2>&1 &\n\
         sh -c '{0} 600 & {0} 600; wait' &",
        compiler.display()
    )
}

fn start(machine: &Machine, config: &str) -> Child {
    let path = machine.path().join("config.yaml");
    let text = format!(
        "cache_dir: {}\nruntime_dir: {}\n{config}\n",
        machine.cache.root().display(),
        machine.runtime.root().display(),
    );
    std::fs::write(&path, text).unwrap();
    let search = std::env::var("PATH").unwrap();
    Command::new(env!("CARGO_BIN_EXE_engine-provisioner"))
        .arg("--config")
        .arg(path)
        .env(
            "PATH",
            format!("{}:{search}", machine.path().join("bin").display()),
        )
        // As where an owner starts an owner: the inner one's mark counts for what it starts.
        .env("LLAMA_ORCH_OWNER", "1-1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// A moment between nothing and this.
fn some_time_of(most: Duration) -> Duration {
    let noise = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    most.mul_f64(f64::from(noise.unwrap().subsec_nanos() % 1000) / 1000.0)
}

/// Starts the program again and again, kills it at some moment before or shortly after it has come
/// as far as `is_far`, and waits until nothing of it runs.
#[allow(
    clippy::print_stdout,
    reason = "a measurement for whoever asks with --nocapture"
)]
async fn kill_at_random_moments(
    machine: &Machine,
    config: &str,
    rounds: u32,
    is_far: impl Fn() -> bool,
) {
    let marker = machine.path().to_string_lossy().into_owned();
    let begin = Instant::now();
    let mut child = start(machine, config);
    until("the first round is far", &is_far).await;
    let far = begin.elapsed();
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds {
        child.kill().unwrap();
        child.wait().unwrap();
        let killed = Instant::now();
        // The promise is two seconds; a busy machine gets more, and the test fails all the same if
        // anything stays.
        until("nothing of it runs", || !somebody_runs(&marker)).await;
        slowest = slowest.max(killed.elapsed());
        child = start(machine, config);
        tokio::time::sleep(some_time_of(far * 3 / 2)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    until("nothing of it runs", || !somebody_runs(&marker)).await;
    println!("killed {rounds} times within {far:?} and a half; gone after {slowest:?} at most");
}

#[tokio::test]
async fn a_killed_build_leaves_no_compiler_whatever_group_it_is_in() {
    let machine = Machine::new();
    let compilers = compilers(&machine);
    let reached = machine.path().join("ninja-runs");
    tool(
        &machine,
        "cmake",
        &format!(
            "test \"$1\" = --version && {{ echo 'cmake version 3.25.1'; exit; }}\n\
             {compilers}\nsleep 0.2\nexit 0"
        ),
    );
    tool(
        &machine,
        "ninja",
        &format!(
            "test \"$1\" = --version && {{ echo 1.11.1; exit; }}\n\
             trap '' TERM\n{compilers}\ntouch {}\nwait",
            reached.display()
        ),
    );
    let source = machine.path().join("source");
    std::fs::create_dir(&source).unwrap();
    std::fs::write(source.join("CMakeLists.txt"), "").unwrap();
    let archive = machine.path().join("source.tar");
    let packed = Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(machine.path())
        .arg("source")
        .status();
    assert!(packed.unwrap().success());
    let (digest, _) = provision_kit::fs::sha256_file(&archive).unwrap();
    let config = format!(
        "provision:\n  mode: source\n  version: b7\n  source:\n    sources:\n      - archive:\n          \
         url: file:{}\n          digest: {digest}",
        archive.display()
    );
    kill_at_random_moments(&machine, &config, ROUNDS, || reached.exists()).await;
}

#[tokio::test]
async fn a_killed_fetch_leaves_no_pip() {
    let machine = Machine::new();
    let compilers = compilers(&machine);
    let reached = machine.path().join("pip-runs");
    for name in ["cmake", "ninja"] {
        tool(&machine, name, "echo version 3.25.1");
    }
    tool(
        &machine,
        "python3",
        &format!(
            "test \"$3\" = --version && {{ echo pip 25; exit; }}\n{compilers}\ntouch {}\nwait",
            reached.display()
        ),
    );
    let config = "provision:\n  mode: source";
    kill_at_random_moments(&machine, config, 6, || reached.exists()).await;
}

#[tokio::test]
async fn a_killed_program_leaves_nothing_of_its_engine() {
    let machine = Machine::new();
    let compilers = compilers(&machine);
    let real = machine.path().join("real");
    let script = Script {
        grandchild: true,
        load_ms: 200,
        ..Script::default()
    };
    let engine = install(&real, &script);
    // The engine is a script's process, and has relatives in groups of their own.
    tool(
        &machine,
        "llama-server",
        &format!(
            "test \"$1\" = --version && exec {0} --version\n\
             test \"$1\" = --list-devices && exit\n{compilers}\nexec {0} \"$@\"",
            engine.display()
        ),
    );
    let model = machine.path().join("model.gguf");
    write_model(&model);
    let config = format!(
        "provision:\n  path: {}\nmodel: {}",
        machine.path().join("bin/llama-server").display(),
        model.display()
    );
    let sleeper = || grandchild(&real).and_then(|pid| ProcessIdentity::of(pid).ok().flatten());
    let is_sleep =
        |one: &ProcessIdentity| one.exe.ends_with("sleep") || one.exe.ends_with("coreutils");
    kill_at_random_moments(&machine, &config, ROUNDS, || machine.handoff().exists()).await;
    assert!(real.join(GRANDCHILD_FILE).exists());
    until("the engine's child ends", || {
        !sleeper().as_ref().is_some_and(is_sleep)
    })
    .await;
}

/// The smallest file that is a model's: a header with neither tensors nor facts.
fn write_model(path: &Path) {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend([0; 16]);
    std::fs::write(path, bytes).unwrap();
}
