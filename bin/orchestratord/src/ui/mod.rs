//! What people see: progress and logs. Everything goes to standard error;
//! standard output is for answers alone.

pub mod logging;
mod passed_over;

use std::io::IsTerminal;
use std::sync::Arc;

use indicatif::MultiProgress;
use provision_kit::progress::Reporter;
use terminal_ui::progress;

use self::logging::LogFormat;
use self::passed_over::PassedOver;

/// Bars if standard error is a terminal and the log is for people, else log
/// lines.
pub fn progress_reporter(format: LogFormat, screen: &MultiProgress) -> Arc<dyn Reporter> {
    let shown = if format == LogFormat::Text && std::io::stderr().is_terminal() {
        progress::bars(screen)
    } else {
        progress::lines(Box::new(|line| tracing::info!("{line}")))
    };
    Arc::new(PassedOver::before(shown))
}
