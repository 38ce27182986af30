//! Mode `cache`: an engine that an earlier run built or fetched.

use std::path::PathBuf;

use provision_kit::blocking::blocking;

use super::{EngineInstallation, EngineProvisioner, build, choose_accelerator, release, source};
use crate::config::{EngineConfig, Mode};
use crate::error::{EngineError, chain};
use crate::machine::{self, Gpu};
use crate::manifest::{Manifest, Recipe};

pub(super) async fn provide(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
) -> Result<EngineInstallation, EngineError> {
    let wanted = Wanted::new(
        config,
        &Gpu::probe().await,
        &machine::cpu_features(),
        &machine::build_environment(),
    );
    let engines = provisioner.cache.engines();
    let mut found: Option<(EngineInstallation, Manifest)> = None;
    let mut broken = None;
    for directory in candidates(engines.clone(), config.version.clone()).await {
        match open(directory).await {
            Ok(Some((installation, manifest))) if wanted.accepts(&manifest.recipe) => {
                let newer = found
                    .as_ref()
                    .is_none_or(|(_, best)| manifest.built_at > best.built_at);
                if newer {
                    found = Some((installation, manifest));
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!("an engine in the cache is passed over: {}", chain(&error));
                broken = Some(error);
            }
        }
    }
    match (found, broken) {
        (Some((installation, _)), _) => Ok(installation),
        (None, Some(error)) => Err(error),
        (None, None) => Err(EngineError::NotInCache {
            version: config.version.clone(),
            accelerator: wanted.accelerator_word(),
            directory: engines,
        }),
    }
}

/// An engine that another recipe names and that this one would make again, by the same compiler: it
/// was built for a part of this CPU's features, or written down by an earlier version of ours.
pub(super) async fn equal(
    provisioner: &EngineProvisioner,
    recipe: &Recipe,
) -> Option<EngineInstallation> {
    let engines = provisioner.cache.engines();
    for directory in candidates(engines, recipe.version.clone()).await {
        match open(directory).await {
            Ok(Some((installation, manifest)))
                if manifest.recipe.compiler == recipe.compiler
                    && serves(&manifest.recipe, recipe) =>
            {
                return Some(installation);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!("an engine in the cache is passed over: {}", chain(&error));
            }
        }
    }
    None
}

/// Directories that may hold an engine of this version, in a fixed order.
async fn candidates(engines: PathBuf, version: String) -> Vec<PathBuf> {
    blocking(move || {
        let prefix = format!("{version}-");
        let mut directories: Vec<PathBuf> = std::fs::read_dir(engines)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .map(|entry| entry.path())
            .collect();
        directories.sort();
        directories
    })
    .await
}

/// Opens an engine's directory and checks its binary; `None` if it holds no engine.
pub(super) async fn open(
    directory: PathBuf,
) -> Result<Option<(EngineInstallation, Manifest)>, EngineError> {
    blocking(move || {
        let Some(manifest) = Manifest::read(&directory)? else {
            return Ok(None);
        };
        let installation = EngineInstallation {
            binary: manifest.verify(&directory)?,
            version: manifest.recipe.version.clone(),
            digest: manifest.digest,
            mode: Mode::Cache.into(),
            accelerator: manifest.recipe.accelerator,
        };
        Ok(Some((installation, manifest)))
    })
    .await
}

/// Which recipes the config stands for on this machine.
struct Wanted {
    recipes: Vec<Recipe>,
}

impl Wanted {
    fn new(config: &EngineConfig, gpu: &Gpu, features: &str, environment: &[String]) -> Self {
        let mut recipes = Vec::new();
        if let Ok(accelerator) = choose_accelerator(config, Mode::Source, gpu) {
            recipes.extend(config.source.sources.iter().map(|origin| {
                source::recipe(config, origin, accelerator, None, features, environment)
            }));
        }
        if let Ok((_, recipe)) = release::choose(config, gpu) {
            recipes.push(recipe);
        }
        Self { recipes }
    }

    fn accepts(&self, recipe: &Recipe) -> bool {
        self.recipes.iter().any(|wanted| serves(recipe, wanted))
    }

    fn accelerator_word(&self) -> &'static str {
        self.recipes
            .first()
            .map_or("any accelerator", |recipe| recipe.accelerator.as_str())
    }
}

/// Whether a built engine is as good as the one that would be built now. Which compiler built it
/// makes no difference to what it does, so an upgrade of the compiler costs no build; and it runs
/// wherever the instruction sets are that it was built for.
fn serves(built: &Recipe, wanted: &Recipe) -> bool {
    let runs_here = match (&built.cpu_features, &wanted.cpu_features) {
        (Some(built_for), Some(here)) => machine::runs_on(built_for, here),
        (built_for, here) => built_for == here,
    };
    runs_here && without_compiler(built) == without_compiler(wanted)
}

fn without_compiler(recipe: &Recipe) -> Recipe {
    let mut recipe = recipe.clone();
    recipe.compiler = None;
    recipe.cpu_features = None;
    recipe
        .options
        .retain(|option| !build::is_for_compiler(option));
    recipe.environment.retain(|set| !set.starts_with("CC="));
    recipe
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: &str = "x86_64 aes avx avx2 avx512f fma sse4_2";

    fn wanted(features: &str, environment: &[&str]) -> Wanted {
        let environment: Vec<String> = environment.iter().map(|&set| set.to_owned()).collect();
        let config = EngineConfig::default();
        Wanted::new(&config, &Gpu::default(), features, &environment)
    }

    fn built(change: impl FnOnce(&mut Recipe)) -> Recipe {
        let mut recipe = wanted(HERE, &[]).recipes.remove(0);
        change(&mut recipe);
        recipe
    }

    #[test]
    fn another_compiler_is_no_reason_to_build_again() {
        let of = |compiler: &str| built(|recipe| recipe.compiler = Some(compiler.into()));
        for compiler in ["c++ 12", "c++ 13"] {
            assert!(wanted(HERE, &[]).accepts(&of(compiler)), "{compiler}");
        }
        assert!(wanted(HERE, &["CC=gcc-12"]).accepts(&of("c++ 12")));
        let without_amx = built(|recipe| {
            let option = "-DCMAKE_C_FLAGS=-mno-amx-tile -mno-amx-int8 -mno-amx-bf16";
            recipe.options.push(option.into());
        });
        assert!(wanted(HERE, &[]).accepts(&without_amx));
    }

    #[test]
    fn an_engine_for_a_smaller_cpu_is_taken_and_one_for_a_larger_is_not() {
        let built_for =
            |features: &str| built(|recipe| recipe.cpu_features = Some(features.into()));
        let wanted = wanted(HERE, &[]);
        assert!(wanted.accepts(&built_for("x86_64 avx avx2 fma sse4_2")));
        // As an earlier version wrote it down: with all of the kernel's flags.
        assert!(wanted.accepts(&built_for("x86_64 apic avx avx2 hypervisor rtm sse4_2 tsc")));
        assert!(!wanted.accepts(&built_for("x86_64 avx avx2 amx_tile")));
        assert!(!wanted.accepts(&built_for("aarch64 asimd")));
    }

    #[test]
    fn other_options_and_other_flags_are_another_engine() {
        let other = built(|recipe| recipe.options.push("-DGGML_CUDA=ON".into()));
        assert!(!wanted(HERE, &[]).accepts(&other));
        assert!(!wanted(HERE, &["CXXFLAGS=-O1"]).accepts(&built(|_| ())));
        let with_flags = built(|recipe| recipe.environment = vec!["CXXFLAGS=-O1".into()]);
        assert!(wanted(HERE, &["CXXFLAGS=-O1"]).accepts(&with_flags));
    }
}
