//! Unpacking archives that nobody vouches for beyond their digest.
//!
//! Nothing is written outside the target directory, no link leads out of it, and an archive that
//! unpacks to absurd amounts is given up.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use provision_kit::fs::{FsError, free_space};

use crate::error::EngineError;
use crate::passing::is_full;

/// More than any engine's source or release holds.
const MAX_ENTRIES: u64 = 200_000;
const MAX_BYTES: u64 = 8 * 1024 * 1024 * 1024;

/// Unpacks a `.tar.gz`, `.tar` or `.zip`, told by its first bytes, into a directory that exists.
/// Blocking.
pub(crate) fn unpack(archive: &Path, target: &Path) -> Result<(), EngineError> {
    unpack_inner(archive, target).map_err(|source| {
        if is_full(&source) {
            return EngineError::NoSpace {
                path: target.to_owned(),
                needed: space_needed(archive).unwrap_or(0),
                free: free_space(target).unwrap_or(0),
            };
        }
        EngineError::Unpack {
            archive: archive.to_owned(),
            source,
        }
    })
}

/// What an archive may take when it is unpacked, in bytes. Programs are packed to a third or so.
pub(crate) fn space_needed(archive: &Path) -> Result<u64, FsError> {
    let facts = fs::metadata(archive).map_err(FsError::at("look at", archive))?;
    Ok(facts.len().saturating_mul(5))
}

fn unpack_inner(archive: &Path, target: &Path) -> io::Result<()> {
    let mut file = BufReader::new(File::open(archive)?);
    let mut magic = Vec::new();
    (&mut file).take(4).read_to_end(&mut magic)?;
    file.seek(SeekFrom::Start(0))?;
    match magic.as_slice() {
        [0x1f, 0x8b, ..] => unpack_tar(flate2::bufread::GzDecoder::new(file), target),
        [b'P', b'K', 3, 4] => unpack_zip(file, target),
        _ => unpack_tar(file, target),
    }
}

fn unpack_tar(reader: impl Read, target: &Path) -> io::Result<()> {
    let mut budget = Budget::default();
    let mut archive = tar::Archive::new(reader);
    archive.set_overwrite(false);
    for entry in archive.entries()? {
        let mut entry = entry?;
        budget.take(entry.size())?;
        let path = entry.path()?.into_owned();
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_hard_link()) {
            if kind.is_pax_global_extensions() {
                continue;
            }
            return Err(refused(&path, "is neither file, directory nor link"));
        }
        if kind.is_symlink() {
            let link = entry
                .link_name()?
                .ok_or_else(|| refused(&path, "links to nothing"))?;
            // A link's target is relative to the link's own directory.
            let from = path.parent().unwrap_or(Path::new(""));
            if link.is_absolute() || !stays_inside(&from.join(&*link)) {
                return Err(refused(&path, "links out of the archive"));
            }
        }
        // `unpack_in` checks the path again, against what is on disk, and hard links with it.
        if !stays_inside(&path) || !entry.unpack_in(target)? {
            return Err(refused(&path, "leads out of the archive"));
        }
    }
    check_links(target)
}

/// Follows every link. A link by way of another may lead out where its words alone do not say so.
fn check_links(target: &Path) -> io::Result<()> {
    let root = target.canonicalize()?;
    let mut waiting = vec![root.clone()];
    while let Some(directory) = waiting.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if kind.is_symlink() {
                // One that leads nowhere leads nowhere else either: nothing more is written.
                let leads_out = entry
                    .path()
                    .canonicalize()
                    .is_ok_and(|end| !end.starts_with(&root));
                if leads_out {
                    fs::remove_file(entry.path())?;
                    return Err(refused(&entry.path(), "links out of the archive"));
                }
            }
        }
    }
    Ok(())
}

fn unpack_zip(file: BufReader<File>, target: &Path) -> io::Result<()> {
    let mut budget = Budget::default();
    let mut archive = zip::ZipArchive::new(file).map_err(io::Error::other)?;
    for index in 0..archive.len() {
        let entry = archive.by_index(index).map_err(io::Error::other)?;
        let name = PathBuf::from(entry.name().map_err(io::Error::other)?.into_owned());
        let Some(path) = entry.enclosed_name() else {
            return Err(refused(&name, "leads out of the archive"));
        };
        if entry.is_symlink() {
            return Err(refused(
                &path,
                "is a link, which is not known in zip archives here",
            ));
        }
        let path = target.join(path);
        if entry.is_dir() {
            fs::create_dir_all(&path)?;
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        let mode = entry.unix_mode();
        let mut file = File::create_new(&path)?;
        // The size in the directory may lie, so what comes out is counted.
        let written = io::copy(&mut entry.take(budget.bytes_left() + 1), &mut file)?;
        budget.take(written)?;
        if let Some(mode) = mode {
            file.set_permissions(fs::Permissions::from_mode(mode & 0o777))?;
        }
    }
    Ok(())
}

/// Whether a relative path, followed step by step, never leaves where it starts.
fn stays_inside(path: &Path) -> bool {
    let mut depth = 0i64;
    for component in path.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir => depth -= 1,
            Component::RootDir | Component::Prefix(_) => return false,
        }
        if depth < 0 {
            return false;
        }
    }
    true
}

fn refused(path: &Path, why: &str) -> io::Error {
    let text = format!("its entry `{}` {why}", path.display());
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// What an archive may still unpack to.
struct Budget {
    entries: u64,
    bytes: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            entries: MAX_ENTRIES,
            bytes: MAX_BYTES,
        }
    }
}

impl Budget {
    fn bytes_left(&self) -> u64 {
        self.bytes
    }

    fn take(&mut self, size: u64) -> io::Result<()> {
        match (self.entries.checked_sub(1), self.bytes.checked_sub(size)) {
            (Some(entries), Some(bytes)) => {
                *self = Self { entries, bytes };
                Ok(())
            }
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "it holds far more than any engine",
            )),
        }
    }
}

/// The shallowest directory under `root`, at most three levels down, that holds a file of this
/// name. Archives wrap what they hold in a directory or two.
pub(crate) fn directory_holding(root: &Path, name: &str) -> io::Result<Option<PathBuf>> {
    let mut level = vec![root.to_owned()];
    for _ in 0..4 {
        if let Some(found) = level
            .iter()
            .find(|directory| directory.join(name).is_file())
        {
            return Ok(Some(found.clone()));
        }
        let mut next = Vec::new();
        for directory in level {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    next.push(entry.path());
                }
            }
        }
        next.sort();
        level = next;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    /// Makes a tar whose names are written as they are, which the library's own writer refuses.
    fn tar_with(name: &str, kind: tar::EntryType, link: &str) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(0);
        header.set_cksum();
        let mut builder = tar::Builder::new(Vec::new());
        builder.append(&header, io::empty()).unwrap();
        builder.into_inner().unwrap()
    }

    fn unpack_bytes(bytes: &[u8]) -> (tempfile::TempDir, Result<(), EngineError>) {
        let directory = tempfile::tempdir().unwrap();
        let archive = directory.path().join("archive");
        fs::write(&archive, bytes).unwrap();
        let target = directory.path().join("target");
        fs::create_dir(&target).unwrap();
        let result = unpack(&archive, &target);
        (directory, result)
    }

    #[test]
    fn nothing_leaves_the_target() {
        use tar::EntryType::{Fifo, Link, Regular, Symlink};
        for (name, kind, link) in [
            ("../evil", Regular, ""),
            ("a/../../evil", Regular, ""),
            ("/evil", Regular, ""),
            ("link", Symlink, "/etc"),
            ("a/link", Symlink, "../../evil"),
            ("hard", Link, "../../etc/passwd"),
            ("pipe", Fifo, ""),
        ] {
            let (directory, result) = unpack_bytes(&tar_with(name, kind, link));
            assert!(
                matches!(result, Err(EngineError::Unpack { .. })),
                "{name} -> {link}"
            );
            let left: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
            assert_eq!(
                left.len(),
                2,
                "{name}: only the archive and the target are there"
            );
            assert_eq!(
                fs::read_dir(directory.path().join("target"))
                    .unwrap()
                    .count(),
                0,
                "{name}"
            );
        }
        let (_directory, result) = unpack_bytes(&tar_with("b/link", Symlink, "../a"));
        result.unwrap();
    }

    #[test]
    fn a_link_by_way_of_another_does_not_lead_out() {
        let entry = |name: &str, kind, link: &str| {
            let one = tar_with(name, kind, link);
            one[..512].to_vec()
        };
        let mut bytes = entry("d/", tar::EntryType::Directory, "");
        bytes.extend(entry("d/up", tar::EntryType::Symlink, ".."));
        bytes.extend(entry("out", tar::EntryType::Symlink, "d/up/.."));
        bytes.extend(entry("out/evil", tar::EntryType::Regular, ""));
        bytes.extend([0; 1024]);
        let (directory, result) = unpack_bytes(&bytes);
        assert!(result.is_err());
        assert!(!directory.path().join("evil").exists());
        // Without anything written through it the link alone is refused, and gone.
        bytes.truncate(3 * 512);
        bytes.extend([0; 1024]);
        let (directory, result) = unpack_bytes(&bytes);
        assert!(result.is_err());
        assert!(!directory.path().join("target/out").is_symlink());
    }

    proptest! {
        /// Whatever an archive's names and links say, nothing is written outside, and no link of
        /// one that is accepted leads out.
        #[test]
        fn no_archive_writes_outside(
            entries in prop::collection::vec(
                ("([ab]|\\.\\.|\\.){1,1}(/([ab]|\\.\\.)){0,3}", 0u8..4, "/?([ab]|\\.\\.)(/([ab]|\\.\\.)){0,3}"),
                1..8,
            ),
        ) {
            let mut bytes = Vec::new();
            for (name, kind, link) in &entries {
                let kind = match kind {
                    0 => tar::EntryType::Regular,
                    1 => tar::EntryType::Directory,
                    2 => tar::EntryType::Symlink,
                    _ => tar::EntryType::Link,
                };
                bytes.extend(&tar_with(name, kind, link)[..512]);
            }
            bytes.extend([0; 1024]);
            let (directory, result) = unpack_bytes(&bytes);
            prop_assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 2);
            if result.is_ok() {
                check_links(&directory.path().join("target")).unwrap();
            }
        }
    }

    #[test]
    fn a_zip_is_unpacked_with_its_modes_and_may_not_escape() {
        let zip_with = |name: &str| {
            let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
            let options = zip::write::SimpleFileOptions::default().unix_permissions(0o755);
            writer.start_file(name, options).unwrap();
            writer.write_all(b"x").unwrap();
            writer.finish().unwrap().into_inner()
        };
        let (directory, result) = unpack_bytes(&zip_with("build/bin/llama-server"));
        result.unwrap();
        let file = directory.path().join("target/build/bin/llama-server");
        assert!(crate::machine::is_executable(&file));
        let (_directory, result) = unpack_bytes(&zip_with("../evil"));
        assert!(result.is_err());
    }

    #[test]
    fn garbage_is_an_error() {
        let (_directory, result) = unpack_bytes(
            b"this is no archive, but it is long enough to be read as something that could be one",
        );
        assert!(result.is_err());
        let (_directory, result) = unpack_bytes(&[0x1f, 0x8b, 8, 0, 1]);
        assert!(result.is_err());
    }

    #[test]
    fn a_budget_is_kept() {
        let mut budget = Budget {
            entries: 2,
            bytes: 10,
        };
        budget.take(10).unwrap();
        assert!(budget.take(1).is_err());
        budget.take(0).unwrap();
        assert!(budget.take(0).is_err());
    }

    #[test]
    fn the_wrapped_tree_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("package-1/llama.cpp");
        fs::create_dir_all(inner.join("ggml")).unwrap();
        fs::write(inner.join("CMakeLists.txt"), "").unwrap();
        fs::write(inner.join("ggml/CMakeLists.txt"), "").unwrap();
        let found = directory_holding(directory.path(), "CMakeLists.txt").unwrap();
        assert_eq!(found, Some(inner));
        assert_eq!(directory_holding(directory.path(), "other").unwrap(), None);
    }
}
