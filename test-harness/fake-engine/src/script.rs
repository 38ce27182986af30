//! What a fake engine shall do. The default is a healthy engine that loads at
//! once and answers with a fixed list of words.

use serde::{Deserialize, Serialize};

/// Written as JSON beside the binary; every field may be left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[allow(
    clippy::struct_excessive_bools,
    reason = "independent switches, each named at its use"
)]
pub struct Script {
    /// The build number it reports, as in `b11434`.
    pub build: u32,
    /// The commit it reports.
    pub commit: String,

    /// How long every route answers 503 after the port is open.
    pub load_ms: u64,
    /// Never stop loading.
    pub load_hang: bool,
    /// Exit instead of becoming ready, once `load_ms` is over.
    pub load_failure: Option<LoadFailure>,
    /// How many starts `load_failure` is for; later ones work. `None`: all.
    pub failing_starts: Option<u64>,
    /// Lines of about 100 bytes written to the log when loading begins.
    pub log_lines: u64,
    /// Time between further lines while loading: a slow load that shows
    /// progress. 0 writes none.
    pub log_every_ms: u64,
    /// Do not exit on SIGTERM.
    pub ignore_term: bool,
    /// Start a `sleep 1000` as a child of the engine.
    pub grandchild: bool,

    /// The pieces of the answer. With `n_predict` beyond their number the
    /// answer ends as by an end-of-text token.
    pub pieces: Vec<String>,
    /// Begin again with the first piece after the last, up to `n_predict`.
    pub cycle: bool,
    /// Go on from the pieces that the prompt ends with, as a model at temperature 0
    /// does.
    pub continues: bool,
    /// How many words about its progress in the prompt come before the first
    /// piece, where they are asked for.
    pub progress_events: u64,
    /// Answer with `w0 w1 w2 …` up to `n_predict` instead of with `pieces`. A
    /// prompt that ends with such a word is continued with the next one, as a
    /// real model goes on with its own half-said answer: a gap or a repeat in
    /// a continued answer shows.
    pub numbered: bool,
    /// Time before the first piece.
    pub first_token_ms: u64,
    /// Send the response's headers only with the first piece, as older builds
    /// of the real engine do, instead of when the prompt is begun with.
    pub late_headers: bool,
    /// Time before every further piece.
    pub token_ms: u64,
    /// How a completion goes wrong.
    pub fault: Option<Fault>,
    /// How many completions the fault is for; later ones work. `None`: all.
    pub faulty_completions: Option<u64>,
    /// How long a slot stays busy after its client has gone away.
    pub slot_free_ms: u64,
    /// Cut the stream into writes of this many bytes, whatever they cut
    /// through. 0 writes event by event.
    pub chunk_bytes: usize,
    /// Fixes the number of tokens of any prompt. `None`: one per word.
    pub prompt_tokens: Option<u64>,

    /// `/metrics` answers 501, even with `--metrics`.
    pub metrics_missing: bool,
    /// `/slots` answers 501.
    pub slots_missing: bool,
}

impl Default for Script {
    fn default() -> Self {
        let pieces = "A fake engine counts its words and never tires of the same old song";
        Self {
            build: 11434,
            commit: "fa4ee61".to_owned(),
            load_ms: 0,
            load_hang: false,
            load_failure: None,
            failing_starts: None,
            log_lines: 0,
            log_every_ms: 0,
            ignore_term: false,
            grandchild: false,
            pieces: pieces.split_inclusive(' ').map(str::to_owned).collect(),
            cycle: false,
            continues: false,
            progress_events: 0,
            numbered: false,
            first_token_ms: 0,
            late_headers: false,
            token_ms: 0,
            fault: None,
            faulty_completions: None,
            slot_free_ms: 0,
            chunk_bytes: 0,
            prompt_tokens: None,
            metrics_missing: false,
            slots_missing: false,
        }
    }
}

impl Script {
    /// One that answers with these pieces.
    pub fn with_pieces(pieces: &[&str]) -> Self {
        Self {
            pieces: pieces.iter().map(|&piece| piece.to_owned()).collect(),
            ..Self::default()
        }
    }

    /// One that decodes for a long time, a piece every `token_ms`.
    pub fn endless(token_ms: u64) -> Self {
        Self {
            cycle: true,
            token_ms,
            ..Self::default()
        }
    }
}

/// How loading fails.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadFailure {
    pub exit_code: i32,
    /// Written to stderr before the exit.
    pub message: String,
}

/// How a completion goes wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// The process exits in mid-stream.
    Crash { after_tokens: u64, exit_code: i32 },
    /// No further byte, connection open, `/health` still 200.
    Hang { after_tokens: u64 },
    /// The connection breaks: the response is visibly incomplete.
    Cut { after_tokens: u64 },
    /// The response ends cleanly, but its last event never came.
    EndWithoutFinal { after_tokens: u64 },
    /// An error event in mid-stream, then the end.
    ErrorEvent { after_tokens: u64 },
    /// The stream holds something that is not JSON.
    Garbage { after_tokens: u64 },
    /// 500 instead of a stream, although `/health` is 200.
    Status500,
    /// 503 with the body of a loading engine.
    Status503,
}

impl Fault {
    /// After how many tokens it strikes; none where no stream begins.
    pub fn after_tokens(&self) -> Option<u64> {
        match self {
            Self::Crash { after_tokens, .. }
            | Self::Hang { after_tokens }
            | Self::Cut { after_tokens }
            | Self::EndWithoutFinal { after_tokens }
            | Self::ErrorEvent { after_tokens }
            | Self::Garbage { after_tokens } => Some(*after_tokens),
            Self::Status500 | Self::Status503 => None,
        }
    }
}
