//! What is done with arbitrary bytes, and what must hold for them. Shared by
//! the fuzz targets and by the ordinary tests, which run the kept corpora.
//!
//! Every function panics if something does not hold.

use std::convert::Infallible;
use std::path::Path;

use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use orchestratord::api::task_request::TaskRequest;
use orchestratord::app::config::{Config, Loaded};
use provision_kit::config::parse_strict;
use provisioners_model_provisioner::{ModelRef, gguf};
use worker_adapters_llamacpp_http::sse::{SseLimits, event_data};

/// A reader of arbitrary bytes.
pub type Harness = fn(&[u8]);

/// All of them, by the name of their target and corpus.
pub const ALL: &[(&str, Harness)] = &[
    ("engine_sse", engine_sse),
    ("engine_answer", engine_answer),
    ("engine_chunk", engine_chunk),
    ("gguf_header", gguf_header),
    ("config", config),
    ("task_request", task_request),
    ("model_reference", model_reference),
];

/// The engine's event stream. The first byte says how the rest is cut into
/// reads, which must make no difference.
pub fn engine_sse(data: &[u8]) {
    let Some((cut, stream)) = data.split_first() else {
        return;
    };
    let whole = events_of(stream, stream.len().max(1));
    let pieces = events_of(stream, usize::from(*cut).max(1));
    assert_eq!(whole, pieces, "reads of {cut} bytes");
}

/// The events, and how the stream ended.
fn events_of(stream: &[u8], read: usize) -> (Vec<String>, Option<String>) {
    const LIMITS: SseLimits = SseLimits {
        line_bytes: 256,
        event_bytes: 512,
    };
    let reads = stream.chunks(read).map(Bytes::copy_from_slice);
    let reads = futures::stream::iter(reads.map(Ok::<_, Infallible>));
    let items: Vec<_> = event_data(reads, LIMITS)
        .collect()
        .now_or_never()
        .expect("nothing is waited for");
    let mut events = Vec::new();
    for item in items {
        match item {
            Ok(event) => {
                assert!(event.len() <= LIMITS.event_bytes);
                events.push(event.into());
            }
            Err(error) => return (events, Some(error.to_string())),
        }
    }
    (events, None)
}

/// The engine's answer over HTTP, head and body. The first byte says how the rest is
/// cut into reads, which must make no difference.
pub fn engine_answer(data: &[u8]) {
    use worker_adapters_llamacpp_http::fuzzing::answer;
    let Some((cut, bytes)) = data.split_first() else {
        return;
    };
    let whole = answer(bytes, bytes.len());
    assert!(whole.1.len() <= bytes.len(), "more body than answer");
    assert_eq!(
        whole,
        answer(bytes, usize::from(*cut)),
        "reads of {cut} bytes"
    );
}

/// One event of the engine's, as JSON.
pub fn engine_chunk(data: &[u8]) {
    worker_adapters_llamacpp_http::fuzzing::chunk(data);
}

/// A model file's header, of a file that is as long as it is and of one that
/// claims to be longer.
pub fn gguf_header(data: &[u8]) {
    let size = data.len() as u64;
    if let Ok(facts) = gguf::read(data, size) {
        assert!(facts.split_count >= 1);
        let text = facts.architecture.iter().chain(&facts.chat_template);
        assert!(
            // Bytes that are no UTF-8 are replaced by three each.
            text.map(String::len).sum::<usize>() <= 3 * data.len(),
            "more text than the file holds"
        );
    }
    let _ = gguf::read(data, size.saturating_mul(1 << 20));
    let _ = gguf::read(data, u64::MAX);
}

/// The configuration, as YAML and as JSON.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let path = Path::new("orchestratord.yaml");
    let Ok(config) = parse_strict::<Config>(text, path) else {
        return;
    };
    let loaded = Loaded {
        config,
        origin: Some((path.to_owned(), text.to_owned())),
    };
    for has_token in [false, true] {
        let _ = loaded.check(has_token, true);
    }
    let limits = &loaded.config.limits;
    assert!((8..=100_000).contains(&limits.connections), "{limits:?}");
    if let Some(token) = &loaded.config.auth.token {
        assert!(token.as_bytes().iter().all(u8::is_ascii_graphic));
    }
}

/// The body of a task's submission.
pub fn task_request(data: &[u8]) {
    let Ok(request) = TaskRequest::parse(data) else {
        return;
    };
    let fits = request.check_length(64).is_ok();
    if let Ok(input) = request.input() {
        assert!(!fits || input.len_bytes() <= 64 + 64);
    }
    if let Ok(stops) = request.stops() {
        assert!(stops.len() <= 16);
        assert!(stops.iter().all(|stop| !stop.is_empty()));
    }
    if let Ok(sampling) = request.sampling() {
        for number in [sampling.temperature, sampling.top_p, sampling.min_p] {
            assert!(number.is_none_or(f64::is_finite));
        }
    }
    assert_ne!(request.max_tokens().ok().flatten(), Some(0));
    let _ = request.start_within();
}

/// What names a model.
pub fn model_reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let reference = match text.parse::<ModelRef>() {
        Ok(reference) => reference,
        Err(error) => {
            assert!(!error.to_string().contains('\n'), "a forged line");
            return;
        }
    };
    assert!(!reference.to_string().contains(char::is_control));
    let again: ModelRef = String::from(reference.clone())
        .parse()
        .expect("what was read can be read again");
    assert_eq!(again, reference);
    let parts: &[&String] = match &reference {
        ModelRef::Hub {
            owner, repo, file, ..
        } => &[owner, repo, file],
        ModelRef::Pip {
            package, member, ..
        } => &[package, member],
        _ => &[],
    };
    for part in parts {
        assert!(
            !part
                .split(['/', '\\'])
                .any(|name| name == ".." || name.is_empty()),
            "{part} leads elsewhere"
        );
    }
}
