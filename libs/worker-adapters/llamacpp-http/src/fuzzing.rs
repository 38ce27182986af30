//! What fuzz targets need of the private parts. No part of the API.

use worker_adapters_adapter_api::CallApi;

use crate::calls::{events, read_answer};
use crate::wire::{Chunk, ErrorAnswer};

/// Reads an answer over HTTP in reads of `read` bytes: its status, its body, and why
/// that ends early.
pub fn answer(data: &[u8], read: usize) -> (Option<u16>, Vec<u8>, Option<String>) {
    crate::http::read_all(data, read)
}

/// Reads one event of a completion's stream, and an error's body.
pub fn chunk(data: &[u8]) {
    if let Ok(chunk) = serde_json::from_slice::<Chunk<'_>>(data) {
        let _ = chunk.summary();
        if let Some(error) = chunk.error {
            let _ = error.into_worker_error("http://127.0.0.1:1");
        }
    }
    let _ = serde_json::from_slice::<ErrorAnswer>(data);
    for api in [
        CallApi::ChatCompletions,
        CallApi::Completions,
        CallApi::Responses,
        CallApi::Messages,
    ] {
        if let Ok(text) = std::str::from_utf8(data) {
            let _ = events::read(api, text);
        }
        let _ = read_answer(api, data);
    }
}
