//! How an engine ends: asked, left alone, or by itself.

use std::process::Command;
use std::time::Duration;

use provisioners_engine_provisioner::LaunchSpec;
use test_harness_fake_engine::{Script, grandchild, install};

use crate::support::{LONG, Machine, installation, until};
use crate::{gone, identity, start};

#[tokio::test]
async fn an_engine_that_ignores_term_is_killed_with_its_children() {
    let machine = Machine::new();
    let directory = machine.path().join("engine");
    let script = Script {
        ignore_term: true,
        grandchild: true,
        ..Script::default()
    };
    let engine = install(&directory, &script);
    let spec = LaunchSpec {
        stop_grace: Duration::from_millis(100),
        ..machine.spec()
    };
    let running = machine
        .provisioner()
        .start(&installation(&engine), spec)
        .await
        .unwrap();
    until("the grandchild is there", || {
        grandchild(&directory).is_some()
    })
    .await;
    let child = identity(grandchild(&directory).unwrap());
    let engine_process = identity(running.context().pid.unwrap());
    let report = running.stop().await;
    assert!(report.killed);
    gone(engine_process).await;
    gone(child).await;
    assert!(!machine.pid_file().exists());
}

#[tokio::test]
async fn a_dropped_engine_is_killed_and_its_files_go() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let running = start(&machine, &engine).await;
    let engine_process = identity(running.context().pid.unwrap());
    drop(running);
    gone(engine_process).await;
    assert!(!machine.pid_file().exists());
    assert!(!machine.handoff().exists());
}

#[tokio::test]
async fn a_crash_is_noticed_with_the_last_lines() {
    let machine = Machine::new();
    let script = Script {
        log_lines: 3,
        ..Script::default()
    };
    let engine = install(&machine.path().join("engine"), &script);
    let mut running = start(&machine, &engine).await;
    let pid = running.context().pid.unwrap();
    Command::new("kill")
        .args(["-ABRT", &pid.to_string()])
        .status()
        .unwrap();
    let exit = tokio::time::timeout(LONG, running.wait_exit())
        .await
        .unwrap();
    assert!(!exit.status.unwrap().success());
    assert!(exit.log_tail.len() >= 3, "{:?}", exit.log_tail);
}
