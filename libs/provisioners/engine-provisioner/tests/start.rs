//! Starting and ending engines, with a scripted engine that is a real process.
#![allow(
    clippy::unwrap_used,
    reason = "a test may panic, and its helpers with it"
)]

mod support;

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use provision_kit::process::ProcessIdentity;
use provisioners_engine_provisioner::{
    EngineConfig, EngineError, LaunchSpec, Profile, RunningEngine,
};
use support::{LONG, Machine, installation, somebody_runs, until};
use test_harness_fake_engine::{FakeEngine, LoadFailure, Script, grandchild, install, starts};

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

#[tokio::test]
async fn one_pool_has_one_owner() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let provisioner = machine.provisioner();
    let first = provisioner
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap();
    let error = provisioner
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap_err();
    let EngineError::PoolBusy { holder, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(*holder, std::process::id().to_string());
    first.stop().await;
    let again = provisioner
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap();
    again.stop().await;
}

fn pid_in(path: &Path) -> u32 {
    let file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    file["pid"].as_u64().unwrap().try_into().unwrap()
}

#[tokio::test]
async fn an_engine_started_beside_another_takes_over_its_names() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let provisioner = machine.provisioner();
    let run = |name: &str| machine.cache.run().join(name);
    let mut old = start(&machine, &engine).await;
    let mut new = provisioner
        .start_beside(&installation(&engine), machine.spec(), old.pool_lock())
        .await
        .unwrap();
    let (old_pid, new_pid) = (old.context().pid.unwrap(), new.context().pid.unwrap());
    assert_eq!(pid_in(&machine.pid_file()), old_pid, "it serves still");
    assert_eq!(pid_in(&machine.handoff()), old_pid);
    assert_eq!(pid_in(&run("default+next.pid")), new_pid);
    assert!(old.resident_bytes().unwrap() > 100_000);

    provisioner.take_over(&mut new, &mut old);
    assert_eq!(pid_in(&machine.pid_file()), new_pid);
    assert_eq!(pid_in(&machine.handoff()), new_pid);
    assert_eq!(pid_in(&run("default+old.pid")), old_pid);
    assert!(!run("default+next.pid").exists());
    assert!(machine.log().exists() && run("llamacpp-default.log.1").exists());
    assert!(!run("llamacpp-default+next.log").exists());

    old.stop().await;
    assert!(!run("default+old.pid").exists());
    assert_eq!(
        pid_in(&machine.pid_file()),
        new_pid,
        "not the old one's to remove"
    );
    let busy = provisioner
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap_err();
    assert!(matches!(busy, EngineError::PoolBusy { .. }), "{busy}");
    new.stop().await;
    assert!(!machine.pid_file().exists() && !machine.handoff().exists());
}

#[tokio::test]
async fn an_engine_beside_another_that_is_given_up_leaves_nothing() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let provisioner = machine.provisioner();
    let old = start(&machine, &engine).await;
    let hangs = Script {
        load_hang: true,
        ..Script::default()
    };
    install(&machine.path().join("engine"), &hangs);
    let next_pid = machine.cache.run().join("default+next.pid");
    let installation = installation(&engine);
    let beside = provisioner.start_beside(&installation, machine.spec(), old.pool_lock());
    tokio::select! {
        _ = beside => panic!("it never gets ready"),
        () = until("the PID file is there", || next_pid.exists()) => {}
    }
    until("the PID file is gone", || !next_pid.exists()).await;
    assert_eq!(pid_in(&machine.pid_file()), old.context().pid.unwrap());
}

#[tokio::test]
async fn whatever_name_a_crash_left_an_engine_under_it_is_ended() {
    for name in ["default+next.pid", "default+old.pid"] {
        let machine = Machine::new();
        let engine = install(&machine.path().join("engine"), &Script::default());
        let path = machine.cache.run().join(name);
        std::fs::create_dir_all(machine.cache.run()).unwrap();
        // An engine of somebody's who is gone.
        let left = FakeEngine::start(&Script::default());
        let process = identity(left.pid());
        let owner = ProcessIdentity {
            pid: u32::MAX,
            ..process.clone()
        };
        let mut file = serde_json::to_value(&process).unwrap();
        file["port"] = 1.into();
        file["owner_pid"] = owner.pid.into();
        file["owner"] = serde_json::to_value(&owner).unwrap();
        std::fs::write(&path, file.to_string()).unwrap();
        let next_log = machine.cache.run().join("llamacpp-default+next.log");
        std::fs::write(&next_log, "cut off").unwrap();
        let running = start(&machine, &engine).await;
        gone(process).await;
        assert!(!path.exists() && !next_log.exists(), "{name}");
        running.stop().await;
    }
}

fn port_of(url: &str) -> u16 {
    url.rsplit_once(':').unwrap().1.parse().unwrap()
}

#[tokio::test]
async fn pools_that_start_at_once_live_apart() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let provisioner = machine.provisioner();
    let installation = installation(&engine);
    let start = |pool: &str| {
        let spec = LaunchSpec {
            pool_id: pool.parse().unwrap(),
            ..machine.spec()
        };
        provisioner.start(&installation, spec)
    };
    let (a, b, c) = tokio::join!(start("a"), start("b"), start("c"));
    let (a, others) = (a.unwrap(), [b.unwrap(), c.unwrap()]);
    let ended = identity(a.context().pid.unwrap());
    a.stop().await;
    gone(ended).await;
    for other in others {
        assert!(identity(other.context().pid.unwrap()).matches());
        let port = port_of(&other.context().url);
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .unwrap();
        other.stop().await;
    }
}

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

/// A process in a group of its own, killed at the end of its test.
struct Other(Child);

impl Other {
    fn start(command: &mut Command) -> Self {
        use std::os::unix::process::CommandExt as _;
        Self(command.process_group(0).spawn().unwrap())
    }

    fn write_pid_file(
        &self,
        machine: &Machine,
        change: impl FnOnce(&mut serde_json::Value),
    ) -> ProcessIdentity {
        let engine = identity(self.0.id());
        let mut file = serde_json::to_value(&engine).unwrap();
        file["port"] = 1.into();
        // An owner that is certainly gone.
        file["owner_pid"] = 4_194_305.into();
        file["owner"] =
            serde_json::json!({ "pid": 4_194_305, "start_time_ticks": 1, "exe": "/gone" });
        change(&mut file);
        std::fs::create_dir_all(machine.cache.run()).unwrap();
        std::fs::write(machine.pid_file(), file.to_string()).unwrap();
        engine
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn an_engine_left_by_a_crash_is_ended_first() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let other = Other::start(Command::new("sleep").arg("600"));
    let left = other.write_pid_file(&machine, |_| {});
    let running = start(&machine, &engine).await;
    gone(left).await;
    running.stop().await;
}

/// Of a pool that is started no more, since no configuration names it.
#[tokio::test]
async fn what_a_crash_left_of_a_forgotten_pool_is_cleared() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let other = Other::start(Command::new("sleep").arg("600"));
    let left = other.write_pid_file(&machine, |_| {});
    std::fs::create_dir_all(machine.runtime.engines()).unwrap();
    let handoff = |pid: u32| format!("{{\"pid\": {pid}}}");
    let gone_pool = machine.runtime.engines().join("llamacpp-gone.json");
    let live_pool = machine.runtime.engines().join("llamacpp-live.json");
    // Above the kernel's largest possible process id.
    std::fs::write(&gone_pool, handoff(4_194_305)).unwrap();
    std::fs::write(&live_pool, handoff(std::process::id())).unwrap();
    let config = EngineConfig {
        path: Some(engine),
        ..EngineConfig::default()
    };
    machine.provisioner().ensure(&config).await.unwrap();
    gone(left).await;
    assert!(!machine.pid_file().exists() && !gone_pool.exists());
    assert!(live_pool.exists());
}

#[tokio::test]
async fn an_engine_that_outlives_its_script_is_ended_first() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let other = Other::start(Command::new("sleep").arg("600"));
    let left = identity(other.0.id());
    // The script that led the group is gone, and what it ran listens still.
    other.write_pid_file(&machine, |file| {
        file["listener"] = serde_json::to_value(&left).unwrap();
        file["pid"] = 4_194_306.into();
    });
    let running = start(&machine, &engine).await;
    gone(left).await;
    running.stop().await;
}

#[tokio::test]
async fn a_script_and_the_engine_it_runs_are_both_written_down() {
    let machine = Machine::new();
    let real = install(&machine.path().join("real"), &Script::default());
    let engine = script_engine(
        machine.path(),
        &format!("{} \"$@\"\nexit $?", real.display()),
    );
    let running = start(&machine, &engine).await;
    let file: serde_json::Value =
        serde_json::from_slice(&std::fs::read(machine.pid_file()).unwrap()).unwrap();
    assert_eq!(file["pid"], running.context().pid.unwrap());
    let listener: ProcessIdentity = serde_json::from_value(file["listener"].clone()).unwrap();
    assert_ne!(Some(listener.pid), running.context().pid);
    assert_eq!(listener.exe, std::fs::canonicalize(&real).unwrap());
    running.stop().await;
    gone(listener).await;
}

#[tokio::test]
async fn another_program_under_an_old_id_is_left_alone() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let other = Other::start(Command::new("sleep").arg("600"));
    for change in [
        (|file: &mut serde_json::Value| file["exe"] = "/somewhere/llama-server".into())
            as fn(&mut serde_json::Value),
        |file| file["start_time_ticks"] = 1.into(),
        |file| *file = "no PID file at all".into(),
    ] {
        let bystander = other.write_pid_file(&machine, change);
        let running = machine
            .provisioner()
            .start(&installation(&engine), machine.spec())
            .await
            .unwrap();
        assert!(bystander.matches());
        running.stop().await;
    }
}

#[tokio::test]
async fn an_engine_whose_owner_lives_is_not_touched() {
    let machine = Machine::new();
    let engine = install(&machine.path().join("engine"), &Script::default());
    let owner = Other::start(Command::new("sleep").arg("600"));
    let other = Other::start(Command::new("sleep").arg("600"));
    let owner_identity = identity(owner.0.id());
    let left = other.write_pid_file(&machine, |file| {
        file["owner"] = serde_json::to_value(&owner_identity).unwrap();
        file["owner_pid"] = owner_identity.pid.into();
    });
    let error = machine
        .provisioner()
        .start(&installation(&engine), machine.spec())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("pool default is run by process {}", owner_identity.pid)
    );
    assert!(left.matches());
    assert!(machine.pid_file().exists());
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
