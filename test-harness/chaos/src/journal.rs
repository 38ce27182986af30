//! What happened, in order: the last lines stay at hand for a report, all of
//! them are in a file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// Lines that a report of a broken promise shows.
const AT_HAND: usize = 80;

#[derive(Debug)]
pub struct Journal {
    begun: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: File,
    last: VecDeque<String>,
}

impl Journal {
    pub fn create(path: &Path) -> std::io::Result<Self> {
        Ok(Self {
            begun: Instant::now(),
            inner: Mutex::new(Inner {
                file: File::create(path)?,
                last: VecDeque::new(),
            }),
        })
    }

    pub fn write(&self, line: impl AsRef<str>) {
        let line = format!(
            "{:9.3} {}",
            self.begun.elapsed().as_secs_f64(),
            line.as_ref()
        );
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        // A full disk costs the record on disk, not the run.
        let _ = writeln!(inner.file, "{line}");
        if inner.last.len() == AT_HAND {
            inner.last.pop_front();
        }
        inner.last.push_back(line);
    }

    pub fn last_lines(&self) -> Vec<String> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.last.iter().cloned().collect()
    }
}
