//! Signals: the first asks for an orderly end, the second for a quick one.

use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// What the operator asked for so far.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Finish what runs, then end.
    pub asked: CancellationToken,
    /// End now.
    pub hurried: CancellationToken,
}

/// Listens for SIGINT, SIGTERM and SIGHUP (a closed terminal) from now on.
/// `drain` is how long running tasks may go on.
pub fn on_signals(drain: Duration) -> std::io::Result<Shutdown> {
    let shutdown = Shutdown::default();
    let interrupt = signal(SignalKind::interrupt())?;
    let terminate = signal(SignalKind::terminate())?;
    let hangup = signal(SignalKind::hangup())?;
    let told = shutdown.clone();
    // Ends with the process: there is always somebody to listen to.
    tokio::spawn(async move { watch([interrupt, terminate, hangup], drain, told).await });
    Ok(shutdown)
}

async fn watch(
    [mut interrupt, mut terminate, mut hangup]: [Signal; 3],
    drain: Duration,
    told: Shutdown,
) {
    loop {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
            _ = hangup.recv() => "SIGHUP",
        };
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
