//! Why a download failed, and whether trying again may help.

use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::{Digest, Hinted};
use reqwest::StatusCode;

use crate::download::display_url;
use crate::fs::{FsError, free_space};

/// Why a file was not fetched.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    #[error("cannot make an HTTP client")]
    Client(#[source] reqwest::Error),
    #[error("`{url}` is no URL that can be fetched")]
    BadUrl {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("cannot reach {url}")]
    Unreachable {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the request for {url} failed")]
    Request {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{url} redirects to where nobody should follow")]
    Redirect {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("{url} answered {status}")]
    Status {
        url: String,
        status: StatusCode,
        retry_after: Option<Duration>,
    },
    #[error("the transfer of {url} was cut after {received} bytes")]
    Cut {
        url: String,
        received: u64,
        #[source]
        source: reqwest::Error,
    },
    #[error("the transfer of {url} ended after {received} of {total} bytes")]
    Short {
        url: String,
        received: u64,
        total: u64,
    },
    #[error("{url} sent nothing for {seconds:.0} s, after {received} bytes")]
    Stalled {
        url: String,
        received: u64,
        seconds: f64,
    },
    #[error("{url} does not answer consistently: {why}")]
    Confused { url: String, why: &'static str },
    #[error("{url} has {actual} bytes where {expected} were expected")]
    WrongSize {
        url: String,
        expected: u64,
        actual: u64,
    },
    #[error("{url} has the digest {actual} ({size} bytes) where {expected} was expected")]
    WrongDigest {
        url: String,
        expected: Digest,
        actual: Digest,
        size: u64,
    },
    /// Read twice, and different each time.
    #[error(
        "{url} came differently in two transfers ({}) and never with the digest {expected}",
        places(chunks, *chunk_bytes)
    )]
    Unstable {
        url: String,
        expected: Digest,
        /// Numbers of the chunks that differed.
        chunks: Vec<u64>,
        chunk_bytes: u64,
    },
    #[error("{} needs {needed} more bytes and the disk has {free} left", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    /// What has arrived is kept.
    #[error("there was no room for all of {} ({free} bytes are free on its disk)", path.display())]
    DiskFull {
        path: PathBuf,
        free: u64,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    File(#[from] FsError),
}

/// Which bytes, of the first few chunks.
fn places(chunks: &[u64], size: u64) -> String {
    let shown: Vec<String> = chunks
        .iter()
        .take(4)
        .map(|index| {
            let start = index.saturating_mul(size);
            format!("{start}–{}", start.saturating_add(size).saturating_sub(1))
        })
        .collect();
    let more = if chunks.len() > 4 { ", …" } else { "" };
    format!("bytes {}{more}", shown.join(", "))
}

impl DownloadError {
    pub(crate) fn request(url: &str, error: reqwest::Error) -> Self {
        let url = display_url(url);
        let builder = error.is_builder();
        let connect = error.is_connect();
        let redirect = error.is_redirect();
        let source = error.without_url();
        if builder {
            Self::BadUrl { url, source }
        } else if redirect {
            Self::Redirect { url, source }
        } else if connect {
            Self::Unreachable { url, source }
        } else {
            Self::Request { url, source }
        }
    }

    pub(crate) fn status(url: &str, status: StatusCode, retry_after: Option<Duration>) -> Self {
        Self::Status {
            url: display_url(url),
            status,
            retry_after,
        }
    }

    /// Whether the same download may succeed a little later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Request { .. }
            | Self::Cut { .. }
            | Self::Short { .. }
            | Self::Stalled { .. }
            // Somebody may free some space.
            | Self::NoSpace { .. }
            | Self::DiskFull { .. } => true,
            Self::Status { status, .. } => {
                status.is_server_error()
                    || matches!(
                        *status,
                        StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
                    )
            }
            Self::File(error) => error.retriable(),
            Self::Client(_)
            | Self::BadUrl { .. }
            | Self::Redirect { .. }
            | Self::Confused { .. }
            | Self::WrongSize { .. }
            | Self::WrongDigest { .. }
            | Self::Unstable { .. } => false,
        }
    }

    /// Whether another request within the same download is worth it: not for
    /// what is wrong on this machine.
    pub(crate) fn is_worth_another_request(&self) -> bool {
        !matches!(
            self,
            Self::NoSpace { .. } | Self::DiskFull { .. } | Self::File(_)
        ) && self.retriable()
    }

    /// A disk that became full while bytes were written to it, in figures.
    #[must_use]
    pub fn with_free_space(self, part: &Path) -> Self {
        match self {
            Self::File(error) if error.is_no_space() => {
                let free = free_space(part).unwrap_or(0);
                Self::DiskFull {
                    path: error.path,
                    free,
                    source: error.source,
                }
            }
            other => other,
        }
    }

    /// How long the server asked us to wait.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl Hinted for DownloadError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unreachable { .. } | Self::Request { .. } | Self::Stalled { .. } => {
                "check the network, and HTTPS_PROXY if this machine needs a proxy; \
                 or fetch the file on another machine and name it as `file:/…`"
                    .to_owned()
            }
            Self::Cut { .. } | Self::Short { .. } => {
                "start again: it goes on where it was cut".to_owned()
            }
            Self::Status { status, .. } => match status.as_u16() {
                401 | 403 => "the file needs permission: set a token, or accept its terms on the site".to_owned(),
                404 | 410 => "check the spelling of the address: there is no such file".to_owned(),
                429 => "the server asks for patience: try again later".to_owned(),
                500.. => "the server has a problem: try again later".to_owned(),
                _ => return None,
            },
            Self::WrongSize { .. } | Self::WrongDigest { .. } => {
                "the file is not the pinned one: name a source that holds the same bytes, or correct the digest if the new file is meant"
                    .to_owned()
            }
            Self::Unstable { .. } => {
                "something on the way changes the bytes (a proxy, the network, this machine's memory or disk): \
                 fetch the file another way and name it as `file:/…`"
                    .to_owned()
            }
            Self::NoSpace { needed, .. } => format!(
                "free at least {} MB, or set `cache_dir` to a larger disk",
                needed.div_ceil(1_000_000)
            ),
            Self::DiskFull { path, source, .. } if source.kind() == std::io::ErrorKind::FileTooLarge => format!(
                "the file system of {}, or a limit of this process (`ulimit -f`), takes no larger files: raise it, or set `cache_dir` to another disk; what has arrived is kept",
                path.parent().unwrap_or(path).display()
            ),
            Self::DiskFull { path, .. } => format!(
                "free some space on the disk that holds {}, or set `cache_dir` to a larger one; what has arrived is kept",
                path.parent().unwrap_or(path).display()
            ),
            Self::File(error) => return error.hint(),
            Self::BadUrl { .. } => "an address starts with https:// and names a host".to_owned(),
            Self::Client(_) => {
                "install the certificates that this machine trusts (package `ca-certificates`), \
                 or name them with SSL_CERT_FILE"
                    .to_owned()
            }
            Self::Redirect { .. } => {
                "name the address where the file really is, beginning with https://".to_owned()
            }
            Self::Confused { .. } => return None,
        })
    }
}
