//! What a crash of the owner left behind.

use std::process::{Child, Command};

use provision_kit::process::ProcessIdentity;
use provisioners_engine_provisioner::EngineConfig;
use test_harness_fake_engine::{Script, install};

use crate::support::{Machine, installation};
use crate::{gone, identity, script_engine, start};

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
