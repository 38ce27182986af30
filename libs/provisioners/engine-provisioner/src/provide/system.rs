//! Mode `system`: a `llama-server` that the machine already has.

use std::path::{Path, PathBuf};
use std::time::Duration;

use provision_kit::blocking::blocking;
use provision_kit::fs::sha256_file;
use provision_kit::process::{self, CommandSpec};

use super::known::{Known, Look, Rest};
use super::{BINARY, EngineInstallation, EngineProvisioner, provenance};
use crate::config::{Accelerator, EngineConfig, Mode};
use crate::error::EngineError;
use crate::machine::{find_on_path, is_executable};
use crate::run::environment::scrub;
use crate::version;

/// Longest that an engine may take to list its devices; a GPU's driver may have to wake up.
const DEVICES_LIMIT: Duration = Duration::from_secs(30);

pub(super) async fn provide(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
) -> Result<EngineInstallation, EngineError> {
    let binary = locate(config)?;
    let (look, recalled) = recall(provisioner, &binary).await?;
    let found = match &recalled {
        Some(known) => known.version.clone(),
        None => version::ask(&binary).await?,
    };
    // A binary that the user names is the user's word; one that merely lies on PATH is not.
    if config.path.is_none() && found != config.version {
        if recalled.is_none() {
            let known = Known {
                version: found.clone(),
                rest: None,
            };
            keep(provisioner, look, known).await;
        }
        return Err(EngineError::WrongVersion {
            path: binary,
            found,
            wanted: config.version.clone(),
        });
    }
    let rest = match recalled.and_then(|known| known.rest) {
        Some(rest) => rest,
        None => learn(provisioner, look, &binary, found.clone()).await?,
    };
    let installation = EngineInstallation {
        binary,
        version: found,
        digest: rest.digest,
        mode: Mode::System.into(),
        accelerator: rest.accelerator,
    };
    provenance::record_provided(&provisioner.runtime, &installation, None).await;
    Ok(installation)
}

/// How the engine looks, and what was learnt of one that looked the same.
async fn recall(
    provisioner: &EngineProvisioner,
    binary: &Path,
) -> Result<(Look, Option<Known>), EngineError> {
    let (known_dir, path) = (provisioner.cache.known(), binary.to_owned());
    blocking(move || {
        let look = Look::at(&path)?;
        let known = look.recall(&known_dir);
        Ok((look, known))
    })
    .await
}

/// Learns the rest about an engine that has told its version, and keeps it.
async fn learn(
    provisioner: &EngineProvisioner,
    look: Look,
    binary: &Path,
    version: String,
) -> Result<Rest, EngineError> {
    let accelerator = ask_accelerator(binary).await;
    let path = binary.to_owned();
    let (digest, _) = blocking(move || sha256_file(&path)).await?;
    let rest = Rest {
        digest,
        accelerator,
    };
    // That none was found says little where there are devices: they may have been hidden
    // from us, or have been busy.
    if accelerator != Accelerator::Cpu || !look.has_devices() {
        let known = Known {
            version,
            rest: Some(rest),
        };
        keep(provisioner, look, known).await;
    }
    Ok(rest)
}

async fn keep(provisioner: &EngineProvisioner, look: Look, known: Known) {
    let known_dir = provisioner.cache.known();
    blocking(move || look.keep(&known_dir, &known)).await;
}

pub(super) fn locate(config: &EngineConfig) -> Result<PathBuf, EngineError> {
    match &config.path {
        // Absolute, so that it means the same file wherever the engine is started.
        Some(path) => match std::path::absolute(path) {
            Ok(path) if is_executable(&path) => Ok(path),
            _ => Err(EngineError::NotExecutable { path: path.clone() }),
        },
        None => find_on_path(BINARY).ok_or(EngineError::NotOnPath),
    }
}

/// Fails if the engine finds no GPU here.
pub(super) async fn require_gpu(binary: &Path) -> Result<(), EngineError> {
    match ask_accelerator(binary).await {
        Accelerator::Cpu => Err(EngineError::NoGpu {
            reason: format!("{} lists no GPU", binary.display()),
        }),
        Accelerator::Cuda | Accelerator::Vulkan => Ok(()),
    }
}

/// What the engine can compute on, by its own list. One that gives no list is taken for a plain
/// one.
async fn ask_accelerator(binary: &Path) -> Accelerator {
    let spec = scrub(CommandSpec::new(binary).arg("--list-devices"));
    match process::output(spec, DEVICES_LIMIT).await {
        Ok(output) if output.status.success() => parse_devices(&output.stdout),
        _ => Accelerator::Cpu,
    }
}

fn parse_devices(list: &str) -> Accelerator {
    let named = |prefix: &str| {
        list.lines()
            .filter_map(|line| line.trim().split_once(':'))
            .any(|(name, _)| name.starts_with(prefix))
    };
    if named("CUDA") {
        Accelerator::Cuda
    } else if named("Vulkan") {
        Accelerator::Vulkan
    } else {
        Accelerator::Cpu
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read() {
        let list = "Available devices:\n  CUDA0: NVIDIA H100 (81079 MiB, 80000 MiB free)\n";
        assert_eq!(parse_devices(list), Accelerator::Cuda);
        assert_eq!(
            parse_devices("Available devices:\n  Vulkan0: x (1 MiB)\n"),
            Accelerator::Vulkan
        );
        assert_eq!(parse_devices("Available devices:\n"), Accelerator::Cpu);
    }
}
