//! What a run leaves behind, for people to read afterwards: one directory for
//! each run under `target/proof/e2e-haiku/`.
//!
//! ```text
//! admission.json           the answer to POST /v2/tasks, and the task
//! transcript.sse           the stream, with the time of every event
//! daemon-metrics-*.txt     the daemon's /metrics, before and after
//! engine-metrics-*.txt     the engine's /metrics, before and after
//! capabilities.json        what the daemon says it runs
//! handoff.json             the engine's handoff file
//! verification.json        every check and what was seen
//! report.md                the same in short
//! daemon.log               what the daemon wrote to standard error
//! engine.log               what the engine wrote
//! ```
//!
//! A second attempt's files have `second-` before their names.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use crate::binary::target_directory;
use crate::sse::{Arrived, render, text};
use crate::verify::Check;
use crate::words::Minute;

/// One run's directory.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    prefix: &'static str,
}

impl Bundle {
    /// A new one, named after the time and this process.
    pub fn create() -> Self {
        let time = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let run = format!("{time}-{}", std::process::id());
        let dir = target_directory().join("proof").join("e2e-haiku").join(run);
        fs::create_dir_all(&dir).expect("the target directory can be written to");
        Self { dir, prefix: "" }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// From now on files belong to the second attempt.
    pub fn second_attempt(&mut self) {
        self.prefix = "second-";
    }

    pub fn text(&self, name: &str, text: &str) {
        let path = self.dir.join(format!("{}{name}", self.prefix));
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }

    /// Keeps the engine's log; a log that is gone is missed by whoever reads.
    pub fn keep_log(&self, log: &Path) {
        let _ = fs::copy(log, self.dir.join("engine.log"));
    }

    pub fn json(&self, name: &str, value: &impl Serialize) {
        let text = serde_json::to_string_pretty(value).expect("plain data is JSON");
        self.text(name, &text);
    }
}

/// One attempt, whole.
#[derive(Debug)]
pub struct Attempt {
    pub minute: Minute,
    /// What the clock showed when the stream started.
    pub minute_at_start: Minute,
    pub nonce: String,
    pub task: Value,
    pub admission: Value,
    pub events: Vec<Arrived>,
    /// From the submission to the end of the stream.
    pub took: Duration,
    /// The pool as it was, with the engine's digests.
    pub replica: Value,
    pub checks: Vec<Check>,
}

impl Attempt {
    pub fn failed(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|check| !check.passed)
    }

    /// Writes the parts of the bundle that are made from this alone.
    pub fn write(&self, bundle: &Bundle) {
        bundle.json(
            "admission.json",
            &json!({ "task": self.task, "answer": self.admission }),
        );
        bundle.text("transcript.sse", &render(&self.events));
        let verification = json!({
            "passed": self.failed().next().is_none(),
            "minute": self.minute.words(),
            "minute_at_stream_start": self.minute_at_start.words(),
            "nonce": self.nonce,
            "took_ms": self.took.as_millis() as u64,
            "answer": text(&self.events),
            "checks": self.checks,
        });
        bundle.json("verification.json", &verification);
        bundle.text("report.md", &self.report());
    }

    fn report(&self) -> String {
        let mut out = String::new();
        let verdict = if self.failed().next().is_none() {
            "holds"
        } else {
            "does NOT hold"
        };
        let quoted = text(&self.events).replace('\n', "\n> ");
        let first = self
            .events
            .iter()
            .find(|arrived| arrived.event.name == "token");
        let end = self
            .events
            .last()
            .map_or(&Value::Null, |arrived| &arrived.event.data);
        let (out_tokens, decode_ms) = (
            &end["tokens_out"],
            end["decode_time_ms"].as_f64().unwrap_or(0.0),
        );
        let pace = out_tokens.as_f64().unwrap_or(0.0) / (decode_ms / 1000.0).max(0.001);
        // Writing to a String cannot fail.
        let _ = write!(
            out,
            "# Haiku proof: it {verdict}\n\n\
             {time}, minute {minute} ({number}), nonce `{nonce}`.\n\n\
             > {quoted}\n\n\
             - engine {version}, {engine_digest}, provided by mode `{mode}`\n\
             - model {model_digest}\n\
             - first piece after {first:.0} ms, end after {took:.0} ms, {out_tokens} tokens at {pace:.0} tokens/s\n\n\
             | check | holds | seen |\n|---|---|---|\n",
            time = Timestamp::now().strftime("%Y-%m-%d %H:%M:%S UTC"),
            minute = self.minute.words(),
            number = self.minute.number(),
            nonce = self.nonce,
            version = plain(&self.replica["engine_version"]),
            engine_digest = plain(&self.replica["engine_digest"]),
            mode = plain(&self.replica["provisioning_mode"]),
            model_digest = plain(&self.replica["model_digest"]),
            first = first.map_or(f64::NAN, |first| first.after.as_secs_f64() * 1000.0),
            took = self.took.as_secs_f64() * 1000.0,
        );
        for check in &self.checks {
            let holds = if check.passed { "yes" } else { "**no**" };
            let seen = check.seen.replace('|', "\\|").replace('\n', " ");
            let _ = writeln!(out, "| {} | {holds} | {seen} |", check.name);
        }
        out
    }
}

/// A JSON string without its quotes.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}
