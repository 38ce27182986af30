//! What was measured, as tables for people, JSON for programs and a plot.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::Measured;
use crate::goals::{self, Goal};
use crate::machine::machine;
use crate::plot;
use crate::stats::Summary;

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub name: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
    /// The columns that the plot shows.
    pub plotted: Vec<usize>,
}

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub struct Cell {
    /// As it is shown.
    pub shown: String,
    /// As it was measured, with the spread where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub summary: Option<Summary>,
}

impl Cell {
    pub fn shown(shown: String, value: Option<f64>) -> Self {
        Self {
            shown,
            value,
            summary: None,
        }
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self::shown(text.into(), None)
    }

    /// A ratio's median, and in brackets the least and the most.
    pub fn spread(summary: Option<Summary>) -> Self {
        Self::summary(summary, 3)
    }

    /// Several figures that are read together.
    pub fn list(values: &[Option<f64>], decimals: usize) -> Self {
        let shown = values.iter().map(|value| {
            value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
        });
        Self::text(shown.collect::<Vec<_>>().join(" / "))
    }

    pub fn count(count: u64) -> Self {
        Self::shown(count.to_string(), Some(count as f64))
    }

    pub fn mebibytes(bytes: u64) -> Self {
        let mib = bytes as f64 / (1024.0 * 1024.0);
        if bytes == 0 {
            return Self::text("-");
        }
        Self::shown(format!("{mib:.1}"), Some(mib))
    }

    /// The median, and in brackets the least and the most where there are several.
    pub fn summary(summary: Option<Summary>, decimals: usize) -> Self {
        let Some(summary) = summary else {
            return Self::text("-");
        };
        let Summary {
            min, median, max, ..
        } = summary;
        let spread = match summary.count {
            0 | 1 => String::new(),
            _ => format!(" ({min:.decimals$}–{max:.decimals$})"),
        };
        Self {
            shown: format!("{median:.decimals$}{spread}"),
            value: Some(median),
            summary: Some(summary),
        }
    }

    /// A plain figure.
    pub fn figure(value: f64, decimals: usize) -> Self {
        Self::shown(format!("{value:.decimals$}"), Some(value))
    }
}

impl Table {
    /// With its name as a heading.
    pub fn shown(&self) -> String {
        format!("### {}\n\n{}", self.name, self.grid())
    }

    /// In the form of Markdown, whose columns line up on the terminal too.
    pub fn grid(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|column| {
                let cells = self
                    .rows
                    .iter()
                    .map(|row| row[column].shown.chars().count());
                cells
                    .chain([self.columns[column].chars().count()])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let line = |cells: Vec<&str>| {
            let padded = cells.iter().zip(&widths).map(|(cell, width)| {
                let fill = width - cell.chars().count();
                format!(" {cell}{} ", " ".repeat(fill))
            });
            format!("|{}|\n", padded.collect::<Vec<_>>().join("|"))
        };
        let mut out = line(self.columns.iter().map(String::as_str).collect());
        let rules: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
        out += &line(rules.iter().map(String::as_str).collect());
        for row in &self.rows {
            out += &line(row.iter().map(|cell| cell.shown.as_str()).collect());
        }
        out
    }
}

/// Everything of one run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// RFC 3339, in UTC.
    pub date: String,
    pub machine: String,
    /// The engine, the model and the peers.
    pub with: Vec<String>,
    pub rounds: usize,
    /// What was left out, and why.
    pub notes: Vec<String>,
    pub goals: Vec<Goal>,
    pub tables: Vec<Table>,
}

impl Report {
    /// An empty one of now and here.
    pub fn new(rounds: usize) -> Self {
        Self {
            date: format!("{:.0}", jiff::Timestamp::now()),
            machine: machine(),
            with: Vec::new(),
            rounds,
            notes: Vec::new(),
            goals: Vec::new(),
            tables: Vec::new(),
        }
    }

    pub fn add(&mut self, measured: Measured) {
        self.tables.extend(measured.tables);
        self.goals.extend(measured.goals);
        for with in measured.with {
            if !self.with.contains(&with) {
                self.with.push(with);
            }
        }
    }

    /// When, where and with what, and each figure with its target.
    pub fn summary(&self) -> String {
        let rounds = match self.rounds {
            1 => "1 round".to_owned(),
            rounds => format!("{rounds} rounds"),
        };
        let mut facts = vec![self.date.clone(), self.machine.clone()];
        facts.extend(self.with.clone());
        facts.push(rounds);
        let mut out = format!("{}\n\n", facts.join("; "));
        for note in &self.notes {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "- {note}");
        }
        if !self.notes.is_empty() {
            out.push('\n');
        }
        out + &goals::table(&self.goals).grid()
    }

    /// The whole report as Markdown.
    pub fn shown(&self) -> String {
        let mut out = self.summary();
        out.push('\n');
        for table in &self.tables {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "{}", table.shown());
        }
        out
    }

    /// Writes `bench.json`, `bench.md` and `bench.svg`.
    pub fn save(&self, dir: &Path) -> io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::write(dir.join("bench.json"), serde_json::to_string_pretty(self)?)?;
        fs::write(dir.join("bench.md"), self.shown())?;
        fs::write(dir.join("bench.svg"), plot::svg(&self.tables))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up() {
        let table = Table {
            name: "n".to_owned(),
            columns: vec!["side".to_owned(), "x".to_owned()],
            rows: vec![vec![Cell::text("a"), Cell::figure(1.25, 1)]],
            plotted: vec![1],
        };
        let shown = table.shown();
        assert!(shown.contains("| side | x   |"), "{shown}");
        assert!(shown.contains("| a    | 1.2 |"), "{shown}");
    }
}
