//! One file's way here: requests, and what is done about their answers.

use std::time::Duration;

use reqwest::header::{
    ACCEPT_ENCODING, ETAG, HeaderMap, HeaderValue, IF_RANGE, LAST_MODIFIED, RANGE,
};
use reqwest::{Client, Response, StatusCode};

use super::{Download, DownloadError, display_url};
use crate::chain::one_line;
use crate::download_again::Again;
use crate::download_headers::{content_range, retry_after, stored_etag};
use crate::fs::{free_space, remove_file_if_there, write_atomic};
use crate::part::{PartFile, Sidecar, sidecar};
use crate::progress::Step;
use crate::repair;

/// The longest wait between two attempts, whatever the server asks for.
const MAX_BACKOFF: Duration = Duration::from_mins(1);

/// An attempt that brought at least this much is not counted as a failed one.
const PROGRESS_THAT_COUNTS: u64 = 1024 * 1024;

/// The attempts at one file.
pub(super) struct Transfer<'a> {
    client: &'a Client,
    download: &'a Download<'a>,
    pub(super) part: PartFile,
    /// The server's name for this version of the file.
    etag: Option<HeaderValue>,
    /// When this version was made, in the server's words of this transfer.
    modified: Option<HeaderValue>,
    /// The whole file's length, once known.
    total: Option<u64>,
    failures: u32,
}

/// What one attempt came to.
enum Attempt {
    Whole,
    /// What is there cannot be continued: begin again.
    Restart(&'static str),
}

impl<'a> Transfer<'a> {
    pub(super) async fn open(
        client: &'a Client,
        download: &'a Download<'a>,
        step: &Step,
    ) -> Result<Self, DownloadError> {
        let mut again = Again::new(client, download);
        let mut part = repair::open(
            download.part,
            download.chunk_bytes,
            download.patience(),
            &mut again,
            step,
        )
        .await?;
        let etag = stored_etag(download.part);
        // Without a digest or the server's name for the version, nothing would
        // notice that the file changed between two transfers; and without the
        // chunks' digests, nothing that it changed on disk.
        let trusted = download.expected_digest.is_some() || etag.is_some() && part.is_known();
        let too_long = download
            .expected_size
            .is_some_and(|expected| part.size() > expected);
        if part.size() > 0 && (!trusted || too_long) {
            part.restart().await?;
        }
        Ok(Self {
            client,
            download,
            part,
            etag,
            modified: None,
            total: download.expected_size,
            failures: 0,
        })
    }

    /// Attempts until the file is whole or hope is gone. The length that the
    /// server gives goes with it, where it gives one.
    pub(super) async fn run(
        mut self,
        step: &mut Step,
    ) -> Result<(PartFile, Option<u64>), DownloadError> {
        step.set(self.part.size(), self.total);
        if self.part.size() > 0 && Some(self.part.size()) == self.download.expected_size {
            return Ok((self.part, self.total));
        }
        let mut restarts = 0;
        loop {
            let before = self.part.size();
            let error = match self.attempt(step).await {
                Ok(Attempt::Whole) => return Ok((self.part, self.total)),
                Ok(Attempt::Restart(why)) => {
                    restarts += 1;
                    if restarts > 2 {
                        return Err(self.confused(why));
                    }
                    step.note(format!("{why}; fetching it again from the start"));
                    self.part.restart().await?;
                    self.etag = None;
                    self.modified = None;
                    self.total = self.download.expected_size;
                    continue;
                }
                Err(error) => error,
            };
            // What has arrived must outlive the failure.
            self.part.flush().await?;
            if !error.is_worth_another_request() {
                return Err(error);
            }
            if self.part.size() >= before + PROGRESS_THAT_COUNTS {
                self.failures = 0;
            } else {
                self.failures += 1;
            }
            if self.failures >= self.download.attempts.max(1) {
                return Err(error);
            }
            let wait = self.backoff(&error);
            let seconds = wait.as_secs_f64();
            step.note(format!(
                "{}; trying again in {seconds:.1} s",
                one_line(&error)
            ));
            tokio::time::sleep(wait).await;
        }
    }

    fn backoff(&self, error: &DownloadError) -> Duration {
        let doubled = self.download.backoff
            * 2u32
                .saturating_pow(self.failures.saturating_sub(1))
                .min(1024);
        error
            .retry_after()
            .unwrap_or(doubled)
            .max(doubled)
            .min(MAX_BACKOFF)
    }

    fn confused(&self, why: &'static str) -> DownloadError {
        DownloadError::Confused {
            url: display_url(self.download.url),
            why,
        }
    }

    async fn attempt(&mut self, step: &mut Step) -> Result<Attempt, DownloadError> {
        let response = self.send().await?;
        let from = self.part.size();
        match response.status() {
            StatusCode::PARTIAL_CONTENT => match content_range(response.headers()) {
                Some(range) if range.start == Some(from) => {
                    if self.is_another_version(range.total, response.headers()) {
                        return Ok(Attempt::Restart(
                            "the server has another version of the file",
                        ));
                    }
                    self.total = range.total.or(self.total);
                }
                _ => {
                    return Ok(Attempt::Restart(
                        "the server sent another part of the file than asked for",
                    ));
                }
            },
            StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => {
                let total = content_range(response.headers()).and_then(|range| range.total);
                let same = !self.is_another_version(total, response.headers());
                return Ok(if total == Some(from) && same {
                    Attempt::Whole
                } else {
                    Attempt::Restart("what was here is not of the server's file")
                });
            }
            status if status.is_success() => {
                if from > 0 {
                    self.part.restart().await?;
                }
                self.total = response.content_length().or(self.download.expected_size);
                self.modified = response.headers().get(LAST_MODIFIED).cloned();
            }
            status => {
                return Err(DownloadError::status(
                    self.download.url,
                    status,
                    retry_after(response.headers()),
                ));
            }
        }
        self.check_total()?;
        self.check_space()?;
        self.remember_etag(response.headers())?;
        self.receive(response, step).await?;
        Ok(Attempt::Whole)
    }

    /// Whether an answer is about another version than what is here, as far as
    /// can be told: a server may ignore `If-Range`, and without a name for the
    /// version there is none to send. With a digest to come the whole tells.
    fn is_another_version(&self, total: Option<u64>, headers: &HeaderMap) -> bool {
        if self.download.expected_digest.is_some() {
            return false;
        }
        let other_total = matches!((self.total, total), (Some(ours), Some(sent)) if ours != sent);
        let other = match (&self.etag, headers.get(ETAG)) {
            (Some(ours), Some(sent)) => ours != sent,
            _ => matches!(
                (&self.modified, headers.get(LAST_MODIFIED)),
                (Some(ours), Some(sent)) if ours != sent
            ),
        };
        other || (other_total && self.download.expected_size.is_none())
    }

    async fn send(&self) -> Result<Response, DownloadError> {
        // A compressed answer would have other lengths and another digest.
        let mut request = self
            .client
            .get(self.download.url)
            .header(ACCEPT_ENCODING, "identity");
        if let Some(bearer) = self.download.bearer {
            // reqwest marks it sensitive and drops it when redirected to another host.
            request = request.bearer_auth(bearer.reveal());
        }
        if self.part.size() > 0 {
            request = request.header(RANGE, format!("bytes={}-", self.part.size()));
            if let Some(etag) = &self.etag {
                request = request.header(IF_RANGE, etag.clone());
            }
        }
        match tokio::time::timeout(self.download.stall_timeout, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(DownloadError::request(self.download.url, error)),
            Err(_) => Err(self.stalled()),
        }
    }

    async fn receive(
        &mut self,
        mut response: Response,
        step: &mut Step,
    ) -> Result<(), DownloadError> {
        step.set(self.part.size(), self.total);
        loop {
            let chunk =
                match tokio::time::timeout(self.download.stall_timeout, response.chunk()).await {
                    Ok(Ok(Some(chunk))) => chunk,
                    Ok(Ok(None)) => break,
                    Ok(Err(error)) => {
                        return Err(DownloadError::Cut {
                            url: display_url(self.download.url),
                            received: self.part.size(),
                            source: error.without_url(),
                        });
                    }
                    Err(_) => return Err(self.stalled()),
                };
            self.part.write(&chunk).await?;
            self.download.rate.pace(chunk.len() as u64).await;
            step.set(self.part.size(), self.total);
            if let Some(total) = self.total
                && self.part.size() > total
            {
                return Err(self.wrong_size(total));
            }
        }
        match self.total {
            Some(total) if total > self.part.size() => Err(DownloadError::Short {
                url: display_url(self.download.url),
                received: self.part.size(),
                total,
            }),
            _ => Ok(()),
        }
    }

    fn stalled(&self) -> DownloadError {
        DownloadError::Stalled {
            url: display_url(self.download.url),
            received: self.part.size(),
            seconds: self.download.stall_timeout.as_secs_f64(),
        }
    }

    fn wrong_size(&self, expected: u64) -> DownloadError {
        DownloadError::WrongSize {
            url: display_url(self.download.url),
            expected,
            actual: self.part.size(),
        }
    }

    /// The server's length must be the expected one: better to hear it now
    /// than after the last byte.
    fn check_total(&self) -> Result<(), DownloadError> {
        match (self.download.expected_size, self.total) {
            (Some(expected), Some(actual)) if expected != actual => Err(DownloadError::WrongSize {
                url: display_url(self.download.url),
                expected,
                actual,
            }),
            _ => Ok(()),
        }
    }

    fn check_space(&self) -> Result<(), DownloadError> {
        let Some(total) = self.total else {
            return Ok(());
        };
        let needed = total.saturating_sub(self.part.size());
        let free = free_space(self.download.part)?;
        if free < needed {
            return Err(DownloadError::NoSpace {
                path: self.download.part.to_owned(),
                needed,
                free,
            });
        }
        Ok(())
    }

    /// Keeps the server's name for this version beside the part file, so that
    /// a later process can continue it. Weak names do not promise equal bytes.
    fn remember_etag(&mut self, headers: &HeaderMap) -> Result<(), DownloadError> {
        let etag = headers
            .get(ETAG)
            .filter(|etag| !etag.as_bytes().starts_with(b"W/"));
        if etag != self.etag.as_ref() || self.part.size() == 0 {
            let path = sidecar(self.download.part, Sidecar::Etag);
            match etag {
                Some(etag) => write_atomic(&path, etag.as_bytes())?,
                None => remove_file_if_there(&path)?,
            }
            self.etag = etag.cloned();
        }
        Ok(())
    }
}
