//! Mode `release`: llama.cpp's published archive for this platform and accelerator.

use std::env::consts::{ARCH, OS};
use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::Digest;
use provision_kit::blocking::blocking;
use provision_kit::download::{self, Download, DownloadError};
use provision_kit::fs::{create_dir_all, remove_file_if_there};
use provision_kit::progress::{Step, StepKind, Unit};
use provision_kit::rate::RateLimit;
use serde::Deserialize;

use super::{
    BINARY, Claim, EngineInstallation, EngineProvisioner, choose_accelerator, fresh_staging,
    require_space,
};
use crate::config::{Accelerator, AcceleratorChoice, EngineConfig, Mode};
use crate::error::{EngineError, chain};
use crate::machine::Gpu;
use crate::manifest::Recipe;
use crate::unpack::{directory_holding, space_needed, unpack};

/// A machine without a network is to find that out quickly, and go on to the next mode.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest that the release list may take.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);

pub(super) async fn provide(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
    step: &Step,
) -> Result<EngineInstallation, EngineError> {
    let (archive, recipe) = choose(config, &Gpu::probe().await)?;
    let _lock = match provisioner.lock_or_use(&recipe, step).await? {
        Claim::Locked(lock) => lock,
        Claim::Installed(installation) => return Ok(installation),
    };
    if let Some(installation) = provisioner.installed(&recipe, step).await? {
        return Ok(installation);
    }
    let client = client()?;
    let digest = match config.release.archive_digest {
        Some(digest) => digest,
        None => published_digest(&client, config, &archive).await?,
    };
    let download_lock = provisioner.lock_download(digest, step).await?;
    let file = fetch(provisioner, config, &client, &archive, digest).await?;
    let staging = fresh_staging(&provisioner.cache.engines(), &recipe).await?;
    let result = unpack_and_install(provisioner, &file, &staging, recipe, digest).await;
    // Nothing stays of an archive that was installed, and nothing of one that could not be; one
    // that found no room is good for the next start.
    let keep = matches!(result, Err(EngineError::NoSpace { .. }));
    let removed = blocking(move || {
        let mut removed = super::tools::remove_tree(&staging);
        if !keep {
            removed = removed.and(remove_file_if_there(&file));
        }
        drop(download_lock);
        removed
    })
    .await;
    if let Err(error) = removed {
        tracing::warn!(error = %chain(&error), "something of a fetched archive stays");
    }
    result
}

async fn unpack_and_install(
    provisioner: &EngineProvisioner,
    file: &Path,
    staging: &Path,
    recipe: Recipe,
    digest: Digest,
) -> Result<EngineInstallation, EngineError> {
    let (from, to) = (file.to_owned(), staging.to_owned());
    let inner = blocking(move || {
        require_space(&to, space_needed(&from)?)?;
        unpack(&from, &to)?;
        let found = directory_holding(&to, BINARY).map_err(|source| EngineError::Unpack {
            archive: from.clone(),
            source,
        })?;
        found.ok_or(EngineError::NotInArchive {
            archive: from,
            what: BINARY,
        })
    })
    .await?;
    // The libraries lie beside the binary, which finds them there.
    provisioner.install(inner, recipe, Some(digest)).await
}

/// The archive's name and the recipe of the engine in it.
pub(super) fn choose(config: &EngineConfig, gpu: &Gpu) -> Result<(String, Recipe), EngineError> {
    let (archive, accelerator) = if let Some(name) = &config.release.archive {
        named_archive(config, name)?
    } else {
        let accelerator = choose_accelerator(config, Mode::Release, gpu)?;
        (
            archive_name(&config.version, accelerator, OS, ARCH)?,
            accelerator,
        )
    };
    let recipe = Recipe {
        version: config.version.clone(),
        mode: Mode::Release,
        accelerator,
        origin: match config.release.archive_digest {
            Some(digest) => format!("{archive}@{digest}"),
            None => archive.clone(),
        },
        options: Vec::new(),
        compiler: None,
        cpu_features: None,
        environment: Vec::new(),
    };
    Ok((archive, recipe))
}

fn named_archive(config: &EngineConfig, name: &str) -> Result<(String, Accelerator), EngineError> {
    let wrong = |reason: String| EngineError::Config {
        key: "release.archive",
        reason,
    };
    // It becomes a file's name here.
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '+');
    if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
        return Err(wrong(format!("`{name}` is no archive's name")));
    }
    let accelerator = if name.contains("cuda") {
        Accelerator::Cuda
    } else if name.contains("vulkan") {
        Accelerator::Vulkan
    } else {
        Accelerator::Cpu
    };
    let wanted = match config.accelerator {
        AcceleratorChoice::Auto => accelerator,
        AcceleratorChoice::Cpu => Accelerator::Cpu,
        AcceleratorChoice::Cuda => Accelerator::Cuda,
        AcceleratorChoice::Vulkan => Accelerator::Vulkan,
    };
    if wanted != accelerator {
        return Err(wrong(format!("`{name}` is not for {wanted}")));
    }
    if config.require_gpu && accelerator == Accelerator::Cpu {
        return Err(EngineError::NoGpu {
            reason: format!("the archive {name} is for the CPU"),
        });
    }
    Ok((name.to_owned(), accelerator))
}

/// How llama.cpp names its archives. CUDA's are named after CUDA's version too and need CUDA's
/// libraries, so none is chosen by guess.
fn archive_name(
    version: &str,
    accelerator: Accelerator,
    os: &str,
    arch: &str,
) -> Result<String, EngineError> {
    let arch_word = match arch {
        "x86_64" => "x64",
        "aarch64" => "arm64",
        other => other,
    };
    let kind = match (os, accelerator, arch) {
        ("linux", Accelerator::Cpu, "x86_64" | "aarch64" | "s390x") => "ubuntu",
        ("linux", Accelerator::Vulkan, "x86_64" | "aarch64") => "ubuntu-vulkan",
        _ => {
            return Err(EngineError::NoArchiveForPlatform {
                platform: format!("{os} on {arch} with {accelerator} under one name"),
            });
        }
    };
    Ok(format!("llama-{version}-bin-{kind}-{arch_word}.tar.gz"))
}

fn client() -> Result<reqwest::Client, EngineError> {
    reqwest::Client::builder()
        // The API refuses clients that do not say who they are.
        .user_agent(concat!("llama-orch/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .build()
        .map_err(EngineError::HttpClient)
}

/// What the release API says of an archive.
#[derive(Deserialize)]
struct Release {
    assets: Vec<Asset>,
}

#[derive(Deserialize)]
struct Asset {
    name: String,
    digest: Option<String>,
}

async fn published_digest(
    client: &reqwest::Client,
    config: &EngineConfig,
    archive: &str,
) -> Result<Digest, EngineError> {
    let version = config.version.clone();
    let url = format!("{}/{version}", config.release.api_url.trim_end_matches('/'));
    let request = client.get(&url).timeout(LIST_TIMEOUT);
    let list = async {
        request
            .send()
            .await?
            .error_for_status()?
            .json::<Release>()
            .await
    };
    let release = list.await.map_err(|source| EngineError::ReleaseList {
        version: version.clone(),
        url: download::display_url(&url),
        source: source.without_url(),
    })?;
    let asset = release
        .assets
        .into_iter()
        .find(|asset| asset.name == archive);
    asset
        .and_then(|asset| asset.digest?.parse().ok())
        .ok_or(EngineError::NoDigest {
            version,
            archive: archive.to_owned(),
        })
}

async fn fetch(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
    client: &reqwest::Client,
    archive: &str,
    digest: Digest,
) -> Result<PathBuf, EngineError> {
    let base = config.release.base_url.trim_end_matches('/');
    let url = format!("{base}/{}/{archive}", config.version);
    let downloads = provisioner.cache.downloads();
    create_dir_all(&downloads)?;
    // Named after the digest: parts of different files never mix.
    let part = downloads.join(format!("{}.part", digest.hex()));
    let request = Download {
        expected_digest: Some(digest),
        attempts: 3,
        rate: RateLimit::shared("engines", config.max_download_rate),
        ..Download::new(&url, &part)
    };
    let what = format!("fetching {archive}");
    let mut step = Step::start(
        &provisioner.reporter,
        StepKind::EngineProvision,
        what,
        Unit::Bytes,
        None,
    );
    let failed = |source: DownloadError| EngineError::Download {
        what: archive.to_owned(),
        source,
    };
    let fetched = download::fetch(client, request, &mut step)
        .await
        .map_err(failed)?;
    step.finish();
    Ok(fetched.path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_named_as_llama_cpp_names_them() {
        let name = |accelerator, arch| archive_name("b1", accelerator, "linux", arch).ok();
        assert_eq!(
            name(Accelerator::Cpu, "x86_64").as_deref(),
            Some("llama-b1-bin-ubuntu-x64.tar.gz")
        );
        assert_eq!(
            name(Accelerator::Vulkan, "aarch64").as_deref(),
            Some("llama-b1-bin-ubuntu-vulkan-arm64.tar.gz")
        );
        assert_eq!(name(Accelerator::Cuda, "x86_64"), None);
        assert_eq!(name(Accelerator::Cpu, "riscv64"), None);
    }

    #[test]
    fn a_named_archive_is_taken_at_its_word() {
        let mut config = EngineConfig::default();
        config.release.archive = Some("llama-b1-bin-ubuntu-cuda-13.4-x64.tar.gz".into());
        let (_, recipe) = choose(&config, &Gpu::default()).unwrap();
        assert_eq!(recipe.accelerator, Accelerator::Cuda);
        config.accelerator = AcceleratorChoice::Cpu;
        assert!(choose(&config, &Gpu::default()).is_err());
        config.release.archive = Some("../x.tar.gz".into());
        assert!(choose(&config, &Gpu::default()).is_err());
    }
}
