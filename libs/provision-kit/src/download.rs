//! One file over HTTP: resumed, hashed as it arrives, retried within bounds.
//!
//! ```text
//! attempt ──► request (Range when something is there)
//!               │ 206 from where we are ──► append
//!               │ 200                   ──► the server ignored Range: begin again
//!               │ 416                   ──► complete already, or begin again
//!               │ other 4xx             ──► give up
//!               └ 5xx, 429, cut, stall  ──► wait, next attempt
//! whole ──► length and digest as expected? ──► the part file, complete
//!               ├ wrong length ──► part file removed; once more from zero if it was resumed
//!               └ wrong digest ──► mended ([`crate::repair`]), or removed
//! ```

mod transfer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::Digest;
use reqwest::Client;
use reqwest::redirect::{Action, Attempt as Attempted, Policy};

use crate::download_again::Again;
use crate::fs::remove_file_if_there;
use crate::part::{remove_sidecars, take_notes};
use crate::progress::Step;
use crate::rate::RateLimit;
use crate::repair::{self, Outcome, Patience};
use crate::secret::Secret;
use transfer::Transfer;

pub use crate::chunks::CHUNK as CHUNK_BYTES;
pub use crate::download_error::DownloadError;
pub use crate::download_headers::display_url;

const MAX_REDIRECTS: usize = 10;

/// What to fetch, and how patiently.
#[derive(Debug, Clone)]
pub struct Download<'a> {
    pub url: &'a str,
    /// Sent as `Authorization: Bearer …` to the URL's own host only.
    pub bearer: Option<&'a Secret>,
    /// Where the bytes gather. The caller gives a complete file its name.
    pub part: &'a Path,
    pub expected_digest: Option<Digest>,
    /// In bytes.
    pub expected_size: Option<u64>,
    /// Longest time without a byte before the attempt counts as failed.
    pub stall_timeout: Duration,
    /// Attempts in a row that bring nothing before giving up; at least one.
    pub attempts: u32,
    /// Wait after the first failed attempt; doubled for each further one.
    pub backoff: Duration,
    /// Whether a file of a wrong digest is read a second time. Without it the
    /// file is refused at once, for a caller who knows another source.
    pub second_look: bool,
    /// Shared by all downloads that are to keep to one rate.
    pub rate: RateLimit,
    /// Bytes in one of the chunks whose digests are kept; 8 MiB.
    pub chunk_bytes: u64,
}

impl<'a> Download<'a> {
    /// A download with patience for slow servers.
    pub fn new(url: &'a str, part: &'a Path) -> Self {
        Self {
            url,
            bearer: None,
            part,
            expected_digest: None,
            expected_size: None,
            stall_timeout: Duration::from_secs(30),
            attempts: 5,
            backoff: Duration::from_millis(500),
            second_look: true,
            rate: RateLimit::default(),
            chunk_bytes: CHUNK_BYTES,
        }
    }
}

impl Download<'_> {
    /// The same patience for repairs.
    fn patience(&self) -> Patience {
        Patience {
            attempts: self.attempts,
            pause: self.backoff,
        }
    }
}

/// A complete file, checked as far as it could be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// The part file.
    pub path: PathBuf,
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// The digests of its chunks, as [`crate::part`] writes them beside a part
    /// file; where they are kept, a spoilt copy can be mended with them.
    pub chunks: Option<String>,
}

/// A client for [`fetch`]: bounded connects, no overall time limit (a model
/// may take hours), and a name servers can see. Fails on a machine without
/// certificates to trust: make it when something is to be downloaded.
pub fn http_client() -> Result<Client, DownloadError> {
    Client::builder()
        .user_agent(concat!("llama-orch/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(15))
        .redirect(Policy::custom(follow))
        .build()
        .map_err(DownloadError::Client)
}

/// Follows redirects, but never from an encrypted address to an open one.
fn follow(attempt: Attempted<'_>) -> Action {
    let before = attempt.previous().last().map(reqwest::Url::scheme);
    if before == Some("https") && attempt.url().scheme() != "https" {
        return attempt.error("the server redirects to an address without encryption");
    }
    if attempt.previous().len() > MAX_REDIRECTS {
        return attempt.error("the server redirects in circles");
    }
    attempt.follow()
}

/// Fetches one file into its part file. Moves `step` along in bytes.
///
/// Two fetches must not share a part file: callers hold a lock.
pub async fn fetch(
    client: &Client,
    download: Download<'_>,
    step: &mut Step,
) -> Result<Fetched, DownloadError> {
    fetch_and_mend(client, &download, step)
        .await
        .map_err(|error| error.with_free_space(download.part))
}

async fn fetch_and_mend(
    client: &Client,
    download: &Download<'_>,
    step: &mut Step,
) -> Result<Fetched, DownloadError> {
    let mut transfer = Transfer::open(client, download, step).await?;
    let mut resumed = transfer.part.size() > 0;
    loop {
        let (whole, total) = transfer.run(step).await?;
        let (digest, size) = whole.complete().await?;
        let problem = match (download.expected_size, download.expected_digest) {
            (Some(expected), _) if expected != size => DownloadError::WrongSize {
                url: display_url(download.url),
                expected,
                actual: size,
            },
            (_, Some(expected)) if expected != digest => {
                let wrong = DownloadError::WrongDigest {
                    url: display_url(download.url),
                    expected,
                    actual: digest,
                    size,
                };
                // What an earlier transfer left may be another file's.
                let sure = !resumed && total == Some(size);
                let result = look_again(client, download, wrong, (size, sure), step).await;
                if result.as_ref().is_err_and(DownloadError::retriable) {
                    // What is here may still be mended by the next start.
                    return result;
                }
                let chunks = take_notes(download.part)?;
                if result.is_err() {
                    remove_file_if_there(download.part)?;
                }
                return result.map(|fetched| Fetched { chunks, ..fetched });
            }
            _ => {
                return Ok(Fetched {
                    path: download.part.to_owned(),
                    digest,
                    size,
                    chunks: take_notes(download.part)?,
                });
            }
        };
        remove_file_if_there(download.part)?;
        remove_sidecars(download.part)?;
        if !resumed {
            return Err(problem);
        }
        // The bytes left by an earlier transfer may be the wrong ones.
        step.note(format!("{problem}; fetching it again from the start"));
        resumed = false;
        transfer = Transfer::open(client, download, step).await?;
    }
}

/// Mends a complete file of a wrong digest, or says what is wrong with it.
async fn look_again(
    client: &Client,
    download: &Download<'_>,
    wrong: DownloadError,
    (size, sure): (u64, bool),
    step: &mut Step,
) -> Result<Fetched, DownloadError> {
    let Some(expected) = download.expected_digest.filter(|_| download.second_look) else {
        return Err(wrong);
    };
    step.note(format!("{wrong}; looking for what is wrong with it"));
    let patience = download.patience();
    let mut again = Again::new(client, download);
    let length = if sure {
        size
    } else {
        again.length(size, patience).await?
    };
    let measure = (download.chunk_bytes, length);
    match repair::second_look(download.part, measure, expected, patience, &mut again, step).await? {
        Outcome::Mended { size } => {
            step.note("mended: it has the digest that was expected");
            Ok(Fetched {
                path: download.part.to_owned(),
                digest: expected,
                size,
                chunks: None,
            })
        }
        Outcome::Same => Err(wrong),
        Outcome::Differs { chunks } => Err(DownloadError::Unstable {
            url: display_url(download.url),
            expected,
            chunks,
            chunk_bytes: download.chunk_bytes,
        }),
    }
}
