//! What a run found, as a table, as JSON, and as the story of what broke.

use std::fmt::Write;
use std::time::Duration;

use serde::Serialize;

use crate::guests::Tally;
use crate::ledger::{Broken, Totals};
use crate::sampler::Peaks;
use crate::world::World;

/// One fault's line.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub fault: &'static str,
    pub injected: u64,
    pub survived: u64,
    /// How often the daemon lacked what the fault needs.
    pub missing: u64,
    /// From the injection until the pool served again, on average.
    pub mean_ms: u64,
    pub longest_ms: u64,
    /// What the last injection showed.
    pub note: String,
    #[serde(skip)]
    pub(crate) last_was_injected: bool,
    #[serde(skip)]
    total: Duration,
    #[serde(skip)]
    noted: u32,
}

impl Row {
    pub fn new(fault: &'static str) -> Self {
        Self {
            fault,
            injected: 0,
            survived: 0,
            missing: 0,
            mean_ms: 0,
            longest_ms: 0,
            note: String::new(),
            last_was_injected: true,
            total: Duration::ZERO,
            noted: 0,
        }
    }

    pub(crate) fn missing(&mut self, what: &str) {
        self.injected -= 1;
        self.missing += 1;
        self.last_was_injected = false;
        self.note = format!("not there: {what}");
    }

    pub(crate) fn note(&mut self, note: &str, took: Duration, _settled: Duration) {
        self.last_was_injected = true;
        self.total += took;
        self.noted += 1;
        self.mean_ms = (self.total / self.noted).as_millis() as u64;
        self.longest_ms = self.longest_ms.max(took.as_millis() as u64);
        if !note.is_empty() {
            note.clone_into(&mut self.note);
        }
    }
}

/// Median and maximum, in milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Spread {
    pub count: usize,
    pub median_ms: u64,
    pub most_ms: u64,
}

impl Spread {
    pub fn of(mut values: Vec<u64>) -> Option<Self> {
        values.sort_unstable();
        Some(Self {
            count: values.len(),
            median_ms: *values.get(values.len() / 2)?,
            most_ms: *values.last()?,
        })
    }
}

#[derive(Debug, Clone, Serialize)]
pub struct BrokenPromise {
    pub invariant: &'static str,
    pub detail: String,
}

impl From<Broken> for BrokenPromise {
    fn from(broken: Broken) -> Self {
        Self {
            invariant: broken.invariant,
            detail: broken.detail,
        }
    }
}

/// All of it.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub engine: &'static str,
    pub seed: u64,
    pub command: String,
    pub seconds: u64,
    pub faults: Vec<Row>,
    pub totals: Totals,
    /// The calls through `/v1`, to pools that come and go.
    pub guests: Tally,
    /// From the cancel of a decoding task until its slot was seen free.
    pub cancel_to_free: Option<Spread>,
    /// The same while the engine was still reading the prompt.
    pub cancel_to_free_in_prompt: Option<Spread>,
    pub peaks: Peaks,
    pub broken: Vec<BrokenPromise>,
    /// The journal's lines up to the first broken promise.
    pub journal: Vec<String>,
    /// Where journal, logs and files are, if they were kept.
    pub directory: String,
}

impl Report {
    pub(crate) fn new(
        world: &World,
        faults: Vec<Row>,
        peaks: Peaks,
        broken: Vec<Broken>,
        took: Duration,
    ) -> Self {
        Self {
            engine: world.options.engine.as_str(),
            seed: world.options.seed,
            command: world.options.command_line(),
            seconds: took.as_secs(),
            faults,
            totals: world.ledger().totals().clone(),
            guests: world.guests(),
            cancel_to_free: Spread::of(world.freed().decoding),
            cancel_to_free_in_prompt: Spread::of(world.freed().in_prompt),
            peaks,
            broken: broken.into_iter().map(Into::into).collect(),
            journal: world.story(),
            directory: world.setup.dir.display().to_string(),
        }
    }

    pub fn is_clean(&self) -> bool {
        self.broken.is_empty()
    }

    /// The table and the totals, in Markdown.
    pub fn table(&self) -> String {
        let mut out = String::from(
            "| fault | injected | survived | mean s | longest s | note |\n|---|---:|---:|---:|---:|---|\n",
        );
        let seconds = |ms: u64| format!("{:.1}", ms as f64 / 1000.0);
        for row in &self.faults {
            // Writing to a String cannot fail.
            let _ = writeln!(
                out,
                "| {} | {} | {} | {} | {} | {} |",
                row.fault,
                row.injected,
                row.survived,
                seconds(row.mean_ms),
                seconds(row.longest_ms),
                row.note
            );
        }
        let injected: u64 = self.faults.iter().map(|row| row.injected).sum();
        let survived: u64 = self.faults.iter().map(|row| row.survived).sum();
        let _ = writeln!(out, "| **all** | **{injected}** | **{survived}** | | | |\n");
        let totals = &self.totals;
        let by_code = |codes: &std::collections::BTreeMap<String, u64>| {
            let parts: Vec<String> = codes
                .iter()
                .map(|(code, count)| format!("{code} {count}"))
                .collect();
            if parts.is_empty() {
                "none".to_owned()
            } else {
                parts.join(", ")
            }
        };
        let _ = writeln!(
            out,
            "engine {}, seed {}, {} s. Tasks: {} admitted, {} completed, {} cancelled, {} lost with a daemon, \
             {} continued on another engine; failed: {}; refused: {}. {} tokens, {} reconnects, {} replays, \
             at most {} queued.",
            self.engine,
            self.seed,
            self.seconds,
            totals.admitted,
            totals.completed,
            totals.cancelled,
            totals.lost_with_the_daemon,
            totals.resumed,
            by_code(&totals.failed),
            by_code(&totals.refused),
            totals.tokens,
            totals.reconnects,
            totals.replays,
            totals.most_queued
        );
        let spreads = [
            ("while decoding", &self.cancel_to_free),
            ("in the prompt", &self.cancel_to_free_in_prompt),
        ];
        for (when, spread) in spreads {
            if let Some(free) = spread {
                let _ = writeln!(
                    out,
                    "Cancel to free {when}: median {} ms, at most {} ms, over {} cancels.",
                    free.median_ms, free.most_ms, free.count
                );
            }
        }
        let guests = &self.guests;
        let _ = writeln!(
            out,
            "Calls to pools that come and go: {} completed, {} cancelled, {} left by their clients, {} failed, {} refused, {} lost with the daemon.",
            guests.completed,
            guests.cancelled,
            guests.left,
            guests.failed,
            guests.refused,
            guests.lost
        );
        let peaks = &self.peaks;
        let _ = writeln!(
            out,
            "The daemon held at most {} descriptors and {} MiB, and grew by at most {} MiB once warm.",
            peaks.descriptors,
            peaks.resident_kib / 1024,
            peaks.grown_kib / 1024
        );
        out
    }

    /// What was broken, with what led to it and how to see it again.
    pub fn story(&self) -> String {
        let mut out = String::new();
        for broken in &self.broken {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "BROKEN: {}\n  {}", broken.invariant, broken.detail);
        }
        if !self.broken.is_empty() {
            let _ = writeln!(out, "\nthe journal up to the first of them:");
            for line in &self.journal {
                let _ = writeln!(out, "  {line}");
            }
            let _ = writeln!(
                out,
                "\njournal, logs and files are kept in {}\nonce more with: {}",
                self.directory, self.command
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_names_the_middle_and_the_most() {
        let spread = Spread::of(vec![9, 1, 5]).unwrap();
        assert_eq!((spread.count, spread.median_ms, spread.most_ms), (3, 5, 9));
        assert!(Spread::of(Vec::new()).is_none());
    }

    #[test]
    fn a_missing_route_is_not_an_injection() {
        let mut row = Row::new("drain-resume");
        row.injected += 1;
        row.missing("POST /drain");
        assert_eq!((row.injected, row.missing), (0, 1));
        assert!(!row.last_was_injected);
    }
}
