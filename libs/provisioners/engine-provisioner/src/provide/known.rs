//! What an engine of the machine said about itself, kept beside how its file looked then: it is run
//! and read again only when that changed.
//!
//! ```text
//! known/engine-<16 hex digits of its path's digest>.json
//! ```
//!
//! What an engine can compute on depends on more than its file: on the libraries that lie with it,
//! and on the driver. Those are looked at, too. Of a script nothing is kept: what it runs may change
//! without it. A file that is missing, unreadable or of another
//! version of ours makes the engine be asked again, and nothing else.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use llama_orch_types::Digest;
use provision_kit::fs::{FsError, sha256_bytes, write_unflushed};
use serde::{Deserialize, Serialize};

use crate::config::Accelerator;
use crate::error::chain;
use crate::machine::Gpu;
use crate::manifest::Stamp;

/// What was learnt of an engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Known {
    pub version: String,
    /// `None` of one whose version was not wanted, and that was asked no more.
    pub rest: Option<Rest>,
}

/// What is learnt of an engine that is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Rest {
    pub digest: Digest,
    pub accelerator: Accelerator,
}

/// How everything looks that the answers depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Look {
    path: PathBuf,
    /// The file itself, links followed.
    stamp: Stamp,
    is_script: bool,
    /// Libraries in its directory, sorted.
    libraries: Vec<(String, Stamp)>,
    /// What the machine has to compute on, by its files.
    devices: String,
}

#[derive(Serialize, Deserialize)]
struct Kept {
    look: Look,
    known: Known,
}

impl Look {
    /// Blocking, for a moment.
    pub(super) fn at(path: &Path) -> Result<Self, FsError> {
        let path = std::fs::canonicalize(path).map_err(FsError::at("look at", path))?;
        let mut libraries = Vec::new();
        let directory = path.parent().unwrap_or(Path::new("/"));
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("lib") && name.contains(".so") {
                libraries.push((name, Stamp::of(&entry.path())?));
            }
        }
        libraries.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(Self {
            stamp: Stamp::of(&path)?,
            is_script: is_script(&path)?,
            path,
            libraries,
            devices: Gpu::by_files(),
        })
    }

    /// Whether an engine may find something else to compute on than processors.
    pub(super) fn has_devices(&self) -> bool {
        Gpu::may_be_there(&self.devices)
    }

    fn file(&self, known_dir: &Path) -> PathBuf {
        let digest = sha256_bytes(self.path.as_os_str().as_encoded_bytes()).hex();
        known_dir.join(format!("engine-{}.json", &digest[..16]))
    }

    /// What was learnt of an engine that looked like this. Blocking, for a moment.
    pub(super) fn recall(&self, known_dir: &Path) -> Option<Known> {
        let text = std::fs::read(self.file(known_dir)).ok()?;
        let kept: Kept = serde_json::from_slice(&text).ok()?;
        (kept.look == *self).then_some(kept.known)
    }

    /// Keeps what was learnt, unless it is of no use because the engine changed meanwhile.
    /// Blocking, for a moment.
    pub(super) fn keep(&self, known_dir: &Path, known: &Known) {
        if self.is_script || Self::at(&self.path).ok().as_ref() != Some(self) {
            return;
        }
        let kept = Kept {
            look: self.clone(),
            known: known.clone(),
        };
        let written = serde_json::to_vec_pretty(&kept)
            .map_err(|error| FsError::at("write", known_dir)(error.into()))
            .and_then(|text| write_unflushed(&self.file(known_dir), &text));
        if let Err(error) = written {
            tracing::debug!(error = %chain(&error), "an engine will be asked again what it is");
        }
    }
}

/// Whether the kernel hands the file to an interpreter.
fn is_script(path: &Path) -> Result<bool, FsError> {
    let mut begin = Vec::new();
    let read = File::open(path).and_then(|file| file.take(2).read_to_end(&mut begin));
    read.map_err(FsError::at("read", path))?;
    Ok(begin == b"#!")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_holds_until_the_engine_or_a_library_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (run, engine) = (dir.path().join("known"), dir.path().join("llama-server"));
        std::fs::write(&engine, "engine").unwrap();
        let known = Known {
            version: "b1".into(),
            rest: Some(Rest {
                digest: sha256_bytes(b"engine"),
                accelerator: Accelerator::Cpu,
            }),
        };
        let look = Look::at(&engine).unwrap();
        assert_eq!(look.recall(&run), None);
        look.keep(&run, &known);
        assert_eq!(Look::at(&engine).unwrap().recall(&run), Some(known.clone()));

        std::fs::write(dir.path().join("libggml.so.0"), "library").unwrap();
        let with_library = Look::at(&engine).unwrap();
        assert_eq!(with_library.recall(&run), None);
        with_library.keep(&run, &known);
        std::fs::write(&engine, "another").unwrap();
        assert_eq!(Look::at(&engine).unwrap().recall(&run), None);
        // What was learnt of the engine before it changed is not kept for the one that is there.
        with_library.keep(&run, &known);
        assert_eq!(Look::at(&engine).unwrap().recall(&run), None);
        std::fs::write(with_library.file(&run), "{").unwrap();
        assert_eq!(with_library.recall(&run), None);

        std::fs::write(&engine, "#!/bin/sh\n").unwrap();
        let script = Look::at(&engine).unwrap();
        script.keep(&run, &known);
        assert_eq!(script.recall(&run), None);
    }
}
