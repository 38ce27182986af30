//! What to start, as a value.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::errno::Errno;
use nix::sys::signal::Signal;

/// What a child is sent when we die, and when its [`ChildGroup`](super::ChildGroup) is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeathSignal {
    /// For a program that keeps nothing to tidy up, such as an engine.
    Kill,
    /// For a program that ends its own children when told, such as ninja. When its group is
    /// dropped it gets two seconds, then KILL.
    Terminate,
}

/// What to start. Standard input is always empty; standard output and error are pipes.
#[derive(Debug, Clone)]
pub struct CommandSpec {
    pub(super) program: PathBuf,
    arguments: Vec<OsString>,
    working_directory: Option<PathBuf>,
    set_environment: Vec<(OsString, OsString)>,
    removed_environment: Vec<OsString>,
    pub(super) death_signal: DeathSignal,
}

impl CommandSpec {
    /// A program (a path, or a name to be found on PATH), killed when we die.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
            arguments: Vec::new(),
            working_directory: None,
            set_environment: Vec::new(),
            removed_environment: Vec::new(),
            death_signal: DeathSignal::Kill,
        }
    }

    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        let arguments = arguments.into_iter();
        self.arguments
            .extend(arguments.map(|argument| argument.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub fn current_dir(mut self, directory: impl Into<PathBuf>) -> Self {
        self.working_directory = Some(directory.into());
        self
    }

    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.set_environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Keeps one of our own environment variables from the child.
    #[must_use]
    pub fn env_remove(mut self, name: impl AsRef<OsStr>) -> Self {
        self.removed_environment.push(name.as_ref().to_owned());
        self
    }

    #[must_use]
    pub fn death_signal(mut self, signal: DeathSignal) -> Self {
        self.death_signal = signal;
        self
    }

    pub fn program(&self) -> &Path {
        &self.program
    }

    #[allow(unsafe_code)]
    pub(super) fn command(&self) -> std::process::Command {
        let mut command = std::process::Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.set_environment.iter().cloned())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        for name in &self.removed_environment {
            command.env_remove(name);
        }
        // After those: where we carry an owner's mark ourselves, its name may be among them.
        command.env(super::leash::NAME, super::leash::owner());
        if let Some(directory) = &self.working_directory {
            command.current_dir(directory);
        }
        let signal = match self.death_signal {
            DeathSignal::Kill => Signal::SIGKILL,
            DeathSignal::Terminate => Signal::SIGTERM,
        };
        let parent = nix::unistd::getpid();
        // SAFETY: runs between fork and exec, where only async-signal-safe calls are allowed; the
        // closure makes two plain system calls and neither allocates nor locks.
        unsafe {
            command.pre_exec(move || {
                nix::sys::prctl::set_pdeathsig(signal)?;
                // We may have died between fork and prctl; then no signal will come.
                if nix::unistd::getppid() != parent {
                    return Err(Errno::ECANCELED.into());
                }
                Ok(())
            });
        }
        command
    }
}
