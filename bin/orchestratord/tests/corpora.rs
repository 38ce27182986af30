//! The corpora of the fuzz targets, and simple mutations of them, through the
//! same functions. A find of a long run is kept as a file there, and so held
//! here for good.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a test that cannot go on fails"
)]

#[path = "../../../fuzz/src/harness.rs"]
#[allow(unreachable_pub, reason = "a library for the fuzz targets")]
mod harness;

use std::path::Path;

/// How many mutations of each file are tried.
const MUTATIONS: u64 = 60;

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let entries = std::fs::read_dir(dir.join(target)).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, std::fs::read(&path).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Pseudo-random and the same in every run: the finding is the fuzzer's work,
/// this is the keeping.
fn mutated(bytes: &[u8], other: &[u8], round: u64) -> Vec<u8> {
    let mut state = round.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ (bytes.len() as u64) | 1;
    let mut next = |end: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        usize::try_from(state >> 11).unwrap() % end.max(1)
    };
    let mut out = bytes.to_vec();
    for _ in 0..=next(3) {
        let at = next(out.len() + 1);
        match next(6) {
            0 if at < out.len() => out[at] ^= 1 << next(8),
            1 => out.truncate(at),
            2 => {
                let end = out.len().min(at + next(16));
                out.drain(at..end);
            }
            3 => {
                let end = out.len().min(at + next(64));
                let again = out[at..end].to_vec();
                out.splice(at..at, again);
            }
            4 => {
                let from = next(other.len() + 1);
                out.splice(at.., other[from..].iter().copied());
            }
            _ => {
                const ODD: &[&[u8]] = &[
                    b"\0",
                    b"\xff\xff\xff\xff",
                    b"\r\n\r\n",
                    b"{",
                    b"[",
                    b"\"",
                    b"\xef\xbb\xbf",
                    b"-1",
                    b"\xff\xff\xff\xff\xff\xff\xff\x7f",
                ];
                out.splice(at..at, ODD[next(ODD.len())].iter().copied());
            }
        }
    }
    out
}

#[test]
fn the_kept_corpora_and_what_is_near_them_are_read_without_harm() {
    for (target, run) in harness::ALL {
        let files = corpus(target);
        assert!(files.len() >= 8, "{target} has no corpus");
        for (index, (name, bytes)) in files.iter().enumerate() {
            println!("{target}/{name}");
            run(bytes);
            let other = &files[(index * 7 + 1) % files.len()].1;
            for round in 0..MUTATIONS {
                let input = mutated(bytes, other, round);
                let held = std::panic::catch_unwind(|| run(&input));
                assert!(
                    held.is_ok(),
                    "{target}/{name}, round {round}: {:?}",
                    String::from_utf8_lossy(&input)
                );
            }
        }
    }
}
