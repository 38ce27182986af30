//! With real children: small shell scripts.

use super::output::OUTPUT_LIMIT;
use super::*;
use std::time::Instant;
use tokio::io::{AsyncBufReadExt as _, BufReader};

const LONG: Duration = Duration::from_secs(10);

fn shell(script: &str) -> CommandSpec {
    CommandSpec::new("sh").arg("-c").arg(script)
}

/// Starts a script that prints process ids (and `ready` or the like) as its first line.
async fn started(spec: CommandSpec) -> (ChildGroup, Vec<u32>) {
    let mut group = spawn(spec).await.unwrap();
    let mut lines = BufReader::new(group.take_stdout().unwrap()).lines();
    let line = tokio::time::timeout(LONG, lines.next_line())
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    let pids = line
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    (group, pids)
}

async fn gone(identity: &ProcessIdentity) {
    let deadline = Instant::now() + LONG;
    while identity.is_alive() {
        assert!(Instant::now() < deadline, "{identity:?} is still there");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity::of(pid).unwrap().expect("process is there")
}

#[tokio::test]
async fn terminate_reaches_grandchildren() {
    let (mut group, pids) = started(shell("sleep 600 & echo $! ; wait")).await;
    let grandchild = identity(pids[0]);
    let ended = group.terminate(LONG).await.unwrap();
    assert!(!ended.killed);
    gone(&grandchild).await;
}

#[tokio::test]
async fn a_group_that_ignores_term_is_killed() {
    let (mut group, pids) = started(shell(
        "trap '' TERM; (while :; do sleep 600; done) & echo $! ; while :; do sleep 600; done",
    ))
    .await;
    let grandchild = identity(pids[0]);
    let ended = group.terminate(Duration::from_millis(50)).await.unwrap();
    assert!(ended.killed);
    gone(&grandchild).await;
}

#[tokio::test]
async fn a_leader_that_ends_takes_its_group_along() {
    let (mut group, pids) = started(shell("sleep 600 >/dev/null 2>&1 & echo $! ; exit 7")).await;
    let status = tokio::time::timeout(LONG, group.wait()).await.unwrap();
    assert_eq!(status.unwrap().code(), Some(7));
    // It may already have been killed before we could look.
    if let Some(grandchild) = ProcessIdentity::of(pids[0]).unwrap() {
        gone(&grandchild).await;
    }
    assert_eq!(group.wait().await.unwrap().code(), Some(7), "asked again");
}

#[tokio::test]
async fn drop_kills() {
    let (group, pids) = started(shell("sleep 600 & echo $! ; wait")).await;
    let (leader, grandchild) = (identity(group.pid()), identity(pids[0]));
    drop(group);
    gone(&leader).await;
    gone(&grandchild).await;
}

#[tokio::test]
async fn drop_lets_a_terminating_leader_tidy_up() {
    let directory = std::env::temp_dir().join(format!("kit-drop-{}", std::process::id()));
    // The builtin `wait` is interrupted by the signal: nothing has to be started or to end first.
    let script = format!(
        "trap 'echo tidy > {0}; exit 0' TERM; sleep 600 & echo ready; wait",
        directory.display()
    );
    let (group, _) = started(shell(&script).death_signal(DeathSignal::Terminate)).await;
    let leader = identity(group.pid());
    drop(group);
    gone(&leader).await;
    assert_eq!(std::fs::read_to_string(&directory).unwrap(), "tidy\n");
    std::fs::remove_file(&directory).unwrap();
}

#[tokio::test]
async fn a_dropped_start_leaves_no_child() {
    // The future is dropped before the spawner has answered; the child it may still start is
    // dropped with the answer.
    let marker = format!("6{:05}.25", std::process::id() % 100_000);
    drop(
        tokio::time::timeout(
            Duration::ZERO,
            spawn(CommandSpec::new("sleep").arg(&marker)),
        )
        .await,
    );
    // Requests are served in order: this one's answer says the first was served.
    assert!(
        output(CommandSpec::new("true"), LONG)
            .await
            .unwrap()
            .status
            .success()
    );
    let deadline = Instant::now() + LONG;
    while somebody_runs(&marker) {
        assert!(Instant::now() < deadline, "the child is still there");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn somebody_runs(argument: &str) -> bool {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .any(|line| {
            line.split(|byte| *byte == 0)
                .any(|word| word == argument.as_bytes())
        })
}

#[tokio::test]
async fn output_is_kept_apart_and_bounded() {
    let run = output(shell("echo out; echo err >&2; exit 3"), LONG)
        .await
        .unwrap();
    assert_eq!(
        (run.stdout.as_str(), run.stderr.as_str()),
        ("out\n", "err\n")
    );
    assert_eq!(run.status.code(), Some(3));

    let flood = output(shell("head -c 3000000 /dev/zero"), LONG)
        .await
        .unwrap();
    assert_eq!(flood.stdout.len(), OUTPUT_LIMIT);
    assert!(flood.status.success());
}

#[tokio::test]
async fn a_daemon_that_holds_the_pipes_holds_up_nobody() {
    let directory = tempfile::tempdir().unwrap();
    // The program ends once the daemon has left its group.
    let script = format!(
        "setsid sh -c 'echo $$ > {0}; exec sleep 600' & \
         while [ ! -s {0} ]; do sleep 0.01; done; cat {0}",
        directory.path().join("daemon").display()
    );
    let run = output(shell(&script), LONG).await.unwrap();
    let daemon = identity(run.stdout.trim().parse().unwrap());
    nix::sys::signal::kill(Pid::from_raw(daemon.pid.cast_signed()), Signal::SIGKILL).unwrap();
    gone(&daemon).await;
}

#[tokio::test]
async fn output_gives_up_in_time() {
    let error = output(
        CommandSpec::new("sleep").arg("600"),
        Duration::from_millis(50),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, ProcessError::TimedOut { .. }), "{error}");
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let error = spawn(CommandSpec::new("/nowhere/engine"))
        .await
        .unwrap_err();
    assert!(error.is_not_found());
    assert_eq!(error.to_string(), "cannot start `/nowhere/engine`");
    assert!(error.hint().unwrap().contains("/nowhere/engine"));
}

#[tokio::test]
async fn the_environment_can_be_kept_back() {
    // PATH is surely set here, and `sh` is given by its path so as not to need it.
    let spec = CommandSpec::new("/bin/sh")
        .args(["-c", "echo ${HOME:-none} ${ADDED:-none}"])
        .env_remove("HOME")
        .env("ADDED", "yes");
    assert_eq!(output(spec, LONG).await.unwrap().stdout, "none yes\n");
}

#[tokio::test]
async fn the_mark_is_there_whatever_is_kept_back() {
    let spec = CommandSpec::new("/bin/sh")
        .args(["-c", "echo ${LLAMA_ORCH_OWNER:-none}"])
        .env_remove("LLAMA_ORCH_OWNER");
    let said = output(spec, LONG).await.unwrap().stdout;
    assert_eq!(said.trim(), super::leash::owner());
}

#[tokio::test]
async fn a_terminating_leader_that_forgets_a_child_does_not_leave_it() {
    // The child is in a group of its own, as ninja's are, and its leader ends without it.
    let script = "setsid sleep 600 >/dev/null 2>&1 & echo $! ; trap 'exit 0' TERM; \
                  while :; do sleep 0.01; done";
    let (group, pids) = started(shell(script).death_signal(DeathSignal::Terminate)).await;
    let child = identity(pids[0]);
    drop(group);
    gone(&child).await;
    all_ended().await;
}
