//! Mode `cache`: an engine that an earlier run built or fetched.

use std::path::PathBuf;

use super::{EngineInstallation, EngineProvisioner, blocking, choose_accelerator, release, source};
use crate::config::{EngineConfig, Mode};
use crate::error::{EngineError, chain};
use crate::machine::{self, Gpu};
use crate::manifest::{Manifest, Recipe};

pub(super) async fn provide(
    provisioner: &EngineProvisioner,
    config: &EngineConfig,
) -> Result<EngineInstallation, EngineError> {
    let (gpu, compiler) = tokio::join!(Gpu::probe(), machine::compiler());
    let wanted = Wanted::new(
        config,
        &gpu,
        compiler.as_ref().map(|program| program.version.as_str()),
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
    /// Without a compiler none could be told apart by it: an engine that was built when there was
    /// one is still good.
    any_compiler: bool,
}

impl Wanted {
    fn new(config: &EngineConfig, gpu: &Gpu, compiler: Option<&str>) -> Self {
        let mut recipes = Vec::new();
        if let Ok(accelerator) = choose_accelerator(config, Mode::Source, gpu) {
            let features = machine::cpu_features();
            recipes.extend(config.source.sources.iter().map(|origin| {
                source::recipe(
                    config,
                    origin,
                    accelerator,
                    compiler.map(str::to_owned),
                    &features,
                )
            }));
        }
        if let Ok((_, recipe)) = release::choose(config, gpu) {
            recipes.push(recipe);
        }
        Self {
            recipes,
            any_compiler: compiler.is_none(),
        }
    }

    fn accepts(&self, recipe: &Recipe) -> bool {
        let mut recipe = recipe.clone();
        if !self.any_compiler {
            return self.recipes.contains(&recipe);
        }
        // Options depend on the compiler too; what else they say, the rest of a recipe says.
        recipe.compiler = None;
        recipe.options.clear();
        let mut wanted = self.recipes.iter().cloned();
        wanted.any(|wanted| {
            Recipe {
                options: Vec::new(),
                ..wanted
            } == recipe
        })
    }

    fn accelerator_word(&self) -> &'static str {
        self.recipes
            .first()
            .map_or("any accelerator", |recipe| recipe.accelerator.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_compiler_or_cpu_is_another_engine_but_no_compiler_is_not() {
        let config = EngineConfig::default();
        let gpu = Gpu::default();
        let with = Wanted::new(&config, &gpu, Some("c++ 12"));
        let built = with.recipes[0].clone();
        assert!(with.accepts(&built));
        assert!(!Wanted::new(&config, &gpu, Some("c++ 13")).accepts(&built));
        assert!(Wanted::new(&config, &gpu, None).accepts(&built));
        let elsewhere = Recipe {
            cpu_features: Some("other".into()),
            ..built
        };
        assert!(!with.accepts(&elsewhere));
    }
}
