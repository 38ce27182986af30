//! What was measured, as tables for people, JSON for programs and a plot.

use std::fmt::Write;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::plot;
use crate::stats::Summary;

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    pub name: String,
    pub columns: Vec<String>,
    pub rows: Vec<Vec<Cell>>,
    /// The column that the plot shows.
    pub plotted: usize,
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
    fn shown(shown: String, value: Option<f64>) -> Self {
        Self {
            shown,
            value,
            summary: None,
        }
    }

    pub fn text(text: impl Into<String>) -> Self {
        Self::shown(text.into(), None)
    }

    pub fn ratio(ratio: Option<f64>) -> Self {
        Self::shown(
            ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
            ratio,
        )
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

    /// The median, and in brackets the least and the most.
    pub fn summary(summary: Option<Summary>, decimals: usize) -> Self {
        let Some(summary) = summary else {
            return Self::text("-");
        };
        let Summary {
            min, median, max, ..
        } = summary;
        Self {
            shown: format!("{median:.decimals$} ({min:.decimals$}–{max:.decimals$})"),
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
    /// In the form of Markdown, whose columns line up on the terminal too.
    pub fn shown(&self) -> String {
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
        let mut out = format!("### {}\n\n", self.name);
        out += &line(self.columns.iter().map(String::as_str).collect());
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
    /// What was left out, and why.
    pub notes: Vec<String>,
    pub tables: Vec<Table>,
}

impl Default for Report {
    /// An empty one of now and here.
    fn default() -> Self {
        Self {
            date: format!("{:.0}", jiff::Timestamp::now()),
            machine: machine(),
            notes: Vec::new(),
            tables: Vec::new(),
        }
    }
}

impl Report {
    /// The whole report as Markdown.
    pub fn shown(&self) -> String {
        let mut out = format!("{}, {}\n\n", self.date, self.machine);
        for note in &self.notes {
            // Writing to a String cannot fail.
            let _ = writeln!(out, "- {note}");
        }
        for table in &self.tables {
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

fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let model = model
        .and_then(|line| line.split_once(':'))
        .map_or("unknown CPU", |(_, name)| name.trim());
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{cores} cores of {model}")
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
            plotted: 1,
        };
        let shown = table.shown();
        assert!(shown.contains("| side | x   |"), "{shown}");
        assert!(shown.contains("| a    | 1.2 |"), "{shown}");
    }
}
