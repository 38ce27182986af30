//! `hf:`: a file on the Hugging Face Hub, through the crate `hf-hub`.
//!
//! Only the crate's byte stream is used. Its own download to a file takes an
//! error page for a model, cannot go on after a cut, and checks neither length
//! nor digest; here the part file does all three. The stream hands on a whole
//! file when a server ignores the range that was asked for, so lengths are
//! compared before the first byte is kept.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use futures::StreamExt;
use hf_hub::repository::download::HFByteStream;
use hf_hub::{HFClient, HFError};
use llama_orch_types::Digest;
use provision_kit::chain::one_line;
use provision_kit::download::{CHUNK_BYTES, DownloadError, Fetched, display_url};
use provision_kit::fs::{free_space, remove_file_if_there, write_atomic};
use provision_kit::part::{PartFile, Sidecar, remove_sidecars, sidecar, take_notes};
use provision_kit::progress::Step;
use provision_kit::repair::{self, Outcome, Patience, Reply, Reread, Sink};

use crate::fetch::{Expected, FetchError, Fetcher, HubProblem};
use crate::reference::ModelRef;

/// An attempt that brought at least this much is not counted as a failed one.
const PROGRESS_THAT_COUNTS: u64 = 1024 * 1024;

const MAX_BACKOFF: Duration = Duration::from_secs(30);

pub(super) async fn fetch(
    fetcher: &Fetcher,
    source: &ModelRef,
    expected: Expected,
    part: &Path,
    step: &mut Step,
) -> Result<Fetched, FetchError> {
    let transfer = Transfer::new(fetcher, source, expected, part)?;
    let mut resumed = false;
    loop {
        let (digest, size) = transfer.run(step, &mut resumed).await?;
        let problem = match (expected.size, expected.digest) {
            (Some(expected), _) if expected != size => FetchError::WrongSize {
                file: transfer.name.clone(),
                expected,
                actual: size,
            },
            (_, Some(expected)) if expected != digest => {
                let result = transfer.look_again((expected, digest, size), step).await;
                if result.as_ref().is_err_and(FetchError::retriable) {
                    // What is here may still be mended by the next start.
                    return result;
                }
                let chunks = take_notes(part)?;
                if result.is_err() {
                    remove_file_if_there(part)?;
                }
                return result.map(|fetched| Fetched { chunks, ..fetched });
            }
            _ => {
                return Ok(Fetched {
                    path: part.to_owned(),
                    digest,
                    size,
                    chunks: take_notes(part)?,
                });
            }
        };
        remove_sidecars(part)?;
        remove_file_if_there(part)?;
        if !resumed {
            return Err(problem);
        }
        // The bytes left by an earlier transfer may be the wrong ones.
        step.note(format!("{problem}; fetching it again from the start"));
    }
}

struct Transfer<'a> {
    fetcher: &'a Fetcher,
    client: HFClient,
    expected: Expected,
    part: &'a Path,
    owner: &'a str,
    repo: &'a str,
    revision: Option<&'a str>,
    file: &'a str,
    /// What errors call the file.
    name: String,
    /// What has arrived may be continued by a later process.
    resumable: bool,
    /// The commit that a branch or tag meant when the transfer began: it may
    /// move on before the last byte.
    commit: OnceLock<String>,
}

impl<'a> Transfer<'a> {
    fn new(
        fetcher: &'a Fetcher,
        source: &'a ModelRef,
        expected: Expected,
        part: &'a Path,
    ) -> Result<Self, FetchError> {
        let ModelRef::Hub {
            owner,
            repo,
            revision,
            file,
        } = source
        else {
            return Err(FetchError::NoSource {
                name: source.to_string(),
            });
        };
        let name = source.to_string();
        let mut builder = HFClient::builder()
            .client(fetcher.client()?.clone())
            .cache_enabled(false)
            .retry_max_attempts(2);
        if let Some(endpoint) = &fetcher.hub.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(token) = &fetcher.hub.token {
            builder = builder.token(token.reveal());
        }
        let client = builder.build().map_err(|error| FetchError::Hub {
            endpoint: display_url(fetcher.hub.endpoint.as_deref().unwrap_or_default()),
            problem: HubProblem::Other,
            source: error.into(),
        })?;
        Ok(Self {
            fetcher,
            client,
            expected,
            part,
            owner,
            repo,
            revision: revision.as_deref(),
            file,
            name,
            resumable: expected.digest.is_some() || source.is_immutable(),
            commit: OnceLock::new(),
        })
    }

    /// Attempts until the file is whole or hope is gone.
    async fn run(&self, step: &mut Step, resumed: &mut bool) -> Result<(Digest, u64), FetchError> {
        let mut total = self.expected.size.or_else(|| self.stored_total());
        let mut part = repair::open(
            self.part,
            CHUNK_BYTES,
            self.patience(),
            &mut Again(self),
            step,
        )
        .await?;
        // Without a digest to come, only the chunks' digests vouch for what is here.
        let trusted = self.expected.digest.is_some() || self.resumable && part.is_known();
        if part.size() > 0 && (!trusted || total.is_none_or(|total| part.size() > total)) {
            part.restart().await?;
        }
        *resumed = part.size() > 0;
        let mut failures = 0;
        loop {
            let before = part.size();
            if before > 0 && total == Some(before) {
                return Ok(part.complete().await?);
            }
            let error = match self.attempt(&mut part, &mut total, step).await {
                Ok(()) => return Ok(part.complete().await?),
                Err(error) => error,
            };
            // What has arrived must outlive the failure.
            part.flush().await?;
            if part.size() >= before + PROGRESS_THAT_COUNTS {
                failures = 0;
            } else {
                failures += 1;
            }
            if !error.is_worth_another_request()
                || failures >= self.fetcher.attempts_at(self.expected)
            {
                return Err(error);
            }
            let wait = self
                .fetcher
                .backoff
                .saturating_mul(1 << failures.saturating_sub(1).min(6))
                .min(MAX_BACKOFF);
            step.note(format!(
                "{}; trying again in {:.1} s",
                one_line(&error),
                wait.as_secs_f64()
            ));
            tokio::time::sleep(wait).await;
        }
    }

    fn patience(&self) -> Patience {
        Patience {
            attempts: self.fetcher.attempts_at(self.expected),
            pause: self.fetcher.backoff,
        }
    }

    /// Mends a complete file of a wrong digest, or says what is wrong with it.
    async fn look_again(
        &self,
        (expected, actual, size): (Digest, Digest, u64),
        step: &mut Step,
    ) -> Result<Fetched, FetchError> {
        let wrong = FetchError::WrongDigest {
            file: self.name.clone(),
            expected,
            actual,
            size,
        };
        if self.expected.has_alternative {
            return Err(wrong);
        }
        step.note(format!("{wrong}; looking for what is wrong with it"));
        let patience = self.patience();
        let measure = (CHUNK_BYTES, size);
        let again = &mut Again(self);
        match repair::second_look(self.part, measure, expected, patience, again, step).await? {
            Outcome::Mended { size } => Ok(Fetched {
                path: self.part.to_owned(),
                digest: expected,
                size,
                chunks: None,
            }),
            Outcome::Same => Err(wrong),
            Outcome::Differs { chunks } => Err(DownloadError::Unstable {
                url: self.name.clone(),
                expected,
                chunks,
                chunk_bytes: CHUNK_BYTES,
            }
            .into()),
        }
    }

    async fn attempt(
        &self,
        part: &mut PartFile,
        total: &mut Option<u64>,
        step: &mut Step,
    ) -> Result<(), FetchError> {
        self.find_commit().await;
        let continues = self.resumable || self.commit.get().is_some();
        let range = total
            .filter(|_| part.size() > 0 && continues)
            .map(|total| part.size()..total);
        if range.is_none() && part.size() > 0 {
            part.restart().await?;
        }
        let asked_for = range.as_ref().map(|range| range.end - range.start);
        let (length, stream) = self.open(range).await?;
        let (length, stream) = match asked_for {
            None => (length, stream),
            Some(asked_for) if length == Some(asked_for) => (length, stream),
            Some(_) => {
                // The server ignored the range, or says nothing of what it sends.
                drop(stream);
                step.note("the Hub does not continue this file; fetching it again from the start");
                part.restart().await?;
                self.open(None).await?
            }
        };
        if part.size() == 0 {
            *total = length;
            self.check_total(length)?;
            if let Some(length) = length {
                write_atomic(&self.total_path(), length.to_string().as_bytes())?;
            }
        }
        self.check_space(part.size(), *total)?;
        self.receive(stream, part, *total, step).await
    }

    /// Asks which commit is meant. A Hub that does not say sends a file that
    /// was cut from its start.
    async fn find_commit(&self) {
        if self.resumable || self.commit.get().is_some() {
            return;
        }
        let repository = self.client.model(self.owner, self.repo);
        let request = repository
            .get_file_metadata()
            .filepath(self.file)
            .maybe_revision(self.revision)
            .send();
        let is_commit =
            |text: &str| text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match tokio::time::timeout(self.fetcher.stall_timeout, request).await {
            Ok(Ok(facts)) if is_commit(&facts.commit_hash) => {
                let _ = self.commit.set(facts.commit_hash);
            }
            Ok(Err(error)) => {
                let (_, error) = explain(error);
                tracing::debug!(file = %self.name, %error, "the Hub does not say which commit this is");
            }
            _ => tracing::debug!(file = %self.name, "the Hub does not say which commit this is"),
        }
    }

    async fn open(
        &self,
        range: Option<std::ops::Range<u64>>,
    ) -> Result<(Option<u64>, HFByteStream), FetchError> {
        let repository = self.client.model(self.owner, self.repo);
        let request = repository
            .download_file_stream()
            .filename(self.file)
            .maybe_revision(self.commit.get().map(String::as_str).or(self.revision))
            .maybe_range(range)
            .send();
        // Three requests and their retries fit in.
        match tokio::time::timeout(self.fetcher.stall_timeout * 2, request).await {
            Ok(answer) => answer.map_err(|error| self.hub_error(error)),
            Err(_) => Err(self.stalled(0)),
        }
    }

    async fn receive(
        &self,
        mut stream: HFByteStream,
        part: &mut PartFile,
        total: Option<u64>,
        step: &mut Step,
    ) -> Result<(), FetchError> {
        step.set(part.size(), total);
        loop {
            match tokio::time::timeout(self.fetcher.stall_timeout, stream.next()).await {
                Ok(Some(Ok(bytes))) => {
                    part.write(&bytes).await?;
                    self.fetcher.rate.pace(bytes.len() as u64).await;
                }
                Ok(Some(Err(error))) => return Err(self.hub_error(error)),
                Ok(None) => break,
                Err(_) => return Err(self.stalled(part.size())),
            }
            step.set(part.size(), total);
            if total.is_some_and(|total| part.size() > total) {
                break;
            }
        }
        match total {
            Some(total) if part.size() < total => Err(self.problem(
                HubProblem::Unavailable,
                format!("the transfer ended after {} of {total} bytes", part.size()),
            )),
            Some(total) if part.size() > total => {
                let actual = part.size();
                part.restart().await?;
                Err(FetchError::WrongSize {
                    file: self.name.clone(),
                    expected: total,
                    actual,
                })
            }
            _ => Ok(()),
        }
    }

    fn check_total(&self, length: Option<u64>) -> Result<(), FetchError> {
        match (self.expected.size, length) {
            (Some(expected), Some(actual)) if expected != actual => Err(FetchError::WrongSize {
                file: self.name.clone(),
                expected,
                actual,
            }),
            _ => Ok(()),
        }
    }

    fn check_space(&self, arrived: u64, total: Option<u64>) -> Result<(), FetchError> {
        let needed = total.unwrap_or(0).saturating_sub(arrived);
        let free = free_space(self.part)?;
        if free < needed {
            return Err(FetchError::NoSpace {
                path: self.part.to_owned(),
                needed,
                free,
            });
        }
        Ok(())
    }

    /// The whole file's length lies beside the part file: to go on, the Hub
    /// must be asked for a range with an end.
    fn total_path(&self) -> PathBuf {
        sidecar(self.part, Sidecar::Total)
    }

    fn stored_total(&self) -> Option<u64> {
        std::fs::read_to_string(self.total_path())
            .ok()?
            .trim()
            .parse()
            .ok()
    }

    fn stalled(&self, received: u64) -> FetchError {
        let seconds = self.fetcher.stall_timeout.as_secs_f64();
        self.problem(
            HubProblem::Stalled,
            format!("nothing came for {seconds:.0} s, after {received} bytes"),
        )
    }

    fn problem(&self, problem: HubProblem, what: String) -> FetchError {
        FetchError::Hub {
            endpoint: display_url(self.client.endpoint()),
            problem,
            source: what.into(),
        }
    }

    fn hub_error(&self, error: HFError) -> FetchError {
        let (problem, source) = explain(error);
        FetchError::Hub {
            endpoint: display_url(self.client.endpoint()),
            problem,
            source,
        }
    }
}

/// Parts of the file, for repairs.
struct Again<'a>(&'a Transfer<'a>);

impl Reread for Again<'_> {
    type Error = FetchError;

    async fn read(&mut self, range: Range<u64>, sink: &mut Sink<'_>) -> Result<Reply, FetchError> {
        let transfer = self.0;
        let wanted = range.end - range.start;
        let whole = range.start == 0 && !sink.ends_early();
        let (length, mut stream) = transfer.open((!whole).then_some(range)).await?;
        // Of a Hub that ignores the range the whole file comes.
        if !whole && length != Some(wanted) {
            return Ok(Reply::NoSuchPart);
        }
        let mut received = 0;
        while !sink.is_full() {
            match tokio::time::timeout(transfer.fetcher.stall_timeout, stream.next()).await {
                Ok(Some(Ok(bytes))) => {
                    received += bytes.len() as u64;
                    sink.take(&bytes).await?;
                    transfer.fetcher.rate.pace(bytes.len() as u64).await;
                }
                Ok(Some(Err(error))) => return Err(transfer.hub_error(error)),
                Ok(None) => {
                    let what = format!("the transfer ended after {received} of {wanted} bytes");
                    return Err(transfer.problem(HubProblem::Unavailable, what));
                }
                Err(_) => return Err(transfer.stalled(received)),
            }
        }
        Ok(Reply::Sent)
    }

    fn may_pass(error: &FetchError) -> bool {
        error.is_worth_another_request()
    }
}

/// What an error of the crate comes to, and its cause without the repetitions
/// (and the signed addresses of storage servers) that the crate's texts hold.
fn explain(error: HFError) -> (HubProblem, Box<dyn std::error::Error + Send + Sync>) {
    // The crate does not export the type of `context`.
    let answered = |status: reqwest::StatusCode, message: Option<&str>| {
        let said = message.map(|message| format!(": {message}"));
        format!("it answered {status}{}", said.unwrap_or_default())
    };
    macro_rules! answered {
        ($context:expr) => {
            answered($context.status, $context.server_message.as_deref()).into()
        };
    }
    match error {
        HFError::AuthRequired { context } | HFError::Forbidden { context } => {
            (HubProblem::Unauthorized, answered!(context))
        }
        HFError::RepoNotFound {
            context: Some(context),
            ..
        }
        | HFError::RevisionNotFound {
            context: Some(context),
            ..
        }
        | HFError::EntryNotFound {
            context: Some(context),
            ..
        } => (HubProblem::NotFound, answered!(context)),
        HFError::RateLimited { context, .. } => (HubProblem::Unavailable, answered!(context)),
        HFError::Http { context } if context.status.is_server_error() => {
            (HubProblem::Unavailable, answered!(context))
        }
        HFError::Http { context } => (HubProblem::Other, answered!(context)),
        // The client refuses to follow to where it leads.
        HFError::Request { source, .. } if source.is_redirect() => {
            (HubProblem::Other, source.without_url().into())
        }
        HFError::Request { source, .. } => (HubProblem::Unavailable, source.without_url().into()),
        error @ HFError::Xet { .. } => (
            HubProblem::Unavailable,
            without_queries(&one_line(&error)).into(),
        ),
        error => (HubProblem::Other, without_queries(&one_line(&error)).into()),
    }
}

/// The text without the queries of the addresses in it: they hold signatures.
fn without_queries(text: &str) -> String {
    let words = text.split(' ').map(|word| match word.split_once('?') {
        Some((address, _)) if address.contains("://") => address,
        _ => word,
    });
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::without_queries;

    #[test]
    fn signatures_of_addresses_are_not_shown() {
        let text = "cannot get (https://s.example/a/b?X-Amz-Signature=secret&y): is it there? no";
        assert_eq!(
            without_queries(text),
            "cannot get (https://s.example/a/b is it there? no"
        );
    }
}
