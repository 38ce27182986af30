//! Whole answers, within a limit on their size.

use reqwest::Response;
use worker_adapters_adapter_api::WorkerError;

/// An answer that is longer is no engine's protocol. `/tokenize` of a very long
/// prompt is the longest we ask for ourselves.
pub(crate) const LIMIT: usize = 64 << 20;

/// The whole body of a response; `failure` says what a broken one means.
///
/// # Errors
/// What `failure` says, or `Protocol` for one beyond 64 MiB.
pub async fn whole(
    mut response: Response,
    failure: impl Fn(reqwest::Error) -> WorkerError,
) -> Result<Vec<u8>, WorkerError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(&failure)? {
        if body.len() + chunk.len() > LIMIT {
            return Err(WorkerError::Protocol {
                what: format!("an answer of more than {LIMIT} bytes"),
            });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}
