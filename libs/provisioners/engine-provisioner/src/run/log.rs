//! An engine's log: a bounded file, and the last lines in memory.
//!
//! One task reads both of the engine's streams until they end and owns the file.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use provision_kit::fs::{FsError, create_dir_all};
use tokio::fs::{self, File};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// How many lines are kept in memory.
const RING_LINES: usize = 50;
/// The longest line that is kept whole, in bytes; a longer one is cut into several.
const MAX_LINE: usize = 8 * 1024;
/// The size, in bytes, at which a new file is begun.
const MAX_FILE: u64 = 10 * 1024 * 1024;
/// How many files there are, the current one included.
const FILES: u32 = 3;
/// How long the end of the streams is waited for once the engine is gone.
const DRAIN: Duration = Duration::from_secs(1);

/// The last lines, shared between the pump and whoever asks.
#[derive(Debug, Clone, Default)]
struct Ring {
    lines: Arc<Mutex<VecDeque<String>>>,
    /// How many there ever were.
    count: Arc<AtomicU64>,
    /// Told when there are new lines.
    said: Arc<Notify>,
}

impl Ring {
    fn push(&self, line: String) {
        self.count.fetch_add(1, Ordering::Relaxed);
        // A panic while the lock is held leaves a list of lines, which is what this is.
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == RING_LINES {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    fn lines(&self) -> Vec<String> {
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().cloned().collect()
    }
}

/// The last lines of an engine's log, whether it still runs or not.
#[derive(Debug, Clone)]
pub struct LogLines(Ring);

impl LogLines {
    /// At most 50.
    pub fn lines(&self) -> Vec<String> {
        self.0.lines()
    }
}

/// Where a log's file is; `None` once another engine has taken the name: then what is left of the
/// file's size is written, and no new file is begun.
type SharedPath = Arc<Mutex<Option<PathBuf>>>;

/// A running pump. Dropping it ends the task.
#[derive(Debug)]
pub(super) struct LogPump {
    ring: Ring,
    path: SharedPath,
    task: JoinHandle<()>,
}

impl LogPump {
    /// Begins to copy the streams to the log.
    pub(super) async fn start<Out, Err>(
        path: &Path,
        stdout: Option<Out>,
        stderr: Option<Err>,
    ) -> Result<Self, FsError>
    where
        Out: AsyncRead + Unpin + Send + 'static,
        Err: AsyncRead + Unpin + Send + 'static,
    {
        let file = LogFile::open(path, MAX_FILE).await?;
        let ring = Ring::default();
        let path = Arc::clone(&file.path);
        let task = tokio::spawn(pump(file, ring.clone(), stdout, stderr));
        Ok(Self { ring, path, task })
    }

    pub(super) fn lines(&self) -> LogLines {
        LogLines(self.ring.clone())
    }

    /// Makes room for another engine's log of the same name: what is written so far becomes the
    /// newest of the older files, and little is added.
    pub(super) fn retire(&self) -> Result<(), FsError> {
        let Some(path) = lock(&self.path).take() else {
            return Ok(());
        };
        shift(&path)
    }

    /// Gives the log another name.
    pub(super) fn rename(&self, to: &Path) -> Result<(), FsError> {
        let mut path = lock(&self.path);
        if let Some(from) = path.replace(to.to_owned()) {
            move_if_there(&from, to)?;
        }
        Ok(())
    }

    pub(super) fn tail(&self) -> Vec<String> {
        self.ring.lines()
    }

    /// Waits until the engine says something; at once if it has since the last call.
    pub(super) async fn said(&self) {
        self.ring.said.notified().await;
    }

    /// How many lines the engine has written so far.
    pub(super) fn lines_read(&self) -> u64 {
        self.ring.count.load(Ordering::Relaxed)
    }

    /// Waits, for a moment, until what the ended engine said has been read.
    pub(super) async fn drain(&mut self) {
        if !self.task.is_finished() {
            // A process that has left the group may hold the streams open for ever.
            let _ = tokio::time::timeout(DRAIN, &mut self.task).await;
        }
    }
}

impl Drop for LogPump {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pump(
    mut file: LogFile,
    ring: Ring,
    stdout: Option<impl AsyncRead + Unpin>,
    stderr: Option<impl AsyncRead + Unpin>,
) {
    let mut streams = (Stream::new(stdout), Stream::new(stderr));
    let mut writable = true;
    loop {
        let lines = tokio::select! {
            lines = streams.0.read(), if !streams.0.ended => lines,
            lines = streams.1.read(), if !streams.1.ended => lines,
            else => break,
        };
        if !lines.is_empty() {
            // Before the disk is waited for.
            ring.said.notify_one();
        }
        for line in lines {
            // The engine must never be held up by its log: with a full disk the lines go on into
            // memory only.
            if writable && let Err(error) = file.write_line(&line).await {
                tracing::warn!(%error, "the engine's log is not written any more");
                writable = false;
            }
            ring.push(line);
        }
    }
    if let Err(error) = file.file.flush().await {
        tracing::warn!(%error, "the end of the engine's log is lost");
    }
}

/// One stream, cut into lines.
struct Stream<R> {
    reader: Option<R>,
    splitter: LineSplitter,
    buffer: Vec<u8>,
    ended: bool,
}

impl<R: AsyncRead + Unpin> Stream<R> {
    fn new(reader: Option<R>) -> Self {
        Self {
            ended: reader.is_none(),
            reader,
            splitter: LineSplitter::default(),
            buffer: vec![0; MAX_LINE],
        }
    }

    /// The next complete lines. Nothing is lost if it is cancelled.
    async fn read(&mut self) -> Vec<String> {
        let read = match &mut self.reader {
            Some(reader) => reader.read(&mut self.buffer).await.unwrap_or(0),
            None => 0,
        };
        if read == 0 {
            self.ended = true;
            return self.splitter.rest().into_iter().collect();
        }
        self.splitter.add(&self.buffer[..read])
    }
}

/// Cuts bytes into lines, whatever pieces they come in.
#[derive(Debug, Default)]
struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    fn add(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.partial.push(byte);
            }
            if byte == b'\n' || self.partial.len() == MAX_LINE {
                lines.push(self.cut());
            }
        }
        lines
    }

    fn rest(&mut self) -> Option<String> {
        (!self.partial.is_empty()).then(|| self.cut())
    }

    fn cut(&mut self) -> String {
        let line = String::from_utf8_lossy(&self.partial)
            .trim_end_matches('\r')
            .to_owned();
        self.partial.clear();
        line
    }
}

fn lock(path: &SharedPath) -> MutexGuard<'_, Option<PathBuf>> {
    // A panic while the lock is held leaves a path, which is what this is.
    path.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes the current file the newest of the older ones.
fn shift(path: &Path) -> Result<(), FsError> {
    for number in (1..FILES).rev() {
        let from = match number {
            1 => path.to_owned(),
            _ => numbered(path, number - 1),
        };
        move_if_there(&from, &numbered(path, number))?;
    }
    Ok(())
}

fn move_if_there(from: &Path, to: &Path) -> Result<(), FsError> {
    match std::fs::rename(from, to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FsError::at("rename", from)(error))
        }
        _ => Ok(()),
    }
}

fn numbered(path: &Path, number: u32) -> PathBuf {
    let mut name = path.to_owned().into_os_string();
    name.push(format!(".{number}"));
    name.into()
}

/// `<pool>.log`, `<pool>.log.1`, `<pool>.log.2`: the newest lines are in the first.
struct LogFile {
    path: SharedPath,
    /// The name under which the file was opened.
    opened: PathBuf,
    file: File,
    size: u64,
    limit: u64,
}

impl LogFile {
    async fn open(path: &Path, limit: u64) -> Result<Self, FsError> {
        if let Some(directory) = path.parent() {
            create_dir_all(directory)?;
        }
        let file = open_append(path).await?;
        let size = file
            .metadata()
            .await
            .map_err(FsError::at("look at", path))?
            .len();
        let mut log = Self {
            path: Arc::new(Mutex::new(Some(path.to_owned()))),
            opened: path.to_owned(),
            file,
            size,
            limit,
        };
        // An earlier engine's lines stay: they may say why it ended.
        log.write_line(&format!("=== started {}", jiff::Timestamp::now()))
            .await?;
        Ok(log)
    }

    async fn write_line(&mut self, line: &str) -> Result<(), FsError> {
        let text = format!("{line}\n");
        if self.size > 0 && self.size + text.len() as u64 > self.limit {
            // An engine that retires says little more, and that is in memory.
            if !self.rotate().await? {
                return Ok(());
            }
        }
        self.size += text.len() as u64;
        let written = self.file.write_all(text.as_bytes()).await;
        written.map_err(FsError::at("write", &self.opened))
    }

    /// Begins a new file; without a name there is none, and the line goes nowhere.
    async fn rotate(&mut self) -> Result<bool, FsError> {
        let flushed = self.file.flush().await;
        flushed.map_err(FsError::at("write", &self.opened))?;
        let Some(path) = lock(&self.path).clone() else {
            return Ok(false);
        };
        // A handful of renames in one directory.
        shift(&path)?;
        self.file = open_append(&path).await?;
        self.opened = path;
        self.size = 0;
        Ok(true)
    }
}

async fn open_append(path: &Path) -> Result<File, FsError> {
    let mut options = fs::OpenOptions::new();
    options.create(true).append(true);
    options.open(path).await.map_err(FsError::at("open", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_do_not_depend_on_the_pieces(text in "[a-zé\n]{0,200}", piece in 1usize..20) {
            let mut splitter = LineSplitter::default();
            let mut lines = Vec::new();
            for bytes in text.as_bytes().chunks(piece) {
                lines.extend(splitter.add(bytes));
            }
            lines.extend(splitter.rest());
            let expected: Vec<&str> = text.lines().collect();
            prop_assert_eq!(lines, expected);
        }
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut splitter = LineSplitter::default();
        let lines = splitter.add(&vec![b'x'; 3 * MAX_LINE + 1]);
        assert_eq!(lines.len(), 3);
        assert_eq!(splitter.rest().as_deref(), Some("x"));
    }

    #[tokio::test]
    async fn the_file_is_rotated_and_never_grows_without_bound() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/pool.log");
        let mut log = LogFile::open(&path, 1000).await.unwrap();
        for number in 0..200 {
            log.write_line(&format!("line {number:04} of a long story"))
                .await
                .unwrap();
        }
        log.file.flush().await.unwrap();
        let files: Vec<_> = std::fs::read_dir(path.parent().unwrap())
            .unwrap()
            .flatten()
            .collect();
        assert_eq!(files.len(), 3);
        for file in files {
            assert!(file.metadata().unwrap().len() <= 1000);
        }
        let newest = std::fs::read_to_string(&path).unwrap();
        assert!(newest.ends_with("line 0199 of a long story\n"), "{newest}");
    }

    #[tokio::test]
    async fn both_streams_reach_file_and_ring() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pool.log");
        let (out, err): (&[u8], &[u8]) = (b"one\ntwo", b"three\n");
        let mut pump = LogPump::start(&path, Some(out), Some(err)).await.unwrap();
        pump.drain().await;
        let mut tail = pump.tail();
        tail.sort();
        assert_eq!(tail, ["one", "three", "two"]);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            text.starts_with("=== started ") && text.contains("two\n"),
            "{text}"
        );
    }
}
