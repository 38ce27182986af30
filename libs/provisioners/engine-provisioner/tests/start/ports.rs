//! Ports that are taken, and strangers that answer on them.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use provision_kit::process::ProcessIdentity;
use provisioners_engine_provisioner::{EngineError, LaunchSpec};
use test_harness_fake_engine::{Script, install};

use crate::support::{Machine, installation, until};
use crate::{port_of, script_engine, start};

#[tokio::test]
async fn a_port_that_is_taken_means_another_port() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let tried = machine.path().join("tried");
    // The first try holds its port in vain: a listener of the test's takes the part of whoever was
    // quicker, so that the port cannot be chosen again by chance.
    let engine = script_engine(
        machine.path(),
        &format!(
            "if [ ! -e {0} ]; then echo \"$@\" > {0}; while [ ! -e {0}.taken ]; do sleep 0.01; done; \
             echo \"couldn't bind HTTP server socket\" >&2; exit 1; fi\nexec {1} \"$@\"",
            tried.display(),
            real.display()
        ),
    );
    let take_port = async {
        let first_port = || {
            let words = std::fs::read_to_string(&tried).ok()?;
            let (_, rest) = words.trim_end().split_once("--port ")?;
            rest.split_once(' ')?.0.parse::<u16>().ok()
        };
        until("the first try is made", || first_port().is_some()).await;
        let taken = std::net::TcpListener::bind(("127.0.0.1", first_port().unwrap())).unwrap();
        std::fs::write(tried.with_extension("taken"), "").unwrap();
        taken
    };
    let provisioner = machine.provisioner();
    let installation = installation(&engine);
    let (running, taken) =
        tokio::join!(provisioner.start(&installation, machine.spec()), take_port);
    let running = running.unwrap();
    let notes = machine.recorder.notes();
    assert!(notes.iter().any(|note| note.contains("port")), "{notes:?}");
    assert_ne!(
        port_of(&running.context().url),
        taken.local_addr().unwrap().port()
    );
    running.stop().await;
}

/// Ends a process that a test could not own.
struct Stranger(PathBuf);

impl Drop for Stranger {
    fn drop(&mut self) {
        if let Ok(pid) = std::fs::read_to_string(&self.0) {
            let _ = Command::new("kill").args(["-KILL", pid.trim()]).status();
        }
    }
}

#[tokio::test]
async fn a_stranger_on_the_port_is_not_taken_for_the_engine() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let stranger = Stranger(machine.path().join("stranger.pid"));
    // At the first try a healthy engine with the very same model answers on the port, but it is in
    // nobody's group; ours only ends a while later.
    let engine = script_engine(
        machine.path(),
        &format!(
            "if [ ! -e {0} ]; then setsid {1} \"$@\" >/dev/null 2>&1 & echo $! > {0}; sleep 0.5; exit 1; fi\nexec {1} \"$@\"",
            stranger.0.display(),
            real.display()
        ),
    );
    let running = start(&machine, &engine).await;
    let stranger_pid: u32 = std::fs::read_to_string(&stranger.0)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert_ne!(running.context().pid, Some(stranger_pid));
    assert!(
        ProcessIdentity::of(stranger_pid).unwrap().is_some(),
        "the stranger was left alone"
    );
    running.stop().await;
}

#[tokio::test]
async fn a_stranger_on_the_port_is_told_of_when_the_engine_is_given_up() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let stranger = Stranger(machine.path().join("stranger.pid"));
    let engine = script_engine(
        machine.path(),
        &format!(
            "setsid {1} \"$@\" >/dev/null 2>&1 & echo $! > {0}; sleep 600",
            stranger.0.display(),
            real.display()
        ),
    );
    let spec = LaunchSpec {
        load_timeout: Duration::from_secs(3),
        ..machine.spec()
    };
    let error = machine
        .provisioner()
        .start(&installation(&engine), spec)
        .await
        .unwrap_err();
    let EngineError::LoadTimeout {
        stranger: Some(port),
        ..
    } = &error
    else {
        panic!("{error}");
    };
    let text = error.to_string();
    let told = format!("another program answers on its port {port}");
    assert!(text.contains(&told), "{text}");
}
