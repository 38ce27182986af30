//! The machine's own pip, used to fetch packages.
//!
//! pip knows this machine's indexes, proxies and certificates, so nothing here
//! speaks to an index itself. Nothing of the system is touched: packages are
//! downloaded, or unpacked into a directory of ours.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::fs::{FsError, create_dir_all, rename_durably};
use crate::process::{CommandSpec, ProcessError, output};
use llama_orch_types::Hinted;

/// The ways to call pip, best first: `python3 -m pip` cannot belong to another
/// Python than the one it is called with.
const CANDIDATES: [&[&str]; 3] = [&["python3", "-m", "pip"], &["pip3"], &["pip"]];

const PROBE_TIMEOUT: Duration = Duration::from_secs(30);

/// A model of many gigabytes over a slow line must fit in.
const DEFAULT_TIMEOUT: Duration = Duration::from_hours(2);

/// This many of pip's last lines go into an error.
const KEPT_LINES: usize = 12;

/// Longer lines are cut, so that an error stays readable.
const MAX_LINE: usize = 400;

/// Why pip was not there or did not do it.
#[derive(Debug, thiserror::Error)]
pub enum PipError {
    #[error("there is no working pip here: {}", tried.join("; "))]
    NotFound { tried: Vec<String> },
    #[error("cannot run `{command}`")]
    Process {
        command: String,
        #[source]
        source: ProcessError,
    },
    #[error("`{command}` was still running after {} s and was ended", after.as_secs())]
    TimedOut { command: String, after: Duration },
    #[error("`{command}` failed ({status}):\n{last_lines}")]
    Failed {
        command: String,
        status: String,
        last_lines: String,
    },
    #[error("`{command}` left {found} files where one was expected")]
    UnexpectedFiles { command: String, found: usize },
    #[error("`{requirement}` is no package name and version")]
    BadRequirement { requirement: String },
    #[error(transparent)]
    File(#[from] FsError),
}

impl PipError {
    /// Whether the same call may succeed a little later.
    pub fn retriable(&self) -> bool {
        match self {
            Self::TimedOut { .. } => true,
            Self::Failed { last_lines, .. } => speaks_of_network(last_lines),
            _ => false,
        }
    }
}

impl Hinted for PipError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "install pip: `sudo apt install python3-pip` (Debian, Ubuntu), \
                 `sudo pacman -S python-pip` (Arch, CachyOS), `sudo dnf install python3-pip` (Fedora)"
                .to_owned(),
            Self::Failed { last_lines, .. } if speaks_of_network(last_lines) => {
                "check the network and pip's own settings (`pip config list`)".to_owned()
            }
            Self::Failed { last_lines, .. } if last_lines.contains("No matching distribution") => {
                "the index that pip uses does not have this version: see `pip config list` and `pip index versions NAME`"
                    .to_owned()
            }
            Self::Failed { last_lines, .. } if last_lines.contains("No space left") => {
                "free some space, also where temporary files go (TMPDIR)".to_owned()
            }
            Self::Failed { command, .. } => format!("run it by hand to see all of its output: {command}"),
            Self::TimedOut { .. } => "try again; a slow index can be replaced in pip's own settings".to_owned(),
            Self::File(error) => return error.hint(),
            _ => return None,
        })
    }
}

fn speaks_of_network(lines: &str) -> bool {
    [
        "NewConnectionError",
        "ConnectionError",
        "Read timed out",
        "Temporary failure in name resolution",
        "ConnectTimeout",
    ]
    .iter()
    .any(|sign| lines.contains(sign))
}

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

    /// Downloads one file of a package, without what it depends on. The file
    /// appears in `dest_dir` whole or not at all.
    pub async fn download(
        &self,
        package: &str,
        version: &str,
        kind: PipArtifact,
        dest_dir: &Path,
    ) -> Result<PathBuf, PipError> {
        let requirement = format!("{package}=={version}");
        if !is_plain(package) || !is_plain(version) {
            return Err(PipError::BadRequirement { requirement });
        }
        create_dir_all(dest_dir)?;
        // Removed with everything in it when dropped.
        let staging = tempfile::Builder::new()
            .prefix(".pip-")
            .tempdir_in(dest_dir)
            .map_err(FsError::at("make a temporary directory in", dest_dir))?;
        let staging_text = staging.path().to_string_lossy().into_owned();
        // Never `--no-binary :all:`: it would build the build tools from source too.
        let choice = match kind {
            PipArtifact::Wheel => "--only-binary",
            PipArtifact::Sdist => "--no-binary",
        };
        let arguments = [
            "download",
            "--no-deps",
            "--no-input",
            "--disable-pip-version-check",
            "--progress-bar",
            "off",
            choice,
            package,
            "--dest",
            &staging_text,
            &requirement,
        ];
        self.run(&arguments, self.timeout).await?;
        let file = self.only_file(staging.path(), &requirement)?;
        let destination = dest_dir.join(file.file_name().unwrap_or_default());
        let (from, to) = (file, destination.clone());
        // Flushing a large file to disk takes its time.
        tokio::task::spawn_blocking(move || rename_durably(&from, &to))
            .await
            .map_err(|error| FsError::at("name", &destination)(std::io::Error::other(error)))??;
        Ok(destination)
    }

    /// Installs packages, without what they depend on, into a directory of
    /// ours. `packages` are requirements such as `cmake` or `ninja==1.11.1`.
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
