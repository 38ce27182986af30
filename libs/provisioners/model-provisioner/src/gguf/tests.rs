use proptest::prelude::*;

use std::io::Read as _;

use super::*;

#[path = "../../tests/support/gguf.rs"]
mod build;

use build::{Gguf, array_head, number, text};

fn parse(bytes: &[u8]) -> Result<GgufFacts, GgufError> {
    read(bytes, bytes.len() as u64)
}

#[test]
fn the_facts_of_a_small_file() {
    let facts = parse(&Gguf::tiny().bytes()).unwrap();
    assert_eq!(
        facts,
        GgufFacts {
            architecture: Some("llama".into()),
            ctx_max: Some(8192),
            quantization: Some("Q4_1".into()),
            chat_template: Some("{{ messages }}".into()),
            parameter_count: Some(64 * 3 + 64),
            split_count: 1,
            shape: None,
        }
    );
}

#[test]
fn the_shape_is_read_where_the_file_tells_it() {
    let shape = |file: &Gguf| parse(&file.bytes()).unwrap().shape;
    let mut file = Gguf::tiny();
    assert_eq!(shape(&file), None);
    file.pair("llama.block_count", number(30));
    file.pair("llama.embedding_length", number(64));
    file.pair("llama.attention.head_count", number(8));
    let plain = ModelShape {
        layers: 30,
        embedding: 64,
        kv_heads: 8,
        key_length: 8,
        value_length: 8,
        vocabulary: 3,
    };
    assert_eq!(shape(&file), Some(plain));
    file.pair("llama.attention.head_count_kv", number(2));
    file.pair("llama.attention.key_length", number(16));
    file.pair("clip.attention.value_length", number(99));
    let grouped = ModelShape {
        kv_heads: 2,
        key_length: 16,
        ..plain
    };
    assert_eq!(shape(&file), Some(grouped));
    file.pair("llama.block_count", number(0));
    assert_eq!(shape(&file), None, "nothing is divided by it");
}

#[test]
fn what_is_unknown_is_no_reason_to_refuse() {
    let mut file = Gguf::tiny();
    file.pairs.retain(|(key, _)| key != "general.file_type");
    file.pair("general.file_type", number(12_345));
    file.tensor("strange", &[1000], 999, 64);
    file.pair("Ünknown key/with odd:letters", text("x"));
    let facts = parse(&file.bytes()).unwrap();
    // The type that takes most bytes stands in: 256 of F32, 120 of Q4_1.
    assert_eq!(facts.quantization.as_deref(), Some("F32"));
    let empty = Gguf {
        version: 2,
        pairs: Vec::new(),
        tensors: Vec::new(),
    };
    assert_eq!(parse(&empty.bytes()).unwrap().parameter_count, None);
}

#[test]
fn context_of_its_own_architecture_only() {
    let mut file = Gguf::tiny();
    file.pair("clip.context_length", number(77));
    assert_eq!(parse(&file.bytes()).unwrap().ctx_max, Some(8192));
}

#[test]
fn every_cut_is_noticed() {
    let bytes = Gguf::tiny().bytes();
    for length in 4..bytes.len() {
        let error = parse(&bytes[..length]).unwrap_err();
        assert!(error.is_truncated(), "{length}: {error}");
    }
    let error = parse(&bytes[..bytes.len() - 1]).unwrap_err();
    assert!(
        matches!(error, GgufError::Truncated { needed, actual } if needed == actual + 1),
        "{error}"
    );
    // A file that claims to be longer than it is.
    let error = read(&bytes[..100], bytes.len() as u64).unwrap_err();
    assert!(error.is_truncated(), "{error}");
}

#[test]
fn other_files_are_named_by_how_they_begin() {
    let error = parse(b"<!DOCTYPE html>").unwrap_err();
    assert!(error.to_string().contains("`<!DO`"), "{error}");
    assert!(matches!(parse(b"").unwrap_err(), GgufError::NotGguf { .. }));
    assert!(matches!(
        parse(b"GG").unwrap_err(),
        GgufError::NotGguf { .. }
    ));
    let mut file = Gguf::tiny();
    file.version = 1;
    assert!(matches!(parse(&file.bytes()), Err(GgufError::Version(1))));
    file.version = 3u32.swap_bytes();
    assert!(matches!(parse(&file.bytes()), Err(GgufError::BigEndian)));
}

#[test]
fn hostile_counts_end_quickly() {
    let mut counts = b"GGUF\x03\0\0\0".to_vec();
    counts.extend([0xff; 16]);
    assert!(parse(&counts).unwrap_err().is_truncated());
    for head in [
        array_head(8, usize::MAX),
        array_head(10, usize::MAX),
        array_head(9, usize::MAX),
    ] {
        let mut file = Gguf::tiny();
        file.pair("bomb", head);
        assert!(parse(&file.bytes()).is_err());
    }
    let mut deep = array_head(9, 1);
    for _ in 0..10 {
        deep.extend(&array_head(9, 1)[4..]);
    }
    let mut file = Gguf::tiny();
    file.pair("deep", deep);
    assert!(matches!(parse(&file.bytes()), Err(GgufError::Malformed(_))));
    let mut file = Gguf::tiny();
    file.tensor("huge", &[u64::MAX, 2], 0, 0);
    assert!(matches!(parse(&file.bytes()), Err(GgufError::Malformed(_))));
    let mut file = Gguf::tiny();
    file.tensor("wide", &[u64::MAX / 8], 0, 0);
    assert!(parse(&file.bytes()).is_err());
    let mut file = Gguf::tiny();
    file.pair("general.alignment", number(7));
    assert!(matches!(parse(&file.bytes()), Err(GgufError::Malformed(_))));
}

#[test]
fn an_overlong_template_is_left_out() {
    let mut file = Gguf::tiny();
    file.pairs
        .retain(|(key, _)| key != "tokenizer.chat_template");
    file.pair(
        "tokenizer.chat_template",
        text(&"x".repeat(MAX_TEXT as usize + 1)),
    );
    let facts = parse(&file.bytes()).unwrap();
    assert_eq!(facts.chat_template, None);
    assert_eq!(facts.architecture.as_deref(), Some("llama"));
}

#[test]
fn a_header_without_end_is_given_up() {
    // As many pairs and tensors as can be named, each of nothing: a sparse
    // file of any size looks so.
    let head: Vec<u8> = [&b"GGUF\x03\0\0\0"[..], &[0xff; 16]].concat();
    for byte in [0, 1, 9] {
        let endless = head.chain(io::repeat(byte));
        let error = read_within(BufReader::new(endless), u64::MAX, 1 << 20).unwrap_err();
        assert!(matches!(error, GgufError::Malformed(_)), "{byte}: {error}");
    }
}

#[test]
fn no_claimed_length_is_believed() {
    let bytes = Gguf::tiny().bytes();
    // Whatever length, count or size stands there: nothing is allocated for it.
    for at in 8..bytes.len() - 8 {
        for claim in [1 << 40, u64::MAX / 2, u64::MAX] {
            let mut bytes = bytes.clone();
            bytes[at..at + 8].copy_from_slice(&claim.to_le_bytes());
            let _ = parse(&bytes);
            let _ = read(&bytes[..], u64::MAX);
        }
    }
}

proptest! {
    /// Texts that lie in the buffer are stepped over there, others by its refills.
    #[test]
    fn a_header_reads_alike_through_any_buffer(
        words in prop::collection::vec("[a-z]{0,20}", 0..40),
        capacity in 1..200_usize,
    ) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let mut file = Gguf::tiny();
        file.pair("tokenizer.ggml.tokens", build::texts(&words));
        file.pair("after.it", number(7));
        let bytes = file.bytes();
        let whole = parse(&bytes);
        let buffered = BufReader::with_capacity(capacity, &bytes[..]);
        let buffered = read(buffered, bytes.len() as u64);
        prop_assert_eq!(format!("{whole:?}"), format!("{buffered:?}"));
        prop_assert!(whole.is_ok());
    }

    #[test]
    fn random_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..300), size: u64) {
        let _ = read(&bytes[..], size);
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(&bytes);
        let _ = read(&file[..], size);
        let _ = parse(&file);
    }

    #[test]
    fn mutated_headers_are_answered(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        claimed in prop::option::of(any::<u64>()),
    ) {
        let mut bytes = Gguf::tiny().bytes();
        for (index, value) in changes {
            let index = index.index(bytes.len());
            bytes[index] = value;
        }
        let _ = read(&bytes[..], claimed.unwrap_or(bytes.len() as u64));
    }
}
