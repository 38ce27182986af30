//! Engines beside each other: of one pool, and of several.

use std::path::Path;

use provision_kit::process::ProcessIdentity;
use provisioners_engine_provisioner::{EngineError, LaunchSpec};
use test_harness_fake_engine::{FakeEngine, Script, install};

use crate::support::{Machine, installation, until};
use crate::{gone, identity, port_of, start};

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
