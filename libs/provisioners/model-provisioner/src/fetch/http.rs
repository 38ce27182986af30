//! `https:`: a file on a web server.

use std::path::Path;

use provision_kit::download::{self, Download, Fetched};
use provision_kit::progress::Step;

use crate::fetch::{Expected, FetchError, Fetcher};

pub(super) async fn fetch(
    fetcher: &Fetcher,
    url: &str,
    expected: Expected,
    part: &Path,
    step: &mut Step,
) -> Result<Fetched, FetchError> {
    let download = Download {
        expected_digest: expected.digest,
        expected_size: expected.size,
        stall_timeout: fetcher.stall_timeout,
        attempts: fetcher.attempts_at(expected),
        backoff: fetcher.backoff,
        // Another source is as good as a second look.
        second_look: !expected.has_alternative,
        rate: fetcher.rate.clone(),
        ..Download::new(url, part)
    };
    Ok(download::fetch(fetcher.client()?, download, step).await?)
}
