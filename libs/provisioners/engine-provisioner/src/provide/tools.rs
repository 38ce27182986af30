//! cmake and ninja: found on PATH, or installed from PyPI into the cache directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use provision_kit::dirs::CacheDirs;
use provision_kit::fs::{FsError, create_dir_all, rename_durably};
use provision_kit::lock::FileLock;
use provision_kit::pip::Pip;
use provision_kit::progress::Step;

use crate::error::EngineError;
use crate::machine::distribution::{Distribution, Need};
use crate::machine::{self, Program, is_executable};

/// How long another process may take to install a tool.
const INSTALL_WAIT: Duration = Duration::from_mins(10);

/// A build tool.
#[derive(Debug)]
pub(crate) struct Tool {
    pub name: &'static str,
    /// The PyPI package that carries it.
    package: &'static str,
    /// The real program inside the installed package. What pip puts into `bin` may be a script
    /// whose first line names the place where it was installed, and that place changes here.
    path_inside: &'static str,
    need: Need,
    /// Major and minor version below which the tool is of no use.
    oldest: (u32, u32),
}

pub(crate) const CMAKE: Tool = Tool {
    name: "cmake",
    package: "cmake",
    path_inside: "cmake/data/bin/cmake",
    need: Need::Cmake,
    // What llama.cpp's build asks for.
    oldest: (3, 14),
};

pub(crate) const NINJA: Tool = Tool {
    name: "ninja",
    package: "ninja",
    path_inside: "bin/ninja",
    need: Need::Ninja,
    oldest: (1, 3),
};

/// Finds a tool without installing anything.
pub(crate) async fn find(cache: &CacheDirs, tool: &Tool) -> Option<Program> {
    if let Some(program) = machine::probe(tool.name).await
        && is_new_enough(&program.version, tool.oldest)
    {
        return Some(program);
    }
    let path = installed(cache, tool);
    is_executable(&path).then(|| Program {
        path,
        version: "installed from PyPI".to_owned(),
    })
}

/// Finds a tool, or installs it.
pub(crate) async fn ensure(
    cache: &CacheDirs,
    tool: &'static Tool,
    allow_install: bool,
    step: &Step,
) -> Result<PathBuf, EngineError> {
    if let Some(program) = find(cache, tool).await {
        return Ok(program.path);
    }
    let install = Distribution::here().install_command(tool.need);
    if !allow_install {
        return Err(EngineError::NoBuildTool {
            tool: tool.name,
            install,
        });
    }
    let lock = cache.locks().join(format!("tool-{}.lock", tool.name));
    let _lock = FileLock::acquire(&lock, INSTALL_WAIT, |_| {
        step.note(format!(
            "another process installs {}: waiting for it",
            tool.name
        ));
    })
    .await?;
    let path = installed(cache, tool);
    if is_executable(&path) {
        return Ok(path);
    }
    step.note(format!(
        "{} is not there: installing it from PyPI",
        tool.name
    ));
    install_from_pypi(cache, tool, install).await?;
    Ok(path)
}

/// Whether a line such as `cmake version 3.25.1` names a version that is not too old. One that
/// cannot be read is given a try.
fn is_new_enough(line: &str, oldest: (u32, u32)) -> bool {
    let version = |word: &str| -> Option<(u32, u32)> {
        let mut parts = word.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    };
    line.split_whitespace()
        .find_map(version)
        .is_none_or(|found| found >= oldest)
}

fn installed(cache: &CacheDirs, tool: &Tool) -> PathBuf {
    cache.tools().join(tool.package).join(tool.path_inside)
}

/// Installs beside the final place and renames, so that half a tool is never found.
async fn install_from_pypi(
    cache: &CacheDirs,
    tool: &'static Tool,
    install: String,
) -> Result<(), EngineError> {
    let failed = |source| EngineError::ToolInstall {
        tool: tool.name,
        install: install.clone(),
        source,
    };
    create_dir_all(&cache.tools())?;
    let staging = cache.tools().join(format!(".{}.staging", tool.package));
    // Held under the lock: what lies here is what an interrupted install left.
    remove_tree(&staging)?;
    let pip = Pip::find().await.map_err(failed)?;
    pip.install_target(&[tool.package], &staging)
        .await
        .map_err(failed)?;
    if !is_executable(&staging.join(tool.path_inside)) {
        return Err(EngineError::ToolNotThere {
            tool: tool.name,
            directory: staging,
        });
    }
    let place = cache.tools().join(tool.package);
    remove_tree(&place)?;
    Ok(rename_durably(&staging, &place)?)
}

/// Removes a directory with everything in it, if it is there.
pub(crate) fn remove_tree(path: &Path) -> Result<(), FsError> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(FsError::at("remove", path)(error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_cmake_is_as_good_as_none() {
        for (line, good) in [
            ("cmake version 3.25.1", true),
            ("cmake version 3.14.0-rc1", true),
            ("cmake version 4.1.2", true),
            ("cmake version 3.13.4", false),
            ("cmake version 2.8.12.2", false),
            ("cmake3 of some vendor", true),
        ] {
            assert_eq!(is_new_enough(line, CMAKE.oldest), good, "{line}");
        }
        assert!(is_new_enough(
            "1.11.1.git.kitware.jobserver-1",
            NINJA.oldest
        ));
    }
}
