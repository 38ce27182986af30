//! Starting and ending engines, with a scripted engine that is a real process.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

#[path = "../support/mod.rs"]
mod support;

mod beside;
mod ending;
mod left_behind;
mod loading;
mod ports;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use provision_kit::process::ProcessIdentity;
use provisioners_engine_provisioner::RunningEngine;

use crate::support::{Machine, installation, until};

fn identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity::of(pid)
        .unwrap()
        .expect("the process is there")
}

/// An engine that starts, as the machine's own pool.
async fn start(machine: &Machine, engine: &Path) -> RunningEngine {
    machine
        .provisioner()
        .start(&installation(engine), machine.spec())
        .await
        .unwrap()
}

async fn gone(identity: ProcessIdentity) {
    until("the process ends", || !identity.is_alive()).await;
}

/// An engine that is a shell script.
fn script_engine(directory: &Path, script: &str) -> PathBuf {
    let path = directory.join("llama-server");
    let staged = directory.join("staged");
    std::fs::write(&staged, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&staged, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&staged, &path).unwrap();
    path
}

fn port_of(url: &str) -> u16 {
    url.rsplit_once(':').unwrap().1.parse().unwrap()
}
