//! Why pip was not there or did not do it.

use std::time::Duration;

use llama_orch_types::{Digest, Hinted};

use crate::fs::FsError;
use crate::process::ProcessError;

/// Why pip was not there or did not do it.
#[derive(Debug, thiserror::Error)]
pub enum PipError {
    #[error("there is no working pip here: {}", tried.join("; "))]
    NotFound { tried: Vec<String> },
    #[error("cannot run `{command}`")]
    Process {
        command: String,
        #[source]
        source: ProcessError,
    },
    #[error("`{command}` was still running after {} s and was ended", after.as_secs())]
    TimedOut { command: String, after: Duration },
    #[error("`{command}` failed ({status}):\n{last_lines}")]
    Failed {
        command: String,
        status: String,
        last_lines: String,
    },
    #[error("`{command}` left {found} files where one was expected")]
    UnexpectedFiles { command: String, found: usize },
    /// Nothing of such a file was run.
    #[error("{requirement} does not have the digest {expected}:\n{last_lines}")]
    WrongDigest {
        requirement: String,
        expected: Digest,
        last_lines: String,
    },
    #[error("`{requirement}` is no package name and version")]
    BadRequirement { requirement: String },
    #[error(transparent)]
    File(#[from] FsError),
}

impl PipError {
    /// Whether the same call may succeed a little later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            Self::Failed { last_lines, .. } => speaks_of_network(last_lines),
            Self::Process { source, .. } => source.retriable(),
            Self::File(error) => error.retriable(),
            _ => false,
        }
    }
}

impl Hinted for PipError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "install pip: `sudo apt install python3-pip` (Debian, Ubuntu), \
                 `sudo pacman -S python-pip` (Arch, CachyOS), `sudo dnf install python3-pip` (Fedora)"
                .to_owned(),
            Self::Failed { last_lines, .. } if speaks_of_network(last_lines) => {
                "check the network and pip's own settings (`pip config list`)".to_owned()
            }
            Self::Failed { last_lines, .. } if last_lines.contains("No matching distribution") => {
                "the index that pip uses does not have this version: see `pip config list` and `pip index versions NAME`"
                    .to_owned()
            }
            Self::Failed { last_lines, .. } if last_lines.contains("No space left") => {
                "free some space, also where temporary files go (TMPDIR)".to_owned()
            }
            Self::Failed { command, .. } => format!("run it by hand to see all of its output: {command}"),
            Self::WrongDigest { .. } => {
                "the package is not the pinned one: name an index that holds the same file, or correct the digest"
                    .to_owned()
            }
            Self::TimedOut { .. } => "try again; a slow index can be replaced in pip's own settings".to_owned(),
            Self::File(error) => return error.hint(),
            _ => return None,
        })
    }
}

/// pip's words for a network or an index that may work again later.
fn speaks_of_network(lines: &str) -> bool {
    [
        "NewConnectionError",
        "ConnectionError",
        "ConnectionResetError",
        "connection broken by",
        "Read timed out",
        "ConnectTimeout",
        "NameResolutionError",
        "Name or service not known",
        "Temporary failure in name resolution",
        "incomplete-download",
        "IncompleteRead",
        "HTTP error 5",
    ]
    .iter()
    .any(|sign| lines.contains(sign))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(last_lines: &str) -> PipError {
        PipError::Failed {
            command: "pip download a==1".to_owned(),
            status: "exit status: 1".to_owned(),
            last_lines: last_lines.to_owned(),
        }
    }

    #[test]
    fn what_may_pass_is_told_from_what_stays() {
        for passing in [
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'ProtocolError(...)'",
            "ConnectionResetError: [Errno 104] Connection reset by peer",
            "urllib3.exceptions.NameResolutionError: <...>: Failed to resolve 'index'",
            "[Errno -2] Name or service not known",
            "error: incomplete-download",
            "ERROR: HTTP error 503 while getting https://index/a.whl",
            "socket.timeout: Read timed out.",
        ] {
            let error = failed(passing);
            assert!(error.retriable(), "{passing}");
            assert!(error.hint().unwrap().contains("network"), "{passing}");
        }
        for lasting in [
            "ERROR: No matching distribution found for a==1",
            "ERROR: HTTP error 404 while getting https://index/a.whl",
            "OSError: [Errno 28] No space left on device",
        ] {
            assert!(!failed(lasting).retriable(), "{lasting}");
        }
    }
}
