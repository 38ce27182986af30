//! Signals: the first asks for an orderly end, the second for a quick one.

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

/// Listens for SIGINT and SIGTERM from now on.
pub fn on_signals() -> std::io::Result<Shutdown> {
    let shutdown = Shutdown::default();
    let interrupt = signal(SignalKind::interrupt())?;
    let terminate = signal(SignalKind::terminate())?;
    let told = shutdown.clone();
    // Ends with the process: there is always somebody to listen to.
    tokio::spawn(async move { watch(interrupt, terminate, told).await });
    Ok(shutdown)
}

async fn watch(mut interrupt: Signal, mut terminate: Signal, told: Shutdown) {
    loop {
        let name = tokio::select! {
            _ = interrupt.recv() => "SIGINT",
            _ = terminate.recv() => "SIGTERM",
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
                "finishing running tasks; once more to end now"
            );
            told.asked.cancel();
        }
    }
}
