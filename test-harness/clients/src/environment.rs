//! The Python packages that the scripts need, in a directory of their own.
//!
//! They are installed once, under a lock, into a directory whose name comes
//! from their versions and from Python's, and used by all later runs. Nothing
//! of the system's Python is changed or needed but `python3` and its pip.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use provision_kit::dirs::CacheDirs;
use provision_kit::lock::FileLock;
use provision_kit::pip::Pip;
use sha2::{Digest, Sha256};
use tokio::sync::OnceCell;

const REQUIREMENTS: &str = include_str!("../python/requirements.txt");

/// Some ten megabytes, over a slow line.
const INSTALL_LIMIT: Duration = Duration::from_mins(10);

/// Where this crate keeps what it made: beside the machine's engines and models.
pub fn directory() -> PathBuf {
    let cache = CacheDirs::default_root().expect("the cache directory has a name");
    let directory = cache.join("test-clients");
    std::fs::create_dir_all(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    directory
}

/// The directory that goes into `PYTHONPATH`, installed if it is not there yet.
pub async fn packages() -> PathBuf {
    static PACKAGES: OnceCell<PathBuf> = OnceCell::const_new();
    PACKAGES.get_or_init(provide).await.clone()
}

async fn provide() -> PathBuf {
    // Compiled packages fit one version of Python only.
    let digest = Sha256::digest(format!("{REQUIREMENTS}\n{}", python_version()));
    let mut key = String::new();
    for byte in digest.iter().take(8) {
        // Writing to a String cannot fail.
        let _ = write!(key, "{byte:02x}");
    }
    let place = directory().join(format!("python-{key}"));
    let lock = place.with_extension("lock");
    let _lock = FileLock::acquire(&lock, INSTALL_LIMIT, |_| {})
        .await
        .unwrap_or_else(|error| panic!("{}: {error}", lock.display()));
    if !place.exists() {
        install(&place).await;
    }
    place
}

/// The packages appear under the final name whole or not at all. Only who holds the
/// lock calls this, so whatever else is staged for this name was left by a process
/// that was killed.
async fn install(place: &Path) {
    let name = place.file_name().expect("the place has a name");
    let prefix = format!(".installing-{}-", name.to_string_lossy());
    for entry in std::fs::read_dir(directory())
        .into_iter()
        .flatten()
        .flatten()
    {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            // What stays costs space only.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
    let staging = tempfile::Builder::new()
        .prefix(&prefix)
        .tempdir_in(directory())
        .expect("the cache directory can be written to");
    let wanted: Vec<&str> = REQUIREMENTS
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect();
    let pip = Pip::find()
        .await
        .unwrap_or_else(|error| panic!("the Python SDKs need pip: {error}"))
        .with_timeout(INSTALL_LIMIT);
    pip.install_target(&wanted, staging.path())
        .await
        .unwrap_or_else(|error| panic!("the Python SDKs cannot be installed: {error}"));
    std::fs::rename(staging.path(), place)
        .unwrap_or_else(|error| panic!("cannot name {}: {error}", place.display()));
    // There is nothing under its own name any more.
    let _ = staging.keep();
}

fn python_version() -> String {
    let question = "import sys, sysconfig; print(sys.version, sysconfig.get_platform())";
    let said = Command::new("python3").args(["-c", question]).output();
    let said = said.unwrap_or_else(|error| panic!("the Python SDKs need python3: {error}"));
    assert!(said.status.success(), "python3 does not run: {said:?}");
    String::from_utf8_lossy(&said.stdout).trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_package_has_one_version() {
        for line in REQUIREMENTS.lines() {
            let words: Vec<&str> = line.split("==").collect();
            assert!(words.len() == 2 && !words[1].is_empty(), "{line}");
        }
        for sdk in ["openai", "anthropic", "ollama"] {
            let line = format!("{sdk}==");
            assert!(REQUIREMENTS.lines().any(|one| one.starts_with(&line)));
        }
    }
}
