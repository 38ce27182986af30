//! Modes `system` and the order of modes.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::path::{Path, PathBuf};

use llama_orch_types::{Hinted as _, ProvisioningMode};
use provisioners_engine_provisioner::{EngineConfig, EngineError, Mode};
use support::{Machine, refusing};
use test_harness_fake_engine::{Script, install};

fn config(path: PathBuf) -> EngineConfig {
    EngineConfig {
        path: Some(path),
        ..EngineConfig::default()
    }
}

#[tokio::test]
async fn a_named_engine_is_taken_whatever_its_version() {
    let machine = Machine::new();
    let script = Script {
        build: 5,
        ..Script::default()
    };
    let engine = install(&machine.path().join("engine"), &script);
    let installation = machine
        .provisioner()
        .ensure(&config(engine.clone()))
        .await
        .unwrap();
    assert_eq!(installation.mode, ProvisioningMode::System);
    assert_eq!(installation.version, "b5");
    assert_eq!(installation.binary, engine);
    assert_eq!(machine.provenance()[0]["mode"], "system");
}

/// What the engine would say is changed behind its back: who gets the old answer ran no engine.
#[tokio::test]
async fn an_engine_is_run_and_read_again_only_when_it_changed() {
    let machine = Machine::new();
    let home = machine.path().join("engine");
    let says = |build| Script {
        build,
        ..Script::default()
    };
    let engine = install(&home, &says(5));
    // A file of its own: the links of other tests change the time of its last change.
    let copy = home.join("copy");
    let replace = || {
        let copied = std::process::Command::new("cp")
            .args([&engine, &copy])
            .status();
        assert!(copied.unwrap().success());
        std::fs::rename(&copy, &engine).unwrap();
    };
    replace();
    let version = async || {
        let ensured = machine.provisioner().ensure(&config(engine.clone())).await;
        ensured.unwrap().version
    };
    assert_eq!(version().await, "b5");
    install(&home, &says(6));
    assert_eq!(version().await, "b5");
    replace();
    assert_eq!(version().await, "b6");
}

#[tokio::test]
async fn a_named_engine_that_is_not_there_is_an_error_and_nothing_else_is_tried() {
    let machine = Machine::new();
    let error = machine
        .provisioner()
        .ensure(&config("/nowhere/llama-server".into()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, EngineError::NotExecutable { .. }),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("provision.path"));
    assert!(!machine.cache.root().exists());
}

#[tokio::test]
async fn something_that_is_no_engine_is_refused() {
    let machine = Machine::new();
    let error = machine
        .provisioner()
        .ensure(&config("/bin/true".into()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, EngineError::VersionUnknown { .. }),
        "{error}"
    );
}

#[tokio::test]
async fn a_gpu_that_is_required_must_be_listed() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let config = EngineConfig {
        require_gpu: true,
        ..config(engine)
    };
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    assert!(matches!(error, EngineError::NoGpu { .. }), "{error}");
}

#[tokio::test]
async fn every_failed_mode_is_noted_and_listed() {
    let machine = Machine::new();
    let (_socket, address) = refusing();
    let mut config = EngineConfig {
        version: "b3".into(),
        ..EngineConfig::default()
    };
    config.release.api_url = format!("http://{address}/api");
    // The pinned source is another version's: it must not be built under this one's name.
    let error = machine.provisioner().ensure(&config).await.unwrap_err();
    let EngineError::AllModesFailed { failures } = &error else {
        panic!("{error}");
    };
    let modes: Vec<Mode> = failures.iter().map(|failure| failure.mode).collect();
    assert_eq!(modes, Mode::CHAIN);
    for (mode, note) in modes.iter().zip(machine.recorder.notes()) {
        assert!(note.starts_with(&format!("mode {mode}: ")), "{note}");
        assert!(error.to_string().contains(&format!("{mode}: ")));
    }
    assert!(error.to_string().contains("b11434"), "{error}");
}

#[tokio::test]
async fn the_plan_changes_nothing() {
    let machine = Machine::new();
    let plan = machine
        .provisioner()
        .plan(&EngineConfig::default())
        .await
        .unwrap();
    assert_eq!(plan.steps.len(), 4);
    assert!(!Path::new(machine.cache.root()).exists());
}
