//! Where files live, in one place.
//!
//! The cache directory holds what can be made again: engines, models,
//! downloads, logs of running engines. The runtime directory holds what this
//! start of the program did: handoff files and provenance. Nothing here
//! touches the disk.

use std::env;
use std::path::{Path, PathBuf};

use llama_orch_types::Hinted;

/// The directory's name under the user's cache directory.
const CACHE_NAME: &str = "llama-orch";

/// The runtime directory's name in the working directory.
const RUNTIME_NAME: &str = ".runtime";

/// No cache directory could be named.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no cache directory: neither XDG_CACHE_HOME nor HOME holds an absolute path")]
pub struct NoCacheDir;

impl Hinted for NoCacheDir {
    fn hint(&self) -> Option<String> {
        Some(
            "set `cache_dir` in the configuration, or XDG_CACHE_HOME or HOME in the environment"
                .to_owned(),
        )
    }
}

/// The cache directory and its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheDirs {
    root: PathBuf,
}

impl CacheDirs {
    /// A relative root counts from the working directory of now.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: absolute(root.into()),
        }
    }

    /// `$XDG_CACHE_HOME/llama-orch`, or `~/.cache/llama-orch`.
    pub fn default_root() -> Result<PathBuf, NoCacheDir> {
        root_from(|name| env::var_os(name).map(PathBuf::from))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Engines that were built or fetched.
    pub fn engines(&self) -> PathBuf {
        self.root.join("engines")
    }

    /// The store of models.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// Logs and PID files of running engines.
    pub fn run(&self) -> PathBuf {
        self.root.join("run")
    }

    /// What was learnt of the machine's own engines. May be removed at any time.
    pub fn known(&self) -> PathBuf {
        self.root.join("known")
    }

    /// Lock files. They are never removed: removing one would let two
    /// processes hold "the same" lock.
    pub fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// Build tools that were installed for our own use.
    pub fn tools(&self) -> PathBuf {
        self.root.join("tools")
    }

    /// Files that are still arriving.
    pub fn downloads(&self) -> PathBuf {
        self.root.join("downloads")
    }
}

fn root_from(variable: impl Fn(&str) -> Option<PathBuf>) -> Result<PathBuf, NoCacheDir> {
    // A relative XDG_CACHE_HOME is invalid by the XDG specification, and would
    // give a different cache in every working directory.
    let absolute = |path: &PathBuf| path.is_absolute();
    variable("XDG_CACHE_HOME")
        .filter(absolute)
        .or_else(|| {
            variable("HOME")
                .filter(absolute)
                .map(|home| home.join(".cache"))
        })
        .map(|cache| cache.join(CACHE_NAME))
        .ok_or(NoCacheDir)
}

/// The runtime directory and its parts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuntimeDirs {
    root: PathBuf,
}

impl RuntimeDirs {
    /// A relative root counts from the working directory of now.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: absolute(root.into()),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Handoff files.
    pub fn engines(&self) -> PathBuf {
        self.root.join("engines")
    }

    /// What was provided, from where, when.
    pub fn provenance(&self) -> PathBuf {
        self.root.join("provenance")
    }
}

impl Default for RuntimeDirs {
    /// `.runtime` in the working directory.
    fn default() -> Self {
        Self::new(RUNTIME_NAME)
    }
}

/// Paths from here are given to other processes, which may run elsewhere.
fn absolute(path: PathBuf) -> PathBuf {
    // Fails only for an empty path or without a working directory: then the
    // path itself is the best name there is.
    std::path::absolute(&path).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(xdg: Option<&str>, home: Option<&str>) -> Result<PathBuf, NoCacheDir> {
        root_from(|name| {
            match name {
                "XDG_CACHE_HOME" => xdg,
                "HOME" => home,
                _ => None,
            }
            .map(PathBuf::from)
        })
    }

    #[test]
    fn xdg_comes_before_home() {
        assert_eq!(
            root(Some("/x"), Some("/h")),
            Ok(PathBuf::from("/x/llama-orch"))
        );
        assert_eq!(
            root(None, Some("/h")),
            Ok(PathBuf::from("/h/.cache/llama-orch"))
        );
    }

    #[test]
    fn relative_paths_do_not_count() {
        assert_eq!(
            root(Some("x"), Some("/h")),
            Ok(PathBuf::from("/h/.cache/llama-orch"))
        );
        assert_eq!(root(Some(""), Some("")), Err(NoCacheDir));
        assert_eq!(root(None, None), Err(NoCacheDir));
    }
}
