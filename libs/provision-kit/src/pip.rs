//! The machine's own pip, used to fetch packages.
//!
//! pip knows this machine's indexes, proxies and certificates, so nothing here
//! speaks to an index itself. Nothing of the system is touched: packages are
//! downloaded, or unpacked into a directory of ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::Digest;

use crate::blocking::blocking;
use crate::fs::{FsError, create_dir_all, rename_durably, write_atomic};
use crate::process::{CommandSpec, ProcessError, ProcessIdentity, output};

mod environment;
mod error;

pub use error::PipError;

/// The ways to call pip, best first: `python3 -m pip` cannot belong to another
/// Python than the one it is called with.
const CANDIDATES: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];

const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// A model of many gigabytes over a slow line must fit in.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(2);

/// Downloads gather in directories of such names.
const STAGING_PREFIX: &str = ".pip-";

/// A download that nobody has touched for so long was abandoned.
const STALE_AFTER: Duration = Duration::from_hours(24);

/// This many of pip's last lines go into an error.
const KEPT_LINES: usize = 12;

/// Longer lines are cut, so that an error stays readable.
const MAX_LINE: usize = 400;

/// Which of a package's files is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PipArtifact {
    Wheel,
    /// The source distribution.
    Sdist,
}

/// A pip that works.
#[derive(Debug, Clone)]
pub struct Pip {
    command: Vec<String>,
    /// Set for each call beside what is inherited.
    environment: Vec<(String, String)>,
    timeout: Duration,
}

impl Pip {
    /// Finds this machine's pip.
    pub async fn find() -> Result<Self, PipError> {
        let mut tried = Vec::new();
        for candidate in CANDIDATES {
            let pip = Self::from_command(candidate);
            match pip.run(&["--version"], PROBE_TIMEOUT).await {
                Ok(()) => return Ok(pip),
                Err(PipError::Failed { last_lines, .. }) => tried.push(format!(
                    "`{}` says \"{}\"",
                    candidate.join(" "),
                    last_lines.lines().last().unwrap_or_default()
                )),
                // A machine that is short of something does not lack pip.
                Err(error @ PipError::Process { .. }) if error.retriable() => return Err(error),
                Err(PipError::Process { source, .. }) => tried.push(source.to_string()),
                Err(other) => tried.push(other.to_string()),
            }
        }
        Err(PipError::NotFound { tried })
    }

    /// A pip called by these words.
    pub fn from_command(command: &[&str]) -> Self {
        Self {
            command: command.iter().map(|&word| word.to_owned()).collect(),
            environment: Vec::new(),
            timeout: DEFAULT_TIMEOUT,
        }
    }

    /// Sets an environment variable for this pip's calls.
    #[must_use]
    pub fn with_env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Bounds each call; two hours where not set.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// How this pip is called, for messages.
    pub fn command(&self) -> String {
        self.command.join(" ")
    }

    /// Downloads one wheel, without what it depends on. The file appears in
    /// `dest_dir` whole or not at all, and nothing of it is run.
    ///
    /// There is no such call for a source distribution: pip runs its build
    /// program to learn its name, so its digest must be known first.
    pub async fn download_wheel(
        &self,
        package: &str,
        version: &str,
        dest_dir: &Path,
    ) -> Result<PathBuf, PipError> {
        self.fetch(package, version, PipArtifact::Wheel, None, dest_dir)
            .await
    }

    /// Downloads one file of a package of which the digest is known, without
    /// what it depends on. pip compares the digest before it runs anything of
    /// a source distribution. The file appears in `dest_dir` whole or not at
    /// all.
    pub async fn download_pinned(
        &self,
        package: &str,
        version: &str,
        kind: PipArtifact,
        digest: Digest,
        dest_dir: &Path,
    ) -> Result<PathBuf, PipError> {
        self.fetch(package, version, kind, Some(digest), dest_dir)
            .await
    }

    async fn fetch(
        &self,
        package: &str,
        version: &str,
        kind: PipArtifact,
        digest: Option<Digest>,
        dest_dir: &Path,
    ) -> Result<PathBuf, PipError> {
        let requirement = format!("{package}=={version}");
        if !is_plain(package) || !is_plain(version) {
            return Err(PipError::BadRequirement { requirement });
        }
        create_dir_all(dest_dir)?;
        remove_stale(dest_dir);
        // Removed with everything in it when dropped.
        let staging = tempfile::Builder::new()
            .prefix(&format!("{STAGING_PREFIX}{}-", std::process::id()))
            .tempdir_in(dest_dir)
            .map_err(FsError::at("make a temporary directory in", dest_dir))?;
        let arrived = staging.path().join("files");
        let list = staging.path().join("requirements.txt");
        let (arrived_text, list_text) = (arrived.to_string_lossy(), list.to_string_lossy());
        // Never `--no-binary :all:`: it would build the build tools from source too.
        let choice = match kind {
            PipArtifact::Wheel => "--only-binary",
            PipArtifact::Sdist => "--no-binary",
        };
        let mut arguments = vec![
            "download",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
            choice,
            package,
            "--dest",
            &arrived_text,
        ];
        if let Some(digest) = digest {
            // A digest can be given in a file only.
            let line = format!("{requirement} --hash=sha256:{}\n", digest.hex());
            write_atomic(&list, line.as_bytes())?;
            arguments.extend(["--require-hashes", "--requirement", &list_text]);
        } else {
            arguments.push(&requirement);
        }
        match (self.run(&arguments, self.timeout).await, digest) {
            (Err(PipError::Failed { last_lines, .. }), Some(expected))
                if last_lines.contains("DO NOT MATCH THE HASHES") =>
            {
                return Err(PipError::WrongDigest {
                    requirement,
                    expected,
                    last_lines,
                });
            }
            (result, _) => result?,
        }
        let file = self.only_file(&arrived, &requirement)?;
        let destination = dest_dir.join(file.file_name().unwrap_or_default());
        let (from, to) = (file, destination.clone());
        // Flushing a large file to disk takes its time.
        blocking(move || rename_durably(&from, &to)).await?;
        Ok(destination)
    }

    /// Installs packages, without what they depend on, into a directory of
    /// ours. `packages` are requirements such as `cmake` or `ninja==1.11.1`;
    /// only their wheels are taken, so that nothing of them is run.
    pub async fn install_target(&self, packages: &[&str], target: &Path) -> Result<(), PipError> {
        for requirement in packages {
            if !requirement.split("==").all(is_plain) {
                return Err(PipError::BadRequirement {
                    requirement: (*requirement).to_owned(),
                });
            }
        }
        create_dir_all(target)?;
        let target = target.to_string_lossy();
        let mut arguments = vec![
            "install",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
            "--no-warn-script-location",
            // A pip.conf may say `user = true`, which contradicts a target.
            "--no-user",
            "--only-binary",
            ":all:",
            "--upgrade",
            "--target",
            &target,
        ];
        arguments.extend(packages);
        self.run(&arguments, self.timeout).await
    }

    fn only_file(&self, directory: &Path, requirement: &str) -> Result<PathBuf, PipError> {
        let files: Vec<PathBuf> = std::fs::read_dir(directory)
            .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
            .map_err(FsError::at("list", directory))?;
        match <[PathBuf; 1]>::try_from(files) {
            Ok([file]) => Ok(file),
            Err(files) => Err(PipError::UnexpectedFiles {
                command: format!("{} download {requirement}", self.command()),
                found: files.len(),
            }),
        }
    }

    async fn run(&self, arguments: &[&str], limit: Duration) -> Result<(), PipError> {
        let command = format!("{} {}", self.command(), arguments.join(" "));
        tracing::debug!(%command, "running pip");
        let Some((program, first)) = self.command.split_first() else {
            return Err(PipError::NotFound { tried: Vec::new() });
        };
        let mut spec = CommandSpec::new(program).args(first).args(arguments);
        for name in environment::kept_from_pip() {
            // What was set for this pip on purpose goes along.
            if !self.environment.iter().any(|(set, _)| **set == *name) {
                spec = spec.env_remove(name);
            }
        }
        for (name, value) in &self.environment {
            spec = spec.env(name, value);
        }
        match output(spec, limit).await {
            Ok(said) if said.status.success() => Ok(()),
            Ok(said) => Err(PipError::Failed {
                command,
                status: said.status.to_string(),
                last_lines: last_lines(&said.stderr),
            }),
            Err(ProcessError::TimedOut { limit, .. }) => Err(PipError::TimedOut {
                command,
                after: limit,
            }),
            Err(source) => Err(PipError::Process { command, source }),
        }
    }
}

/// Clears away what a killed process left: the directory's name says whose it
/// was. Where another process has that id by now, age decides: a call is
/// bounded far below it.
fn remove_stale(dest_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dest_dir) else {
        return;
    };
    for entry in entries.flatten() {
        let ours = entry
            .file_name()
            .to_string_lossy()
            .starts_with(STAGING_PREFIX);
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > STALE_AFTER));
        let name = entry.file_name();
        let owner = name
            .to_str()
            .and_then(|name| name.strip_prefix(STAGING_PREFIX)?.split('-').next())
            .and_then(|pid| pid.parse::<u32>().ok());
        let owner_is_dead = owner.is_some_and(|pid| matches!(ProcessIdentity::of(pid), Ok(None)));
        if ours
            && (old || owner_is_dead)
            && let Err(error) = std::fs::remove_dir_all(entry.path())
        {
            tracing::warn!(path = %entry.path().display(), %error, "an abandoned download stays");
        }
    }
}

/// The last lines that say something, each of bounded length.
fn last_lines(text: &str) -> String {
    let lines: Vec<String> = text
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty())
        .map(|line| line.chars().take(MAX_LINE).collect())
        .collect();
    lines[lines.len().saturating_sub(KEPT_LINES)..].join("\n")
}

/// A name or version that cannot be taken for an option, a path or a URL.
fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '!'))
}
