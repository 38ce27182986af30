//! Ending a dropped group that is to tidy up first.
//!
//! Each burial has a thread of its own, which ends after two seconds at the latest. The thread keeps
//! the child unreaped, so that the group's id stays its own until the last signal is sent.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;

use super::identity::descendants;
use super::{DROP_GRACE, signal_group};

/// How often an ending process is looked at.
const POLL: Duration = Duration::from_millis(10);

/// How many burials are under way.
static UNDER_WAY: AtomicUsize = AtomicUsize::new(0);

/// Counts one burial for as long as it lives.
struct Count;

impl Count {
    fn new() -> Self {
        UNDER_WAY.fetch_add(1, Ordering::SeqCst);
        Self
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        UNDER_WAY.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Waits until every dropped group has ended, at most a little longer than each gets. A program
/// that drops builds right before its own end calls this, so that nothing outlives it.
pub async fn all_ended() {
    let deadline = Instant::now() + DROP_GRACE * 2;
    while UNDER_WAY.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
        tokio::time::sleep(POLL).await;
    }
}

/// TERM to the group, its grace, KILL to the group and to whatever its members had started in
/// groups of their own.
pub(super) fn begin(pid: u32, mut child: Child) {
    let count = Count::new();
    let burial = move || {
        let _count = count;
        let family = descendants(pid);
        if let Err(error) = signal_group(pid, Signal::SIGTERM) {
            tracing::warn!(pid, %error, "a dropped process was not told to end");
        }
        let deadline = Instant::now() + DROP_GRACE;
        while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
            thread::sleep(POLL);
        }
        let _ = signal_group(pid, Signal::SIGKILL);
        for member in family {
            // Its start time says that the id still means the same process.
            if member.is_alive() {
                let _ = kill(Pid::from_raw(member.pid.cast_signed()), Signal::SIGKILL);
            }
        }
    };
    if let Err(error) = thread::Builder::new().name("bury".into()).spawn(burial) {
        // The closure is gone, and the child with it: tokio reaps it.
        let _ = signal_group(pid, Signal::SIGKILL);
        tracing::warn!(pid, %error, "a dropped process got no time to end by itself");
    }
}
