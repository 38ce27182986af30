//! What can go wrong, one function for each fault.
//!
//! A fault is injected while clients run, and returns when it has seen what
//! must be seen of it. Afterwards the run waits until the pool serves again;
//! only then is the fault survived.

mod config;
mod daemon;
mod engine;
mod files;
mod hostile;
mod load;
mod model;
mod pool;
mod readers;
mod script;

use std::sync::Arc;

use futures::future::BoxFuture;

pub(crate) use self::daemon::leftovers;

use crate::error::Verdict;
use crate::rng::Rng;
use crate::world::World;

type Inject = fn(Arc<World>, Rng) -> BoxFuture<'static, Verdict>;

/// One fault.
pub struct Fault {
    pub name: &'static str,
    pub about: &'static str,
    /// How often it comes up in each round.
    pub weight: u32,
    /// Only the scripted engine can be made to do it.
    pub scripted_only: bool,
    pub inject: Inject,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// A fault of any engine.
macro_rules! fault {
    ($name:literal, $about:literal, $inject:path) => {
        Fault {
            name: $name,
            about: $about,
            weight: 1,
            scripted_only: false,
            inject: |world, rng| Box::pin($inject(world, rng)),
        }
    };
    ($name:literal, $about:literal, $inject:path, scripted) => {
        Fault {
            scripted_only: true,
            ..fault!($name, $about, $inject)
        }
    };
}

/// All faults.
#[rustfmt::skip]
pub fn all() -> Vec<Fault> {
    vec![
        fault!("kill-engine-idle", "kill -9 the engine while it has nothing to do", engine::kill_idle),
        fault!("kill-engine-streaming", "kill -9 the engine in mid-stream", engine::kill_streaming),
        fault!("kill-engine-loading", "kill -9 the engine while it loads", engine::kill_loading),
        fault!("term-engine", "SIGTERM to the engine, past the daemon", engine::term),
        fault!("stop-engine", "SIGSTOP the engine for good: it hangs and must be replaced", engine::stop_for_good),
        fault!("pause-engine", "SIGSTOP and SIGCONT: must be survived without a restart", engine::pause),
        fault!("crash-loop", "kill -9 every engine as soon as it serves: the pool must give up, and come back", engine::crash_loop),
        fault!("continued", "kill -9 the engine under a task that asked to be continued", engine::continued),
        fault!("crash-in-stream", "the engine exits in mid-stream", script::crash, scripted),
        fault!("hang-in-stream", "no further byte after some tokens, while /health says 200", script::hang, scripted),
        fault!("cut-connection", "the engine's connection breaks in mid-stream", script::cut, scripted),
        fault!("end-without-final", "the engine's stream ends cleanly but without its last event", script::end_without_final, scripted),
        fault!("error-event", "an error event in the engine's stream", script::error_event, scripted),
        fault!("garbage-in-stream", "the engine's stream holds something that is not JSON", script::garbage, scripted),
        fault!("status-500", "completions fail with 500 while /health says 200", script::status_500, scripted),
        fault!("slow-load", "the engine loads slowly, with signs of progress", script::slow_load, scripted),
        fault!("failing-loads", "the next starts of the engine fail", script::failing_loads, scripted),
        fault!("ignores-term", "an engine that ignores SIGTERM hangs", script::ignores_term, scripted),
        fault!("grandchild", "an engine with a child of its own is killed", script::grandchild, scripted),
        fault!("kill-daemon-ready", "kill -9 the daemon while its pool is ready and idle", daemon::kill_ready),
        fault!("kill-daemon-loading", "kill -9 the daemon while its engine loads", daemon::kill_loading),
        fault!("kill-daemon-streaming", "kill -9 the daemon in mid-stream", daemon::kill_streaming),
        fault!("kill-daemon-fetching", "kill -9 the daemon while it fetches the model", daemon::kill_fetching),
        fault!("kill-daemon-reload", "kill -9 the daemon in a reload", daemon::kill_in_reload),
        fault!("kill-daemon-drain", "kill -9 the daemon in a drain", daemon::kill_in_drain),
        fault!("term-daemon", "SIGTERM to the daemon with tasks running and queued", daemon::term),
        fault!("freeze-daemon", "SIGSTOP and SIGCONT to the daemon itself", daemon::freeze),
        fault!("flood", "a burst far beyond the queue's bound", load::flood),
        fault!("cancel-storm", "cancels of queued, running and finished tasks, also twice at once", load::cancel_storm),
        fault!("deadlines", "tasks that must start almost at once", load::deadlines),
        fault!("leave-and-resume", "readers that disconnect in mid-stream and come back", readers::leave_and_resume),
        fault!("never-read", "readers that open a stream and never read it", readers::never_read),
        fault!("slow-readers", "readers far slower than the engine", readers::slow),
        fault!("abandoned", "the last reader of a task that wants a cancel then goes away", readers::abandoned),
        fault!("half-open", "connections that send half a request and fall silent", hostile::half_open),
        fault!("garbage-requests", "requests that are none, or wrong in every part", hostile::garbage),
        fault!("huge-bodies", "bodies beyond the limit", hostile::huge),
        fault!("slow-senders", "bodies that come byte by byte", hostile::slow),
        fault!("drain-resume", "drain the pool, then resume it", pool::drain_resume),
        fault!("reload", "reload the pool with other flags while tasks run", pool::reload),
        fault!("failing-reload", "reload with a flag that the engine refuses", pool::failing_reload),
        fault!("config-capacity", "SIGHUP with another queue_capacity", config::capacity),
        fault!("config-pools", "SIGHUP with a second pool, and without it again", config::pools),
        fault!("model-flipped", "a byte of the stored model is another at the next start", model::flipped),
        fault!("model-truncated", "the stored model is shorter at the next start", model::truncated),
        fault!("fetch-cut", "the model's source breaks off half-way", model::fetch_cut),
        fault!("fetch-stall", "the model's source falls silent half-way", model::fetch_stall),
        fault!("fetch-truncate", "the model's source promises and sends too little", model::fetch_truncate),
        fault!("fetch-flip", "the model's source sends a wrong byte", model::fetch_flip),
        fault!("fetch-wrong-range", "the model's source sends another part than asked for", model::fetch_wrong_range),
        fault!("fetch-error", "the model's source fails", model::fetch_error),
        fault!("full-disk", "no room for the model: files cannot grow", model::full_disk),
        fault!("stale-files", "leftovers of a crash before a start: PID file, handoff, parts, staging", files::stale),
        fault!("second-daemon", "a second daemon on the same directories", files::second_daemon),
    ]
}
