//! Which failures pass by themselves, or when space or a process is given back.

use std::io;

use crate::error::EngineError;

impl EngineError {
    /// Whether the same call may succeed a little later: by itself, or because space or a process
    /// was given back.
    pub fn retriable(&self) -> bool {
        match self {
            Self::Download { source, .. } => source.retriable(),
            Self::ReleaseList { source, .. } => may_pass(source),
            Self::PortTaken { .. }
            | Self::LoadTimeout { .. }
            | Self::DiedLoading { .. }
            | Self::PoolBusy { .. }
            | Self::Port(_)
            | Self::Props { .. }
            | Self::NoSpace { .. } => true,
            Self::ToolInstall { source, .. } | Self::SourcePip { source, .. } => source.retriable(),
            Self::SourceGit { reason, .. } => git_may_pass(reason),
            Self::VersionCommand { source, .. }
            | Self::BuildTool { source, .. }
            | Self::GitCommand { source, .. }
            | Self::Process { source, .. } => source.retriable(),
            Self::Build { tail, .. } => tail.iter().any(|line| is_about_full_disk(line)),
            Self::Unpack { source, .. } => is_full(source),
            Self::File(error) => error.retriable(),
            Self::Lock(error) => error.retriable(),
            Self::AllModesFailed { failures } => {
                failures.iter().any(|failure| failure.error.retriable())
            }
            Self::NoSource { failures } => failures.iter().any(|failure| failure.error.retriable()),
            _ => false,
        }
    }
}

/// Whether a request for a release list may succeed later. A server that says no such thing is
/// there, or that answers with something else, will say so again; 403 is how the API limits rates.
fn may_pass(error: &reqwest::Error) -> bool {
    if let Some(status) = error.status() {
        return status.is_server_error() || matches!(status.as_u16(), 403 | 408 | 425 | 429);
    }
    let no_list = std::error::Error::source(error)
        .is_some_and(|cause| cause.downcast_ref::<serde_json::Error>().is_some());
    !(error.is_builder() || no_list)
}

/// What git says when asking again is of no use.
fn git_may_pass(reason: &str) -> bool {
    const FINAL: [&str; 8] = [
        "not found",
        "does not exist",
        "does not appear to be a git repository",
        "Authentication failed",
        "could not read Username",
        "Permission denied",
        "is not a valid",
        "unable to find remote helper",
    ];
    !FINAL.iter().any(|sign| reason.contains(sign))
}

pub(crate) fn is_about_full_disk(line: &str) -> bool {
    line.contains("No space left on device") || line.contains("Disk quota exceeded")
}

pub(crate) fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::SourceFailure;
    use llama_orch_types::PoolId;
    use provision_kit::fs::FsError;
    use provision_kit::process::ProcessError;

    #[test]
    fn a_passing_failure_of_one_source_is_passing() {
        let failure = |error| SourceFailure {
            source: "x".into(),
            error: Box::new(error),
        };
        let git = |reason: &str| EngineError::SourceGit {
            what: "git tag b1".into(),
            reason: reason.into(),
        };
        let gone = EngineError::SourceFile { path: "/x".into() };
        let network = git("fatal: unable to access: Could not resolve host: example.org");
        let no_tag = git("fatal: Remote branch b1 not found in upstream origin");
        assert!(network.retriable() && !no_tag.retriable());
        let both = EngineError::NoSource {
            failures: vec![failure(gone), failure(network)],
        };
        assert!(both.retriable());
        assert!(
            both.to_string().contains("Could not resolve host"),
            "{both}"
        );
        assert!(
            !EngineError::NoSource {
                failures: vec![failure(no_tag)]
            }
            .retriable()
        );
    }

    #[test]
    fn a_shortage_passes() {
        let process = |kind: io::ErrorKind| EngineError::Process {
            pool: PoolId::default_pool(),
            source: ProcessError::Spawn {
                program: "x".into(),
                source: kind.into(),
            },
        };
        assert!(process(io::ErrorKind::WouldBlock).retriable());
        assert!(process(io::ErrorKind::OutOfMemory).retriable());
        assert!(!process(io::ErrorKind::NotFound).retriable());
        let full = FsError::at("write", "/x".as_ref())(io::ErrorKind::StorageFull.into());
        assert!(EngineError::File(full).retriable());
    }
}
