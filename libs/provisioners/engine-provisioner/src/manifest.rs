//! An installed engine's directory: the binary and a manifest that says what it is.
//!
//! ```text
//! engines/<version>-<key>/llama-server        (and, of a release, its shared libraries)
//! engines/<version>-<key>/manifest.json
//! ```
//!
//! A directory gets its final name only when it is complete, so a directory with a manifest is an
//! engine and everything else is not.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::{fs, io};

use llama_orch_types::Digest;
use provision_kit::fs::{FsError, sha256_bytes, sha256_file, write_atomic};
use serde::{Deserialize, Serialize};

use crate::config::{Accelerator, Mode};
use crate::error::{EngineError, chain};

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
    /// What our environment said to CMake and the compiler, as `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
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
    /// When the file's bytes or facts were last changed, which no program can set at will. Earlier
    /// manifests lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    changed: Option<(i64, i64)>,
}

impl Stamp {
    /// A symbolic link is looked at itself.
    pub(crate) fn of(path: &Path) -> Result<Self, FsError> {
        let facts = fs::symlink_metadata(path).map_err(FsError::at("look at", path))?;
        Ok(Self {
            size: facts.size(),
            modified_s: facts.mtime(),
            modified_ns: facts.mtime_nsec(),
            inode: facts.ino(),
            changed: Some((facts.ctime(), facts.ctime_nsec())),
        })
    }
}

/// One file's digest, and how the file looked before and after it was read. Blocking.
fn stamped_digest(path: &Path) -> Result<(Digest, Stamp), FsError> {
    let before = Stamp::of(path)?;
    let digest = digest_of(path)?;
    if Stamp::of(path)? == before {
        return Ok((digest, before));
    }
    let changed = io::Error::other("it changed while it was read");
    Err(FsError::at("take the digest of", path)(changed))
}

/// A link's digest is that of the name it holds.
fn digest_of(path: &Path) -> Result<Digest, FsError> {
    let facts = fs::symlink_metadata(path).map_err(FsError::at("look at", path))?;
    if facts.is_symlink() {
        let target = fs::read_link(path).map_err(FsError::at("read", path))?;
        return Ok(sha256_bytes(target.as_os_str().as_bytes()));
    }
    Ok(sha256_file(path)?.0)
}

/// A file that lies beside the binary: a release brings its libraries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Companion {
    /// Its path inside the directory.
    pub path: PathBuf,
    pub digest: Digest,
    pub stamp: Stamp,
}

/// Every file and link under `directory` but the binary and the manifest, sorted. Blocking.
fn companions(directory: &Path, binary: &Path) -> Result<Vec<Companion>, FsError> {
    let mut found = Vec::new();
    let mut waiting = vec![PathBuf::new()];
    while let Some(inside) = waiting.pop() {
        let here = directory.join(&inside);
        let entries = fs::read_dir(&here).map_err(FsError::at("list", &here))?;
        for entry in entries {
            let entry = entry.map_err(FsError::at("list", &here))?;
            let path = inside.join(entry.file_name());
            let kind = entry
                .file_type()
                .map_err(FsError::at("look at", &entry.path()))?;
            if kind.is_dir() {
                waiting.push(path);
            } else if path != binary && path != Path::new(FILE_NAME) {
                let (digest, stamp) = stamped_digest(&entry.path())?;
                found.push(Companion {
                    path,
                    digest,
                    stamp,
                });
            }
        }
    }
    found.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(found)
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    pub recipe: Recipe,
    /// The binary's path inside the directory.
    pub binary: PathBuf,
    pub digest: Digest,
    pub stamp: Stamp,
    /// What else the directory holds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub companions: Vec<Companion>,
    /// sha256 of the archive or source it came from, where it has one.
    pub origin_digest: Option<Digest>,
    pub built_at: String,
}

impl Manifest {
    /// Describes the binary in `directory` and what lies with it. Reads the files whole: blocking.
    pub(crate) fn describe(
        directory: &Path,
        binary: PathBuf,
        recipe: Recipe,
        origin_digest: Option<Digest>,
    ) -> Result<Self, FsError> {
        let (digest, stamp) = stamped_digest(&directory.join(&binary))?;
        Ok(Self {
            recipe,
            stamp,
            companions: companions(directory, &binary)?,
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
        match Self::parse(&text) {
            Ok(manifest) => Ok(Some(manifest)),
            Err(source) => Err(EngineError::Manifest { path, source }),
        }
    }

    /// Reads a manifest. One that names files outside its directory is none.
    fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        let manifest: Self = serde_json::from_slice(text)?;
        let files = manifest.companions.iter().map(|companion| &companion.path);
        for path in files.chain([&manifest.binary]) {
            let inside = |part: Component<'_>| matches!(part, Component::Normal(_));
            if path.as_os_str().is_empty() || !path.components().all(inside) {
                return Err(serde::de::Error::custom(format_args!(
                    "{} lies outside the engine's directory",
                    path.display()
                )));
            }
        }
        Ok(manifest)
    }

    /// Checks that the binary and what lies with it are still what was installed, and returns the
    /// binary's path. A file's bytes are read only if its size, times or inode changed. Blocking.
    pub(crate) fn verify(&self, directory: &Path) -> Result<PathBuf, EngineError> {
        let mut renewed = self.clone();
        let path = directory.join(&self.binary);
        check_file(&path, self.digest, &mut renewed.stamp)?;
        for companion in &mut renewed.companions {
            let path = directory.join(&companion.path);
            check_file(&path, companion.digest, &mut companion.stamp)?;
        }
        // Copied or restored: the same bytes in another file. The new looks are remembered, so
        // that the bytes need not be read again; where they cannot be, they are read again.
        if renewed != *self
            && let Err(error) = renewed.write(directory)
        {
            tracing::warn!(error = %chain(&error), "a checked engine's manifest is not renewed");
        }
        Ok(path)
    }
}

/// Whether these bytes can be read as the manifest of an installed engine.
pub fn check_manifest(text: &[u8]) -> Result<(), serde_json::Error> {
    Manifest::parse(text).map(drop)
}

fn check_file(path: &Path, expected: Digest, stamp: &mut Stamp) -> Result<(), EngineError> {
    if Stamp::of(path)? == *stamp {
        return Ok(());
    }
    let (found, new_stamp) = stamped_digest(path)?;
    if found != expected {
        return Err(EngineError::BinaryChanged {
            path: path.to_owned(),
            expected,
            found,
        });
    }
    *stamp = new_stamp;
    Ok(())
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
            environment: Vec::new(),
        }
    }

    #[test]
    fn a_manifest_names_no_file_outside_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("engine")).unwrap();
        fs::write(directory.path().join("outside"), "x").unwrap();
        fs::write(directory.path().join("engine/llama-server"), "x").unwrap();
        let engine = directory.path().join("engine");
        let good = Manifest::describe(&engine, "llama-server".into(), recipe(), None).unwrap();
        let absolute = directory.path().join("outside");
        for bad in [
            "../outside",
            "a/../../outside",
            "",
            ".",
            &absolute.to_string_lossy(),
        ] {
            let binary = Manifest {
                binary: bad.into(),
                ..good.clone()
            };
            let mut companion = good.clone();
            companion.companions = vec![Companion {
                path: bad.into(),
                digest: good.digest,
                stamp: good.stamp.clone(),
            }];
            for manifest in [binary, companion] {
                let text = serde_json::to_vec(&manifest).unwrap();
                assert!(check_manifest(&text).is_err(), "{bad}");
                manifest.write(&engine).unwrap();
                assert!(Manifest::read(&engine).is_err(), "{bad}");
            }
        }
        check_manifest(&serde_json::to_vec(&good).unwrap()).unwrap();
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
            Recipe {
                environment: vec!["CFLAGS=-O1".into()],
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

    #[test]
    fn what_lies_with_the_binary_is_checked_too() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        fs::write(directory.join("llama-server"), "engine").unwrap();
        fs::create_dir(directory.join("lib")).unwrap();
        let library = directory.join("lib/libllama.so.0");
        fs::write(&library, "library").unwrap();
        std::os::unix::fs::symlink("libllama.so.0", directory.join("lib/libllama.so")).unwrap();
        let manifest =
            Manifest::describe(directory, "llama-server".into(), recipe(), None).unwrap();
        manifest.write(directory).unwrap();
        assert_eq!(manifest.companions.len(), 2);
        manifest.verify(directory).unwrap();
        fs::write(&library, "trojan!").unwrap();
        assert!(matches!(
            manifest.verify(directory),
            Err(EngineError::BinaryChanged { path, .. }) if path == library
        ));
    }

    #[test]
    fn a_change_with_its_time_set_back_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let binary = directory.join("llama-server");
        fs::write(&binary, "engine").unwrap();
        let manifest =
            Manifest::describe(directory, "llama-server".into(), recipe(), None).unwrap();
        let modified = fs::metadata(&binary).unwrap().modified().unwrap();
        // The kernel's clock for files moves on in steps of a few milliseconds.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            fs::write(&binary, "trojan").unwrap();
            let file = fs::File::options().write(true).open(&binary).unwrap();
            file.set_modified(modified).unwrap();
            if Stamp::of(&binary).unwrap().changed != manifest.stamp.changed {
                break;
            }
            assert!(std::time::Instant::now() < deadline);
        }
        assert!(manifest.verify(directory).is_err());
    }

    #[test]
    fn a_manifest_that_cannot_be_renewed_refuses_no_engine() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let binary = directory.join("llama-server");
        fs::write(&binary, "engine").unwrap();
        let mut manifest =
            Manifest::describe(directory, "llama-server".into(), recipe(), None).unwrap();
        // As an earlier version wrote it.
        manifest.stamp.changed = None;
        // A directory is in the way of the file.
        fs::create_dir_all(directory.join("manifest.json/x")).unwrap();
        assert_eq!(manifest.verify(directory).unwrap(), binary);
    }
}
