//! Files, written whole or not at all, with errors that name the path.
//!
//! Everything here blocks: call it through `spawn_blocking` where the file
//! may be large or the disk slow.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::{Digest, Hinted};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use crate::lock::FileLock;

/// A record file keeps this many of its newest lines.
const MAX_RECORDS: usize = 10_000;

/// How long a writer of records waits for another one.
const RECORD_LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// A file operation failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {}", path.display())]
pub struct FsError {
    /// What was tried, as a verb: "write", "create the directory".
    pub operation: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

impl FsError {
    /// For `map_err`: names the operation and the path.
    pub fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            operation,
            path: path.to_owned(),
            source,
        }
    }

    /// The disk or the user's share of it is full, or it takes no file of this
    /// size.
    pub fn is_no_space(&self) -> bool {
        is_no_space(&self.source)
    }

    /// Whether the same operation may succeed a little later: when somebody
    /// has freed space, memory or open files.
    pub fn retriable(&self) -> bool {
        is_shortage(&self.source)
    }
}

/// Space, memory or open files are used up, for now.
pub(crate) fn is_shortage(error: &io::Error) -> bool {
    is_no_space(error)
        || error.kind() == io::ErrorKind::OutOfMemory
        || matches!(
            error.raw_os_error().map(nix::errno::Errno::from_raw),
            Some(nix::errno::Errno::EMFILE | nix::errno::Errno::ENFILE)
        )
}

fn is_no_space(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}

impl Hinted for FsError {
    fn hint(&self) -> Option<String> {
        let parent = self.path.parent().unwrap_or(&self.path).display();
        Some(match self.source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                format!(
                    "free some space on the disk that holds {parent}, or set `cache_dir` to a larger one"
                )
            }
            io::ErrorKind::FileTooLarge => {
                format!(
                    "the file system of {parent}, or a limit of this process (`ulimit -f`), takes no larger files: raise it, or set `cache_dir` to another disk"
                )
            }
            io::ErrorKind::ReadOnlyFilesystem => {
                format!(
                    "{parent} is on a read-only file system: set `cache_dir` and `runtime_dir` to a writable place"
                )
            }
            io::ErrorKind::PermissionDenied => {
                format!(
                    "give this user access to {parent}, or set `cache_dir` and `runtime_dir` to a place of its own"
                )
            }
            io::ErrorKind::NotFound => format!("check that {} exists", self.path.display()),
            _ => return None,
        })
    }
}

/// Makes a directory and those above it; one that is there is fine.
pub fn create_dir_all(path: &Path) -> Result<(), FsError> {
    fs::create_dir_all(path).map_err(FsError::at("create the directory", path))
}

/// Writes a file whole: readers see the old content or the new, and after a
/// crash too. The directory is made if it is missing.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), FsError> {
    let staged = stage(path, bytes)?;
    let flushed = staged.as_file().sync_all();
    flushed.map_err(FsError::at("write", path))?;
    name_staged(staged, path)?;
    sync_dir(parent_of(path))
}

/// The same, but for a file that speaks of processes: readers see the old
/// content or the new, whenever we are killed, but the disk is not waited for.
/// After a failure of power, which ends the processes too, the file may be
/// empty or not there.
pub fn write_unflushed(path: &Path, bytes: &[u8]) -> Result<(), FsError> {
    name_staged(stage(path, bytes)?, path)
}

/// The bytes in a file beside `path`, which is removed unless it gets that name.
fn stage(path: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile, FsError> {
    let directory = parent_of(path);
    create_dir_all(directory)?;
    let failed = |source| FsError {
        operation: "write",
        path: path.to_owned(),
        source,
    };
    let mut staged = tempfile::Builder::new()
        .prefix(".staged-")
        .tempfile_in(directory)
        .map_err(failed)?;
    staged.write_all(bytes).map_err(failed)?;
    make_readable(staged.as_file()).map_err(failed)?;
    Ok(staged)
}

fn name_staged(staged: tempfile::NamedTempFile, path: &Path) -> Result<(), FsError> {
    match staged.persist(path) {
        Ok(_) => Ok(()),
        Err(error) => Err(FsError::at("write", path)(error.error)),
    }
}

/// Gives a complete file or directory its final name, on the same file system,
/// so that it survives a crash. An older file of that name is replaced; an
/// older directory is only if it is empty.
///
/// For a directory the whole file system is flushed: flushing the directory
/// flushes none of the files in it, and flushing each by itself takes longer.
pub fn rename_durably(from: &Path, to: &Path) -> Result<(), FsError> {
    let directory = parent_of(to);
    create_dir_all(directory)?;
    if from.is_dir() {
        sync_tree(from)?;
    } else {
        File::open(from)
            .and_then(|file| file.sync_all())
            .map_err(FsError::at("flush", from))?;
    }
    fs::rename(from, to).map_err(FsError::at("rename to", to))?;
    sync_dir(directory)
}

/// Removes a file; one that is not there is fine.
pub fn remove_file_if_there(path: &Path) -> Result<(), FsError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(FsError::at("remove", path)(error))
        }
        _ => Ok(()),
    }
}

/// Adds one line to a file of JSON records. The file is rewritten whole, under
/// a lock beside it, and keeps the newest 10,000 lines: a half-written line
/// can never stay.
pub fn append_jsonl(path: &Path, record: &impl Serialize) -> Result<(), FsError> {
    let directory = parent_of(path);
    create_dir_all(directory)?;
    let line = serde_json::to_string(record)
        .map_err(|error| FsError::at("write a record to", path)(io::Error::from(error)))?;
    let mut lock_name = path.file_name().unwrap_or_default().to_owned();
    lock_name.push(".lock");
    let _lock = FileLock::acquire_blocking(&directory.join(lock_name), RECORD_LOCK_TIMEOUT)
        .map_err(|error| FsError::at("lock", path)(io::Error::other(error)))?;
    let before = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other.map_err(FsError::at("read", path))?,
    };
    write_atomic(path, with_record(&before, &line, MAX_RECORDS).as_bytes())
}

/// The records and one more, without the oldest beyond `keep`.
fn with_record(before: &str, line: &str, keep: usize) -> String {
    let mut lines: Vec<&str> = before
        .lines()
        .filter(|line| !line.trim().is_empty())
        .collect();
    lines.push(line);
    let surplus = lines.len().saturating_sub(keep);
    let mut text = lines[surplus..].join("\n");
    text.push('\n');
    text
}

/// Bytes that this user may still write to the file system that holds `path`,
/// which need not exist yet.
pub fn free_space(path: &Path) -> Result<u64, FsError> {
    let existing = nearest_existing(path);
    let stat = nix::sys::statvfs::statvfs(existing)
        .map_err(|errno| FsError::at("ask for the free space of", existing)(errno.into()))?;
    // The types of these fields differ between platforms.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    Ok((stat.blocks_available() as u64).saturating_mul(stat.fragment_size() as u64))
}

/// The path or the nearest directory above it that is there.
fn nearest_existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|ancestor| ancestor.exists())
        // A relative path of which no part exists lies in the working directory.
        .unwrap_or(Path::new("."))
}

/// A file's digest and size in bytes. Reads the whole file.
pub fn sha256_file(path: &Path) -> Result<(Digest, u64), FsError> {
    let mut file = File::open(path).map_err(FsError::at("open", path))?;
    let mut hasher = Sha256::new();
    let size = hash_into(&mut file, &mut hasher).map_err(FsError::at("read", path))?;
    Ok((finish(hasher), size))
}

/// The same, telling `watch` after each piece how many bytes were read so far.
/// `None` if it wants no more.
pub fn sha256_file_watched(
    path: &Path,
    mut watch: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<(Digest, u64)>, FsError> {
    const PIECE: u64 = 4 * 1024 * 1024;
    let mut file = File::open(path).map_err(FsError::at("open", path))?;
    let mut hasher = Sha256::new();
    let mut size = 0;
    loop {
        let piece = hash_into(&mut (&mut file).take(PIECE), &mut hasher);
        let piece = piece.map_err(FsError::at("read", path))?;
        size += piece;
        if watch(size).is_break() {
            return Ok(None);
        }
        if piece < PIECE {
            return Ok(Some((finish(hasher), size)));
        }
    }
}

/// Feeds everything that is left in `reader` to the hasher.
pub(crate) fn hash_into(reader: &mut impl Read, hasher: &mut Sha256) -> io::Result<u64> {
    let mut buffer = vec![0; 256 * 1024];
    let mut size = 0;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return Ok(size),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                size += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

pub(crate) fn finish(hasher: Sha256) -> Digest {
    Digest::from_bytes(hasher.finalize().into())
}

/// sha256 of bytes at hand.
pub fn sha256_bytes(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// A rename is on disk only once its directory is.
fn sync_dir(directory: &Path) -> Result<(), FsError> {
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(FsError::at("flush the directory", directory))
}

/// Puts a directory and everything below it on disk.
#[cfg(target_os = "linux")]
fn sync_tree(directory: &Path) -> Result<(), FsError> {
    File::open(directory)
        .and_then(|opened| Ok(nix::unistd::syncfs(opened)?))
        .map_err(FsError::at("flush", directory))
}

/// Puts a directory and everything below it on disk.
#[cfg(not(target_os = "linux"))]
fn sync_tree(directory: &Path) -> Result<(), FsError> {
    for entry in fs::read_dir(directory).map_err(FsError::at("list", directory))? {
        let entry = entry.map_err(FsError::at("list", directory))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(FsError::at("look at", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(FsError::at("flush", &path))?;
        }
    }
    sync_dir(directory)
}

/// Temporary files are private; what they become is for everybody to read.
#[cfg(unix)]
fn make_readable(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn make_readable(_: &File) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_else_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.json");
        write_unflushed(&path, b"none").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"none");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn an_error_names_the_path_and_the_way_out() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = write_atomic(&dir.path().join("file/below"), b"").unwrap_err();
        assert!(error.to_string().contains("file"), "{error}");
        let full = FsError::at("write", Path::new("/cache/x"))(io::ErrorKind::StorageFull.into());
        assert!(full.is_no_space());
        assert!(full.hint().unwrap().contains("cache_dir"));
        assert!(full.retriable() && !error.retriable());
        let many = io::Error::from(nix::errno::Errno::EMFILE);
        assert!(FsError::at("open", Path::new("x"))(many).retriable());
    }

    #[test]
    fn a_directory_gets_its_name_with_all_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (
            dir.path().join("source.partial"),
            dir.path().join("a/source"),
        );
        fs::create_dir_all(from.join("below")).unwrap();
        fs::write(from.join("below/x"), "abc").unwrap();
        rename_durably(&from, &to).unwrap();
        assert_eq!(fs::read(to.join("below/x")).unwrap(), b"abc");
        assert!(!from.exists());
        // What is there already is not replaced.
        fs::create_dir(&from).unwrap();
        let error = rename_durably(&from, &to).unwrap_err();
        assert!(error.to_string().contains("source"), "{error}");
        assert!(to.join("below/x").exists());
        assert!(rename_durably(&dir.path().join("none"), &to).is_err());
    }

    #[test]
    fn records_of_many_threads_are_all_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("provenance/models.jsonl");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let path = &path;
                scope.spawn(move || {
                    for index in 0..5 {
                        append_jsonl(path, &(thread, index)).unwrap();
                    }
                });
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        let mut records: Vec<(u32, u32)> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        records.sort_unstable();
        records.dedup();
        assert_eq!(records.len(), 20);
    }

    #[test]
    fn free_space_of_a_path_to_be() {
        let dir = tempfile::tempdir().unwrap();
        let here = free_space(dir.path()).unwrap();
        let below = free_space(&dir.path().join("a/b/c")).unwrap();
        assert!(here > 0 && below > 0);
        assert!(free_space(Path::new("no-such-thing/below")).unwrap() > 0);
    }

    #[test]
    fn digest_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "abc").unwrap();
        let (digest, size) = sha256_file(&path).unwrap();
        assert_eq!(size, 3);
        assert_eq!(
            digest.hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(sha256_bytes(b"abc"), digest);
    }

    proptest! {
        #[test]
        fn the_newest_records_stay(lines in prop::collection::vec("[a-z]{1,4}", 0..20), keep in 1usize..8) {
            let mut text = String::new();
            for line in &lines {
                text = with_record(&text, line, keep);
            }
            let kept: Vec<_> = text.lines().collect();
            let expected = &lines[lines.len().saturating_sub(keep)..];
            prop_assert_eq!(kept, expected);
        }
    }
}
