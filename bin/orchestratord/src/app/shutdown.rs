//! Signals: the first asks for an orderly end, the second for a quick one.
//! SIGHUP asks for the configuration to be read again, or for the end where it
//! tells of a closed terminal.

use std::io::IsTerminal;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::reload::ReloadHandle;

/// What the operator asked for so far.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Finish what runs, then end.
    pub asked: CancellationToken,
    /// End now.
    pub hurried: CancellationToken,
}

/// Signals that are listened to and kept, until somebody says what is to be
/// done about them.
#[derive(Debug)]
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    terminal: Terminal,
}

impl Signals {
    /// Listens for SIGINT, SIGTERM and SIGHUP from now on.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
            terminal: Terminal::at_start(),
        })
    }

    /// Does what they ask for. `drain` is how long running tasks may go on,
    /// for people to know; without anything to reload every signal ends.
    pub fn heed(self, drain: Duration, reloads: Option<ReloadHandle>) -> Shutdown {
        let shutdown = Shutdown::default();
        // Ends with the process: there is always somebody to listen to.
        tokio::spawn(self.watch(drain, reloads, shutdown.clone()));
        shutdown
    }

    async fn watch(mut self, drain: Duration, reloads: Option<ReloadHandle>, told: Shutdown) {
        loop {
            let name = tokio::select! {
                _ = self.interrupt.recv() => "SIGINT",
                _ = self.terminate.recv() => "SIGTERM",
                _ = self.hang_up.recv() => "SIGHUP",
            };
            if name == "SIGHUP"
                && let Some(reloads) = &reloads
                && self.terminal.is_as_at_start()
            {
                reloads.hang_up();
                continue;
            }
            if told.asked.is_cancelled() {
                tracing::warn!(
                    signal = name,
                    "ending now, without waiting for running tasks"
                );
                told.hurried.cancel();
            } else {
                tracing::info!(
                    signal = name,
                    "running tasks may finish for {} s; once more to end now",
                    drain.as_secs()
                );
                told.asked.cancel();
            }
        }
    }
}

/// Which of the standard streams were a terminal when the program started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Terminal {
    stdin: bool,
    stdout: bool,
    stderr: bool,
}

impl Terminal {
    fn at_start() -> Self {
        Self {
            stdin: std::io::stdin().is_terminal(),
            stdout: std::io::stdout().is_terminal(),
            stderr: std::io::stderr().is_terminal(),
        }
    }

    /// One that was closed in the meantime answers no more, which is what its
    /// SIGHUP says; any other SIGHUP was sent by somebody.
    fn is_as_at_start(self) -> bool {
        Self::at_start() == self
    }
}
