//! Parts of a file over HTTP, for repairs.

use std::ops::Range;

use reqwest::header::{ACCEPT_ENCODING, HeaderValue, IF_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode};

use crate::download::{Download, DownloadError, display_url};
use crate::download_headers::{content_range, retry_after, stored_etag};
use crate::repair::{Patience, Reply, Reread, Sink};

/// One file on a server.
pub(crate) struct Again<'a> {
    client: &'a Client,
    download: &'a Download<'a>,
    etag: Option<HeaderValue>,
}

impl<'a> Again<'a> {
    pub(crate) fn new(client: &'a Client, download: &'a Download<'a>) -> Self {
        Self {
            client,
            download,
            etag: stored_etag(download.part),
        }
    }

    /// The file's length as the server gives it now, else this one.
    pub(crate) async fn length(
        &self,
        otherwise: u64,
        patience: Patience,
    ) -> Result<u64, DownloadError> {
        if let Some(expected) = self.download.expected_size {
            return Ok(expected);
        }
        let mut failures = 0;
        loop {
            match self.send(None).await {
                // The body of this answer is not read.
                Ok(response) => return Ok(response.content_length().unwrap_or(otherwise)),
                Err(error) => {
                    let may_pass = error.is_worth_another_request();
                    patience.after(error, may_pass, &mut failures).await?;
                }
            }
        }
    }

    async fn send(&self, range: Option<&Range<u64>>) -> Result<Response, DownloadError> {
        let mut request = self
            .client
            .get(self.download.url)
            .header(ACCEPT_ENCODING, "identity");
        if let Some(bearer) = self.download.bearer {
            request = request.bearer_auth(bearer.reveal());
        }
        if let Some(range) = range {
            let last = range.end.saturating_sub(1);
            request = request.header(RANGE, format!("bytes={}-{last}", range.start));
            if let Some(etag) = &self.etag {
                request = request.header(IF_RANGE, etag.clone());
            }
        }
        let response = tokio::time::timeout(self.download.stall_timeout, request.send())
            .await
            .map_err(|_| self.stalled(0))?
            .map_err(|error| DownloadError::request(self.download.url, error))?;
        let status = response.status();
        if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(response);
        }
        let patience = retry_after(response.headers());
        Err(DownloadError::status(self.download.url, status, patience))
    }

    fn stalled(&self, received: u64) -> DownloadError {
        DownloadError::Stalled {
            url: display_url(self.download.url),
            received,
            seconds: self.download.stall_timeout.as_secs_f64(),
        }
    }
}

impl Reread for Again<'_> {
    type Error = DownloadError;

    async fn read(
        &mut self,
        range: Range<u64>,
        sink: &mut Sink<'_>,
    ) -> Result<Reply, DownloadError> {
        let whole = range.start == 0 && !sink.ends_early();
        let mut response = self.send((!whole).then_some(&range)).await?;
        let starts_right = match response.status() {
            StatusCode::PARTIAL_CONTENT => content_range(response.headers())
                .is_some_and(|sent| sent.start == Some(range.start)),
            StatusCode::RANGE_NOT_SATISFIABLE => false,
            _ => range.start == 0,
        };
        if !starts_right {
            return Ok(Reply::NoSuchPart);
        }
        let mut received = 0;
        while !sink.is_full() {
            let piece = tokio::time::timeout(self.download.stall_timeout, response.chunk())
                .await
                .map_err(|_| self.stalled(received))?
                .map_err(|error| DownloadError::Cut {
                    url: display_url(self.download.url),
                    received,
                    source: error.without_url(),
                })?;
            let Some(piece) = piece else {
                return Err(DownloadError::Short {
                    url: display_url(self.download.url),
                    received,
                    total: received + sink.missing(),
                });
            };
            received += piece.len() as u64;
            sink.take(&piece).await?;
            self.download.rate.pace(piece.len() as u64).await;
        }
        Ok(Reply::Sent)
    }

    fn may_pass(error: &DownloadError) -> bool {
        error.is_worth_another_request()
    }
}
