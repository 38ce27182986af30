//! An engine that loads, or does not.

use std::path::Path;
use std::time::{Duration, Instant};

use provisioners_engine_provisioner::{EngineError, LaunchSpec, Profile};
use test_harness_fake_engine::{LoadFailure, Script, install, starts};

use crate::support::{Machine, installation, somebody_runs, until};
use crate::{gone, identity, script_engine, start};

#[tokio::test]
async fn an_engine_loads_serves_and_stops() {
    let machine = Machine::new();
    let script = Script {
        load_ms: 300,
        log_lines: 5,
        ..Script::default()
    };
    let engine = install(&machine.path().join("engine"), &script);
    let spec = LaunchSpec {
        profile: Profile::Throughput,
        slots: 2,
        ctx: Some(512),
        ..machine.spec()
    };
    let begin = Instant::now();
    let running = machine
        .provisioner()
        .start(&installation(&engine), spec)
        .await
        .unwrap();
    assert!(
        begin.elapsed() >= Duration::from_millis(300),
        "ready only once it has loaded"
    );

    let context = running.context().clone();
    assert_eq!((context.slots, context.ctx), (2, 512), "as /props says");
    assert_eq!(context.engine_version, "b11434");
    let engine_process = identity(context.pid.unwrap());
    assert_eq!(engine_process.exe, std::fs::canonicalize(&engine).unwrap());

    let pid_file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.pid_file()).unwrap()).unwrap();
    assert_eq!(pid_file["pid"], engine_process.pid);
    assert_eq!(pid_file["owner_pid"], std::process::id());
    let handoff: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.handoff()).unwrap()).unwrap();
    assert_eq!(handoff["engine"], "llamacpp");
    assert_eq!(handoff["url"], context.url);
    assert_eq!(handoff["provisioning_mode"], "system");
    assert_eq!(handoff["pool_id"], "default");
    assert_eq!(handoff["replica_id"], "r0");
    assert_eq!(handoff["model"]["id"], "test");
    assert!(
        handoff["flags"]
            .as_array()
            .unwrap()
            .contains(&"--metrics".into())
    );

    let report = running.stop().await;
    assert_eq!(machine.provenance()[0]["event"], "started");
    assert!(!report.killed);
    gone(engine_process).await;
    assert!(!machine.pid_file().exists());
    assert!(!machine.handoff().exists());
    let log = std::fs::read_to_string(machine.log()).unwrap();
    assert!(log.lines().count() > 5, "{log}");
}

#[tokio::test]
async fn an_engine_that_dies_while_loading_fails_at_once_with_its_last_words() {
    let machine = Machine::new();
    let script = Script {
        load_ms: 50,
        load_failure: Some(LoadFailure {
            exit_code: 3,
            message: "the model is made of cheese".into(),
        }),
        ..Script::default()
    };
    let engine = install(&machine.path().join("engine"), &script);
    let begin = Instant::now();
    let error = machine
        .provisioner()
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap_err();
    assert!(
        begin.elapsed() < Duration::from_secs(20),
        "not at the deadline"
    );
    let EngineError::DiedLoading { status, tail, .. } = &error else {
        panic!("{error}");
    };
    assert!(status.contains('3'), "{status}");
    assert!(
        tail.iter().any(|line| line.contains("made of cheese")),
        "{tail:?}"
    );
    assert!(error.to_string().contains("made of cheese"));
    assert!(!machine.pid_file().exists());
    assert_eq!(
        starts(&machine.path().join("engine")),
        1,
        "not taken for a port collision"
    );
}

#[tokio::test]
async fn an_engine_that_never_loads_is_given_up_and_ended() {
    let machine = Machine::new();
    let engine = install(
        &machine.path().join("engine"),
        &Script {
            load_hang: true,
            ..Script::default()
        },
    );
    let spec = LaunchSpec {
        load_timeout: Duration::from_millis(200),
        ..machine.spec()
    };
    let error = machine
        .provisioner()
        .start(&installation(&engine), spec)
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::LoadTimeout { .. }), "{error}");
    let path = engine.to_string_lossy().into_owned();
    until("the engine is killed", || !somebody_runs(&path)).await;
}

#[tokio::test]
async fn a_slow_load_that_gets_on_may_take_longer_than_the_limit() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let engine = script_engine(
        machine.path(),
        &format!(
            "for step in 1 2 3 4 5 6 7 8; do echo loading $step; sleep 0.5; done; exec {} \"$@\"",
            real.display()
        ),
    );
    let spec = LaunchSpec {
        load_timeout: Duration::from_secs(3),
        ..machine.spec()
    };
    let begin = Instant::now();
    let provisioner = machine.provisioner();
    let running = provisioner.start(&installation(&engine), spec).await;
    running.unwrap().stop().await;
    assert!(begin.elapsed() > Duration::from_secs(3));
}

#[tokio::test]
async fn a_stopped_load_is_noticed_and_ended() {
    let machine = Machine::new();
    let engine = script_engine(machine.path(), "echo here; kill -STOP $$; sleep 600");
    let spec = LaunchSpec {
        load_timeout: Duration::from_secs(1),
        ..machine.spec()
    };
    let provisioner = machine.provisioner();
    let result = provisioner.start(&installation(&engine), spec).await;
    let error = result.unwrap_err();
    assert!(
        matches!(&error, EngineError::LoadTimeout { seconds: 1, tail, .. } if tail == &["here"]),
        "{error}"
    );
    let path = engine.to_string_lossy().into_owned();
    until("the engine is killed", || !somebody_runs(&path)).await;
}

#[tokio::test]
async fn a_start_that_is_given_up_leaves_nothing() {
    let machine = Machine::new();
    let engine = install(
        &machine.path().join("engine"),
        &Script {
            load_hang: true,
            ..Script::default()
        },
    );
    let provisioner = machine.provisioner();
    let installation = installation(&engine);
    let start = provisioner.start(&installation, machine.spec());
    tokio::select! {
        result = start => panic!("it cannot have started: {result:?}"),
        () = until("the PID file is there", || machine.pid_file().exists()) => {}
    }
    let path = engine.to_string_lossy().into_owned();
    until("the engine is killed", || !somebody_runs(&path)).await;
    assert!(!machine.pid_file().exists());
}

#[tokio::test]
async fn missing_metrics_are_a_warning() {
    let machine = Machine::new();
    let script = Script {
        metrics_missing: true,
        ..Script::default()
    };
    let engine = install(&machine.path().join("engine"), &script);
    let running = start(&machine, &engine).await;
    assert!(
        machine
            .recorder
            .notes()
            .iter()
            .any(|note| note.contains("/metrics"))
    );
    running.stop().await;
}

#[tokio::test]
async fn flags_that_do_not_fit_touch_nothing() {
    let machine = Machine::new();
    let spec = LaunchSpec {
        flags: vec!["--port 1".into()],
        ..machine.spec()
    };
    let error = machine
        .provisioner()
        .start(&installation(Path::new("/nowhere")), spec)
        .await
        .unwrap_err();
    assert!(matches!(error, EngineError::Flags(_)), "{error}");
    assert!(!machine.cache.root().exists());
}
