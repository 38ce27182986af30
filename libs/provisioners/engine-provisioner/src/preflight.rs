//! What this machine has for providing an engine, and what it lacks.

use std::fmt;
use std::path::{Path, PathBuf};

use provision_kit::fs::free_space;
use provision_kit::pip::Pip;
use serde::Serialize;

use crate::machine::distribution::{Distribution, Need};
use crate::machine::{self, Gpu, Program};
use crate::provide::BUILD_SPACE;
use crate::provide::tools;

/// One thing looked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    pub name: &'static str,
    pub state: CheckState,
    /// Whether a build from source cannot do without it.
    pub required: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckState {
    Found {
        /// Where, if it is a file.
        path: Option<PathBuf>,
        /// Its version, or what was found out.
        details: String,
    },
    Missing {
        /// What is missing, in words.
        details: String,
        /// What to do about it on this machine.
        remedy: String,
    },
}

/// Everything looked for, in the order to show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Preflight {
    pub checks: Vec<Check>,
}

impl Preflight {
    /// Whether an engine can be built from source here.
    pub fn can_build(&self) -> bool {
        self.checks
            .iter()
            .all(|check| !check.required || matches!(check.state, CheckState::Found { .. }))
    }
}

impl fmt::Display for Preflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            match &check.state {
                CheckState::Found { path, details } => {
                    write!(f, "found    {}: {details}", check.name)?;
                    if let Some(path) = path {
                        write!(f, " ({})", path.display())?;
                    }
                    writeln!(f)?;
                }
                CheckState::Missing { details, remedy } => {
                    let word = if check.required {
                        "MISSING "
                    } else {
                        "without "
                    };
                    writeln!(f, "{word} {}: {details}; {remedy}", check.name)?;
                }
            }
        }
        Ok(())
    }
}

/// Looks at this machine. `cache` is the cache directory, whose disk must hold the build;
/// `allow_package_installs` says whether a missing cmake or ninja can come from PyPI.
pub async fn preflight(
    cache: &provision_kit::dirs::CacheDirs,
    allow_package_installs: bool,
) -> Preflight {
    let distribution = Distribution::here();
    let (compiler, cmake, ninja, pip, gpu) = tokio::join!(
        machine::compiler(),
        tools::find(cache, &tools::CMAKE),
        tools::find(cache, &tools::NINJA),
        Pip::find(),
        Gpu::probe(),
    );
    let pip_found = pip.is_ok();
    let tool = |name, need, program: Option<Program>| {
        let mut check = check(name, need, program, distribution, true);
        if let CheckState::Missing { remedy, .. } = &mut check.state
            && allow_package_installs
            && pip_found
        {
            *remedy = format!(
                "it will be installed from PyPI into the cache directory ({remedy} to have it for good)"
            );
            check.required = false;
        }
        check
    };
    let mut checks = vec![
        check("C++ compiler", Need::Compiler, compiler, distribution, true),
        tool("cmake", Need::Cmake, cmake),
        tool("ninja", Need::Ninja, ninja),
        Check {
            name: "pip",
            required: true,
            state: match pip {
                Ok(pip) => CheckState::Found {
                    path: None,
                    details: pip.command(),
                },
                Err(error) => CheckState::Missing {
                    details: error.to_string(),
                    remedy: distribution.install_command(Need::Pip),
                },
            },
        },
    ];
    checks.extend(gpu_checks(gpu, distribution));
    checks.push(space_check(cache.root()));
    Preflight { checks }
}

fn check(
    name: &'static str,
    need: Need,
    program: Option<Program>,
    distribution: Distribution,
    required: bool,
) -> Check {
    let state = match program {
        Some(program) => CheckState::Found {
            path: Some(program.path),
            details: program.version,
        },
        None => CheckState::Missing {
            details: "not found".to_owned(),
            remedy: distribution.install_command(need),
        },
    };
    Check {
        name,
        state,
        required,
    }
}

fn gpu_checks(gpu: Gpu, distribution: Distribution) -> Vec<Check> {
    let vulkan = gpu.can_build_vulkan();
    let vulkan = if vulkan {
        CheckState::Found {
            path: gpu.glslc.map(|program| program.path),
            details: "loader, headers, glslc and a device".to_owned(),
        }
    } else {
        CheckState::Missing {
            details: "loader, headers, glslc or a device is missing".to_owned(),
            remedy: format!("for a GPU: {}", distribution.install_command(Need::Vulkan)),
        }
    };
    let vulkan = Check {
        name: "Vulkan",
        state: vulkan,
        required: false,
    };
    let mut checks = nvidia_checks(gpu.nvidia_driver, gpu.nvcc, distribution);
    checks.push(vulkan);
    checks
}

/// Only where they are of use: without a card nothing of it is missing.
fn nvidia_checks(
    driver: Option<String>,
    nvcc: Option<Program>,
    distribution: Distribution,
) -> Vec<Check> {
    if driver.is_none() && nvcc.is_none() && !machine::has_nvidia_card() {
        return Vec::new();
    }
    let driver = match driver {
        Some(version) => CheckState::Found {
            path: None,
            details: version,
        },
        None => CheckState::Missing {
            details: "not loaded".to_owned(),
            remedy: distribution.install_command(Need::NvidiaDriver),
        },
    };
    vec![
        check("nvcc", Need::Nvcc, nvcc, distribution, false),
        Check {
            name: "NVIDIA driver",
            state: driver,
            required: false,
        },
    ]
}

fn space_check(path: &Path) -> Check {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let state = match free_space(path) {
        Ok(free) if free >= BUILD_SPACE => CheckState::Found {
            path: Some(path.to_owned()),
            details: format!("{:.1} GiB free", gib(free)),
        },
        Ok(free) => CheckState::Missing {
            details: format!(
                "{:.1} GiB free, {:.1} GiB needed",
                gib(free),
                gib(BUILD_SPACE)
            ),
            remedy: "free some space, or set `cache_dir` to a larger disk".to_owned(),
        },
        Err(error) => CheckState::Missing {
            details: error.to_string(),
            remedy: "set `cache_dir` to a directory of your own".to_owned(),
        },
    };
    Check {
        name: "disk space",
        state,
        required: true,
    }
}
