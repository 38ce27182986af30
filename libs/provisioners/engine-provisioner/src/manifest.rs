//! An installed engine's directory: the binary and a manifest that says what it is.
//!
//! ```text
//! engines/<version>-<key>/llama-server        (and, of a release, its shared libraries)
//! engines/<version>-<key>/manifest.json
//! ```
//!
//! A directory gets its final name only when it is complete, so a directory with a manifest is an
//! engine and everything else is not.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use llama_orch_types::Digest;
use provision_kit::fs::{FsError, sha256_bytes, sha256_file, write_atomic};
use serde::{Deserialize, Serialize};

use crate::config::{Accelerator, Mode};
use crate::error::EngineError;

const FILE_NAME: &str = "manifest.json";

/// What makes two builds the same. Everything in it goes into the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Recipe {
    pub version: String,
    pub mode: Mode,
    pub accelerator: Accelerator,
    /// Where it came from: a source's identity, or an archive's name.
    pub origin: String,
    /// CMake options, or nothing.
    pub options: Vec<String>,
    /// The compiler's own word for itself, or nothing.
    pub compiler: Option<String>,
    /// The CPU features that the binary was built for; nothing if it runs on any.
    pub cpu_features: Option<String>,
}

impl Recipe {
    /// A short name for everything above.
    pub(crate) fn key(&self) -> String {
        // Fields are written in a fixed order, and a struct of strings always serialises.
        let text = serde_json::to_string(self).unwrap_or_default();
        sha256_bytes(text.as_bytes()).hex()[..16].to_owned()
    }

    pub(crate) fn directory_name(&self) -> String {
        format!("{}-{}", self.version, self.key())
    }
}

/// How the file looked when its digest was taken. While this stands, the digest does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    size: u64,
    modified_s: i64,
    modified_ns: i64,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> Result<Self, FsError> {
        let facts = fs::metadata(path).map_err(FsError::at("look at", path))?;
        Ok(Self {
            size: facts.size(),
            modified_s: facts.mtime(),
            modified_ns: facts.mtime_nsec(),
            inode: facts.ino(),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub recipe: Recipe,
    /// The binary's path inside the directory.
    pub binary: PathBuf,
    pub digest: Digest,
    pub stamp: Stamp,
    /// sha256 of the archive or source it came from, where it has one.
    pub origin_digest: Option<Digest>,
    pub built_at: String,
}

impl Manifest {
    /// Describes the binary in `directory`. Reads the whole file: blocking.
    pub(crate) fn describe(
        directory: &Path,
        binary: PathBuf,
        recipe: Recipe,
        origin_digest: Option<Digest>,
    ) -> Result<Self, FsError> {
        let path = directory.join(&binary);
        let (digest, _) = sha256_file(&path)?;
        Ok(Self {
            recipe,
            stamp: Stamp::of(&path)?,
            binary,
            digest,
            origin_digest,
            built_at: jiff::Timestamp::now().to_string(),
        })
    }

    pub(crate) fn write(&self, directory: &Path) -> Result<(), EngineError> {
        let path = directory.join(FILE_NAME);
        let text = serde_json::to_vec_pretty(self).map_err(|source| EngineError::Manifest {
            path: path.clone(),
            source,
        })?;
        Ok(write_atomic(&path, &text)?)
    }

    /// Reads a directory's manifest; `None` if it has none and so is no engine.
    pub(crate) fn read(directory: &Path) -> Result<Option<Self>, EngineError> {
        let path = directory.join(FILE_NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(FsError::at("read", &path)(error).into()),
        };
        match serde_json::from_slice(&text) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(source) => Err(EngineError::Manifest { path, source }),
        }
    }

    /// Checks that the binary is still the one that was installed, and returns its path. Its bytes
    /// are read only if the file's size, time or inode changed. Blocking.
    pub(crate) fn verify(&self, directory: &Path) -> Result<PathBuf, EngineError> {
        let path = directory.join(&self.binary);
        let stamp = Stamp::of(&path)?;
        if stamp == self.stamp {
            return Ok(path);
        }
        let (found, _) = sha256_file(&path)?;
        if found != self.digest {
            return Err(EngineError::BinaryChanged {
                path,
                expected: self.digest,
                found,
            });
        }
        // Copied or restored: the same bytes in another file. Remember the new looks.
        let renewed = Self {
            stamp,
            ..self.clone()
        };
        renewed.write(directory)?;
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            version: "b1".into(),
            mode: Mode::Source,
            accelerator: Accelerator::Cpu,
            origin: "sha256:00".into(),
            options: vec!["-DA=ON".into()],
            compiler: Some("c++ 12".into()),
            cpu_features: Some("avx".into()),
        }
    }

    #[test]
    fn everything_in_a_recipe_changes_the_key() {
        let key = recipe().key();
        assert_eq!(key, recipe().key());
        let others = [
            Recipe {
                version: "b2".into(),
                ..recipe()
            },
            Recipe {
                mode: Mode::Release,
                ..recipe()
            },
            Recipe {
                accelerator: Accelerator::Cuda,
                ..recipe()
            },
            Recipe {
                origin: "x".into(),
                ..recipe()
            },
            Recipe {
                options: vec![],
                ..recipe()
            },
            Recipe {
                compiler: Some("c++ 13".into()),
                ..recipe()
            },
            Recipe {
                cpu_features: None,
                ..recipe()
            },
        ];
        for other in others {
            assert_ne!(other.key(), key, "{other:?}");
        }
    }

    #[test]
    fn a_changed_binary_is_noticed_and_a_moved_one_is_not_refused() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let binary = directory.join("llama-server");
        assert_eq!(Manifest::read(directory).unwrap(), None);
        fs::write(&binary, "engine").unwrap();
        let manifest =
            Manifest::describe(directory, "llama-server".into(), recipe(), None).unwrap();
        manifest.write(directory).unwrap();
        assert_eq!(Manifest::read(directory).unwrap(), Some(manifest.clone()));
        assert_eq!(manifest.verify(directory).unwrap(), binary);

        let copy = directory.join("copy");
        fs::copy(&binary, &copy).unwrap();
        fs::rename(&copy, &binary).unwrap();
        manifest.verify(directory).unwrap();
        let renewed = Manifest::read(directory).unwrap().unwrap();
        assert_eq!(renewed.stamp, Stamp::of(&binary).unwrap());

        fs::write(&binary, "trojan").unwrap();
        let other = fs::File::options().write(true).open(&binary).unwrap();
        other
            .set_modified(std::time::SystemTime::UNIX_EPOCH)
            .unwrap();
        assert!(matches!(
            renewed.verify(directory),
            Err(EngineError::BinaryChanged { .. })
        ));
    }
}
