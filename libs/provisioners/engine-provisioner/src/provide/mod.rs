//! Providing an engine: the modes in their order, and what all of them share.
//!
//! ```text
//! system ──► cache ──► release ──► source       the first that gives an engine ends the search
//!    │         │          └──┬────────┘
//!    │         │             ▼
//!    │         │     lock ► look again ► stage beside ► check ► manifest ► rename
//!    ▼         ▼             ▼
//!         EngineInstallation
//! ```

mod build;
mod cache;
mod git;
mod known;
mod leftovers;
pub(crate) mod plan;
mod provenance;
mod release;
mod source;
mod system;
pub(crate) mod tools;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use llama_orch_types::{Digest, ProvisioningMode};
use provision_kit::blocking::blocking;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::fs::{create_dir_all, free_space, rename_durably};
use provision_kit::lock::FileLock;
use provision_kit::progress::{Reporter, Step, StepKind, Unit};
use serde::Serialize;

use crate::config::{Accelerator, AcceleratorChoice, EngineConfig, Mode};
use crate::error::{EngineError, ModeFailure, brief, chain};
use crate::machine::Gpu;
use crate::manifest::{Manifest, Recipe};
use crate::run::abandoned;
use crate::version;

pub(crate) use provenance::record_start;

/// Free space that a build must find, in bytes: source, build tree and tools take about 400 MiB.
pub(crate) const BUILD_SPACE: u64 = 1024 * 1024 * 1024;

/// How long another process may take to make the same engine. A build on a slow machine takes an
/// hour.
const MAKE_WAIT: Duration = Duration::from_hours(4);

/// An engine that is on this machine's disk and was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineInstallation {
    pub binary: PathBuf,
    /// The engine's own word for its version.
    pub version: String,
    /// sha256 of the binary.
    pub digest: Digest,
    /// How this call came by it.
    pub mode: ProvisioningMode,
    pub accelerator: Accelerator,
}

/// Provides engines and starts them. Cheap to clone.
#[derive(Debug, Clone)]
pub struct EngineProvisioner {
    pub(crate) cache: CacheDirs,
    pub(crate) runtime: RuntimeDirs,
    pub(crate) reporter: Arc<dyn Reporter>,
    /// Whether leftovers were looked for.
    cleared: Arc<AtomicBool>,
}

impl EngineProvisioner {
    pub fn new(cache: CacheDirs, runtime: RuntimeDirs, reporter: Arc<dyn Reporter>) -> Self {
        Self {
            cache,
            runtime,
            reporter,
            cleared: Arc::default(),
        }
    }

    /// Makes sure that the wanted engine is here, by the first mode that can. Dropping the future
    /// gives up; what was fetched or built so far is gone on with next time.
    pub async fn ensure(&self, config: &EngineConfig) -> Result<EngineInstallation, EngineError> {
        config.check()?;
        self.clear_leftovers().await;
        let what = format!("providing llama-server {}", config.version);
        let step = Step::start(
            &self.reporter,
            StepKind::EngineProvision,
            what,
            Unit::None,
            None,
        );
        match self.try_modes(config, &step).await {
            Ok(installation) => {
                tracing::info!(
                    mode = %installation.mode, version = %installation.version,
                    binary = %installation.binary.display(), "engine provided"
                );
                step.finish();
                Ok(installation)
            }
            Err(error) => {
                step.fail(brief(&error));
                Err(error)
            }
        }
    }

    /// Clears away what killed processes left here, once in this provisioner's life.
    async fn clear_leftovers(&self) {
        if self.cleared.swap(true, Ordering::Relaxed) {
            return;
        }
        let cache = self.cache.clone();
        blocking(move || leftovers::clear(&cache, SystemTime::now())).await;
        abandoned::clear(&self.cache, &self.runtime).await;
    }

    async fn try_modes(
        &self,
        config: &EngineConfig,
        step: &Step,
    ) -> Result<EngineInstallation, EngineError> {
        let modes = config.modes();
        let mut failures = Vec::new();
        for &mode in &modes {
            match self.try_mode(mode, config, step).await {
                Ok(installation) => return Ok(installation),
                Err(error) if modes.len() == 1 => return Err(error),
                Err(error) => {
                    let line = format!("mode {mode}: {}", brief(&error));
                    step.note(line);
                    failures.push(ModeFailure {
                        mode,
                        error: Box::new(error),
                    });
                }
            }
        }
        Err(EngineError::AllModesFailed { failures })
    }

    async fn try_mode(
        &self,
        mode: Mode,
        config: &EngineConfig,
        step: &Step,
    ) -> Result<EngineInstallation, EngineError> {
        let installation = match mode {
            Mode::System => system::provide(self, config).await,
            Mode::Cache => cache::provide(self, config).await,
            Mode::Release => release::provide(self, config, step).await,
            Mode::Source => source::provide(self, config, step).await,
        }?;
        if config.require_gpu {
            // What an engine was made for is one thing, and what it finds here another: a driver
            // may be missing or too old.
            system::require_gpu(&installation.binary).await?;
        }
        Ok(installation)
    }

    /// Where an engine made by this recipe lies.
    fn directory_of(&self, recipe: &Recipe) -> PathBuf {
        self.cache.engines().join(recipe.directory_name())
    }

    /// The lock under which an engine of this recipe is made.
    async fn lock_recipe(&self, recipe: &Recipe, step: &Step) -> Result<FileLock, EngineError> {
        let name = format!("engine-{}.lock", recipe.directory_name());
        let lock = self.cache.locks().join(name);
        let on_wait = |holder: provision_kit::lock::LockHolder| {
            let who = holder
                .pid
                .map(|pid| format!(" ({pid})"))
                .unwrap_or_default();
            step.note(format!(
                "another process{who} makes the same engine: waiting for it"
            ));
        };
        Ok(FileLock::acquire(&lock, MAKE_WAIT, on_wait).await?)
    }

    /// The lock under which an engine of this recipe is made; or the engine, where it is there and
    /// no lock can be had because the cache cannot be written to.
    async fn lock_or_use(&self, recipe: &Recipe, step: &Step) -> Result<Claim, EngineError> {
        match self.lock_recipe(recipe, step).await {
            Ok(lock) => Ok(Claim::Locked(lock)),
            Err(EngineError::Lock(error)) if error.cannot_be_made() => {
                match cache::open(self.directory_of(recipe)).await? {
                    Some((installation, _)) => Ok(Claim::Installed(installation)),
                    None => Err(error.into()),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The lock under which a file of this digest is fetched, used and removed. Engines of several
    /// recipes may come from one file.
    async fn lock_download(&self, digest: Digest, step: &Step) -> Result<FileLock, EngineError> {
        let name = format!("download-{}.lock", digest.hex());
        let lock = self.cache.locks().join(name);
        let on_wait = |_| step.note("another process uses the same download: waiting for it");
        Ok(FileLock::acquire(&lock, MAKE_WAIT, on_wait).await?)
    }

    /// The engine of this recipe, if it is here and whole. One whose binary was changed is removed,
    /// to be made again. To be called under the recipe's lock.
    async fn installed(
        &self,
        recipe: &Recipe,
        step: &Step,
    ) -> Result<Option<EngineInstallation>, EngineError> {
        let directory = self.directory_of(recipe);
        match cache::open(directory.clone()).await {
            Ok(found) => Ok(found.map(|(installation, _)| installation)),
            // An engine that could not be looked at may be whole.
            Err(error) if !is_spoilt(&error) => Err(error),
            Err(error) => {
                step.note(format!("{}: it will be made again", chain(&error)));
                blocking(move || tools::remove_tree(&directory)).await?;
                Ok(None)
            }
        }
    }

    /// Checks a staged engine, writes its manifest and gives its directory the final name.
    async fn install(
        &self,
        staged: PathBuf,
        recipe: Recipe,
        origin_digest: Option<Digest>,
    ) -> Result<EngineInstallation, EngineError> {
        let staged_binary = staged.join(BINARY);
        let found = version::ask(&staged_binary).await?;
        if version::build_number(&recipe.version).is_some() && found != recipe.version {
            return Err(EngineError::WrongVersion {
                path: staged_binary,
                found,
                wanted: recipe.version,
            });
        }
        let place = self.directory_of(&recipe);
        let mode = recipe.mode;
        let accelerator = recipe.accelerator;
        let target = place.clone();
        let manifest = blocking(move || -> Result<Manifest, EngineError> {
            let manifest = Manifest::describe(&staged, BINARY.into(), recipe, origin_digest)?;
            manifest.write(&staged)?;
            tools::remove_tree(&target)?;
            rename_durably(&staged, &target)?;
            Ok(manifest)
        })
        .await?;
        let installation = EngineInstallation {
            binary: place.join(BINARY),
            version: found,
            digest: manifest.digest,
            mode: mode.into(),
            accelerator,
        };
        provenance::record_provided(&self.runtime, &installation, Some(&manifest)).await;
        Ok(installation)
    }
}

/// What [`EngineProvisioner::lock_or_use`] came to.
enum Claim {
    Locked(FileLock),
    Installed(EngineInstallation),
}

/// Whether what was found out about an installed engine means that it is none any more.
fn is_spoilt(error: &EngineError) -> bool {
    match error {
        EngineError::BinaryChanged { .. } | EngineError::Manifest { .. } => true,
        EngineError::File(error) => error.source.kind() == std::io::ErrorKind::NotFound,
        _ => false,
    }
}

/// Fails if the disk of `path` has less than this many bytes left. Blocking.
fn require_space(path: &Path, needed: u64) -> Result<(), EngineError> {
    let free = free_space(path)?;
    if free >= needed {
        return Ok(());
    }
    Err(EngineError::NoSpace {
        path: path.to_owned(),
        needed,
        free,
    })
}

/// The engine's file name.
pub(crate) const BINARY: &str = "llama-server";

/// What the engine is to be made for, in this mode, on this machine.
fn choose_accelerator(
    config: &EngineConfig,
    mode: Mode,
    gpu: &Gpu,
) -> Result<Accelerator, EngineError> {
    let (cuda, vulkan) = match mode {
        // Which of the CUDA archives fits is more than a name can say: one is used if it is named.
        Mode::Release => (false, gpu.can_run_vulkan()),
        _ => (gpu.can_build_cuda(), gpu.can_build_vulkan()),
    };
    let no_gpu = |reason: &str| {
        Err(EngineError::NoGpu {
            reason: reason.to_owned(),
        })
    };
    match config.accelerator {
        AcceleratorChoice::Cuda if mode == Mode::Source && gpu.nvcc.is_none() => {
            no_gpu("nvcc is not installed")
        }
        AcceleratorChoice::Cuda if config.require_gpu && gpu.nvidia_driver.is_none() => {
            no_gpu("NVIDIA's driver is not loaded")
        }
        AcceleratorChoice::Vulkan
            if mode == Mode::Source && (gpu.glslc.is_none() || !gpu.vulkan_headers) =>
        {
            no_gpu("glslc or the Vulkan headers are not installed")
        }
        AcceleratorChoice::Vulkan if config.require_gpu && !gpu.can_run_vulkan() => {
            no_gpu("there is no device with a Vulkan driver")
        }
        // A published engine for the CPU must not stand in for a CUDA engine that can be built.
        AcceleratorChoice::Auto if mode == Mode::Release && gpu.can_build_cuda() => no_gpu(
            "an engine for CUDA can be built here, and the published ones are not chosen by guess",
        ),
        AcceleratorChoice::Cuda => Ok(Accelerator::Cuda),
        AcceleratorChoice::Vulkan => Ok(Accelerator::Vulkan),
        AcceleratorChoice::Auto if cuda => Ok(Accelerator::Cuda),
        AcceleratorChoice::Auto if vulkan => Ok(Accelerator::Vulkan),
        AcceleratorChoice::Auto | AcceleratorChoice::Cpu if config.require_gpu => {
            no_gpu("neither CUDA nor Vulkan can be used here")
        }
        AcceleratorChoice::Auto | AcceleratorChoice::Cpu => Ok(Accelerator::Cpu),
    }
}

/// An empty directory beside the final ones, for something that is being made. What an earlier
/// attempt left there is removed: callers hold the recipe's lock.
async fn fresh_staging(engines: &Path, recipe: &Recipe) -> Result<PathBuf, EngineError> {
    let staging = engines.join(format!(".{}.staging", recipe.directory_name()));
    let directory = staging.clone();
    blocking(move || {
        tools::remove_tree(&directory)?;
        create_dir_all(&directory)
    })
    .await?;
    Ok(staging)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::Program;

    fn program() -> Program {
        Program {
            path: "/x".into(),
            version: "1".into(),
        }
    }

    fn choose(accelerator: AcceleratorChoice, require_gpu: bool, gpu: &Gpu) -> Option<Accelerator> {
        let config = EngineConfig {
            accelerator,
            require_gpu,
            ..EngineConfig::default()
        };
        choose_accelerator(&config, Mode::Source, gpu).ok()
    }

    #[test]
    fn a_full_disk_is_said_before_it_is_filled() {
        let directory = tempfile::tempdir().unwrap();
        require_space(directory.path(), 1).unwrap();
        let error = require_space(directory.path(), u64::MAX).unwrap_err();
        assert!(matches!(error, EngineError::NoSpace { .. }), "{error}");
        assert!(error.retriable());
    }

    #[test]
    fn the_best_that_can_be_built_is_chosen() {
        use AcceleratorChoice::{Auto, Cuda, Vulkan};
        let none = Gpu::default();
        let nvcc_only = Gpu {
            nvcc: Some(program()),
            ..Gpu::default()
        };
        let cuda = Gpu {
            nvidia_driver: Some("580".into()),
            ..nvcc_only.clone()
        };
        let vulkan = Gpu {
            glslc: Some(program()),
            vulkan_headers: true,
            render_node: true,
            vulkan_runtime: true,
            ..Gpu::default()
        };
        assert_eq!(choose(Auto, false, &none), Some(Accelerator::Cpu));
        assert_eq!(choose(Auto, true, &none), None);
        assert_eq!(choose(Auto, false, &nvcc_only), Some(Accelerator::Cpu));
        assert_eq!(choose(Auto, true, &cuda), Some(Accelerator::Cuda));
        assert_eq!(choose(Auto, true, &vulkan), Some(Accelerator::Vulkan));
        // A published engine for the CPU does not come before one that is built for CUDA.
        let of_release =
            |gpu: &Gpu| choose_accelerator(&EngineConfig::default(), Mode::Release, gpu).ok();
        assert_eq!(of_release(&none), Some(Accelerator::Cpu));
        assert_eq!(of_release(&cuda), None);
        // A build for a GPU that is elsewhere is fine, unless one is required here.
        assert_eq!(choose(Cuda, false, &nvcc_only), Some(Accelerator::Cuda));
        assert_eq!(choose(Cuda, true, &nvcc_only), None);
        assert_eq!(choose(Cuda, false, &none), None);
        assert_eq!(choose(Vulkan, false, &none), None);
    }
}
