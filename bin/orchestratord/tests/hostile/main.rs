//! What hostile and broken clients send, and what they cost. The daemon is a
//! real process; clients speak over plain sockets, so that they can say
//! anything.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails, and says what it measured"
)]

#[path = "../support/mod.rs"]
mod support;

mod generate;
mod limits;
mod raw;
mod readers;
mod secrets;
mod wild;

use support::Daemon;

/// What the daemon's process holds.
#[derive(Debug, Clone, Copy)]
struct Footprint {
    resident_kib: u64,
    /// The most that was ever resident.
    peak_kib: u64,
    descriptors: usize,
    /// Processor time, in ticks of 10 ms.
    ticks: u64,
}

impl Footprint {
    fn of(daemon: &Daemon) -> Self {
        let proc = format!("/proc/{}", daemon.pid());
        let status = std::fs::read_to_string(format!("{proc}/status")).unwrap();
        let kib = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name));
            let number = line.unwrap().split_whitespace().nth(1);
            number.unwrap().parse().unwrap()
        };
        let stat = std::fs::read_to_string(format!("{proc}/stat")).unwrap();
        let (_, after_name) = stat.rsplit_once(')').unwrap();
        let times = after_name.split_whitespace().skip(11).take(2);
        Self {
            ticks: times.map(|time| time.parse::<u64>().unwrap()).sum(),
            resident_kib: kib("VmRSS:"),
            peak_kib: kib("VmHWM:"),
            descriptors: std::fs::read_dir(format!("{proc}/fd")).unwrap().count(),
        }
    }
}

/// Waits until the daemon has closed what it had opened since `before`, but for
/// a few connections to its engine.
async fn until_descriptors_are_back(daemon: &Daemon, before: Footprint) {
    daemon
        .until("the descriptors are closed", async || {
            let now = Footprint::of(daemon).descriptors;
            (now <= before.descriptors + 8).then_some(())
        })
        .await;
}

/// The pool still serves.
async fn a_task_completes(daemon: &Daemon) {
    let body = serde_json::json!({ "prompt": "still there?", "max_tokens": 3 });
    let accepted = daemon.submit(body).await;
    let events = daemon.events(support::id(&accepted), None).await;
    assert_eq!(support::shape(&events), ["started", "token", "end"]);
}
