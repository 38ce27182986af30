//! What this machine has: programs, compiler, CPU features, GPU, distribution.

pub mod distribution;

use std::env;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use provision_kit::process::{self, CommandSpec};

use crate::run::environment::is_unwanted;

/// Longest that a program may take to say its version.
pub(crate) const VERSION_LIMIT: Duration = Duration::from_secs(20);

/// A program that was found, and what it says about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    pub path: PathBuf,
    /// The line that names its version.
    pub version: String,
}

/// Where PATH finds a program.
pub fn find_on_path(name: &str) -> Option<PathBuf> {
    let directories = env::var_os("PATH")?;
    env::split_paths(&directories)
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(name))
        .find(|path| is_executable(path))
}

pub fn is_executable(path: &Path) -> bool {
    path.metadata()
        .is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
}

/// Finds a program and asks for its version. A program that does not answer `--version` with
/// success is as good as not there: some are wrappers for a thing that is not installed.
pub async fn probe(name: &str) -> Option<Program> {
    let path = find_on_path(name)?;
    let version = version_line(&path).await?;
    Some(Program { path, version })
}

async fn version_line(path: &Path) -> Option<String> {
    let output = process::output(CommandSpec::new(path).arg("--version"), VERSION_LIMIT)
        .await
        .ok()?;
    if !output.status.success() {
        return None;
    }
    let lines = || {
        output
            .stdout
            .lines()
            .chain(output.stderr.lines())
            .map(str::trim)
    };
    // nvcc names its version in a later line.
    lines()
        .find(|line| line.starts_with("Cuda compilation tools"))
        .or_else(|| lines().find(|line| !line.is_empty()))
        .map(str::to_owned)
}

/// The C++ compiler that CMake will choose: `$CXX`, then `c++`, `g++`, `clang++`.
pub async fn compiler() -> Option<Program> {
    let named = env::var("CXX").ok().filter(|name| !name.trim().is_empty());
    if let Some(name) = named {
        // It may carry flags, and may be a path, which PATH is not searched for.
        let word = name.split_whitespace().next()?.to_owned();
        let path = if word.contains('/') {
            PathBuf::from(&word)
        } else {
            find_on_path(&word)?
        };
        let version = version_line(&path).await?;
        return Some(Program { path, version });
    }
    for name in ["c++", "g++", "clang++"] {
        if let Some(program) = probe(name).await {
            return Some(program);
        }
    }
    None
}

/// The CPU's architecture and the instruction sets that a compiler uses by itself, in one line. A
/// build for the native CPU runs only where all of these are there.
pub fn cpu_features() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = format!("{} {}", env::consts::ARCH, parse_cpu_features(&info));
    instruction_sets(&line)
        .into_iter()
        .collect::<Vec<_>>()
        .join(" ")
}

/// The words of a line of features that say what code may run, the architecture first. x86's flags
/// also speak of virtual machines, mitigations and power: a new kernel or microcode changes those,
/// and no engine is worse for it.
pub(crate) fn instruction_sets(line: &str) -> Vec<&str> {
    let mut words = line.split_whitespace();
    let architecture = words.next();
    let x86 = matches!(architecture, Some("x86_64" | "x86"));
    architecture
        .into_iter()
        .chain(words.filter(|word| !x86 || is_x86_instruction_set(word)))
        .collect()
}

fn is_x86_instruction_set(flag: &str) -> bool {
    const FAMILIES: [&str; 6] = ["sse", "avx", "amx_", "bmi", "fma", "movdir"];
    const OTHERS: [&str; 17] = [
        "pni",
        "ssse3",
        "cx16",
        "popcnt",
        "abm",
        "movbe",
        "lahf_lm",
        "f16c",
        "aes",
        "vaes",
        "pclmulqdq",
        "vpclmulqdq",
        "gfni",
        "adx",
        "xop",
        "tbm",
        "3dnowprefetch",
    ];
    FAMILIES.iter().any(|family| flag.starts_with(family)) || OTHERS.contains(&flag)
}

/// Whether code for the first line's CPU runs on the second line's.
pub(crate) fn runs_on(built_for: &str, here: &str) -> bool {
    let (built_for, here) = (instruction_sets(built_for), instruction_sets(here));
    built_for.first() == here.first() && built_for.iter().all(|word| here.contains(word))
}

/// Our environment's variables that change what CMake and a compiler make, as `NAME=value`, sorted.
/// What is kept from them is none of these: it may be a secret, and this goes into manifests.
pub(crate) fn build_environment() -> Vec<String> {
    let mut set: Vec<String> = env::vars_os()
        .filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            let value = value.to_string_lossy();
            (changes_builds(&name) && !is_unwanted(&name) && !value.is_empty())
                .then(|| format!("{name}={value}"))
        })
        .collect();
    set.sort();
    set
}

/// `CXX` is not among them: what it names is asked for its version.
fn changes_builds(name: &str) -> bool {
    const NAMES: [&str; 9] = [
        "CC",
        "CFLAGS",
        "CPPFLAGS",
        "CXXFLAGS",
        "LDFLAGS",
        "CUDACXX",
        "CUDAFLAGS",
        "CUDAARCHS",
        "CUDAHOSTCXX",
    ];
    // How many compile at once, and how much is said, changes nothing that is made.
    const HARMLESS: [&str; 4] = [
        "CMAKE_BUILD_PARALLEL_LEVEL",
        "CMAKE_COLOR_DIAGNOSTICS",
        "CMAKE_EXPORT_COMPILE_COMMANDS",
        "CMAKE_GENERATOR",
    ];
    NAMES.contains(&name) || (name.starts_with("CMAKE_") && !HARMLESS.contains(&name))
}

/// The first CPU's features, sorted. x86 calls them `flags`, ARM `Features`, RISC-V `isa`.
fn parse_cpu_features(info: &str) -> String {
    let mut features: Vec<&str> = info
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| matches!(key.trim(), "flags" | "Features" | "isa"))
        .map(|(_, value)| value.split_whitespace().collect())
        .unwrap_or_default();
    features.sort_unstable();
    features.dedup();
    features.join(" ")
}

/// What there is to compute on beside the CPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gpu {
    /// The version of NVIDIA's kernel driver, where it is loaded.
    pub nvidia_driver: Option<String>,
    pub nvcc: Option<Program>,
    /// Compiles Vulkan shaders: needed to build, not to run.
    pub glslc: Option<Program>,
    /// The headers of the Vulkan loader are installed.
    pub vulkan_headers: bool,
    /// A GPU that Mesa or another driver serves is there.
    pub render_node: bool,
    /// The Vulkan loader and a driver description are installed.
    pub vulkan_runtime: bool,
}

impl Gpu {
    pub async fn probe() -> Self {
        let (nvcc, glslc) = tokio::join!(nvcc(), probe("glslc"));
        let exists = |path: &str| Path::new(path).exists();
        Self {
            nvidia_driver: nvidia_driver(),
            nvcc,
            glslc,
            vulkan_headers: exists("/usr/include/vulkan/vulkan.h")
                || exists("/usr/local/include/vulkan/vulkan.h"),
            render_node: has_entries("/dev/dri", "renderD"),
            vulkan_runtime: has_entries("/usr/share/vulkan/icd.d", "")
                || has_entries("/etc/vulkan/icd.d", ""),
        }
    }

    /// What files alone say about the devices and their drivers, as one line to compare.
    pub(crate) fn by_files() -> String {
        format!(
            "nvidia={} render={} vulkan={}",
            nvidia_driver().unwrap_or_default(),
            has_entries("/dev/dri", "renderD"),
            has_entries("/usr/share/vulkan/icd.d", "") || has_entries("/etc/vulkan/icd.d", "")
        )
    }

    /// Whether what [`Self::by_files`] says names a device.
    pub(crate) fn may_be_there(by_files: &str) -> bool {
        !by_files.starts_with("nvidia= render=false ")
    }

    pub fn can_build_cuda(&self) -> bool {
        self.nvcc.is_some() && self.nvidia_driver.is_some()
    }

    pub fn can_build_vulkan(&self) -> bool {
        self.glslc.is_some() && self.vulkan_headers && self.can_run_vulkan()
    }

    pub fn can_run_vulkan(&self) -> bool {
        self.vulkan_runtime && (self.render_node || self.nvidia_driver.is_some())
    }
}

fn nvidia_driver() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    parse_driver_version(&text)
}

/// Whether a card of NVIDIA's is there, with a driver or without.
pub(crate) fn has_nvidia_card() -> bool {
    nvidia_card(Path::new("/sys/bus/pci/devices"))
}

/// Whether a PCI bus has a display controller of NVIDIA's.
fn nvidia_card(devices: &Path) -> bool {
    let entries = std::fs::read_dir(devices).into_iter().flatten();
    let mut devices = entries.filter_map(Result::ok).map(|entry| entry.path());
    devices.any(|device| {
        let is = |file: &str, wanted: &str| {
            let text = std::fs::read_to_string(device.join(file));
            text.is_ok_and(|text| text.starts_with(wanted))
        };
        is("vendor", "0x10de") && is("class", "0x03")
    })
}

/// Arch and NVIDIA's own packages install nvcc where PATH does not look.
async fn nvcc() -> Option<Program> {
    if let Some(program) = probe("nvcc").await {
        return Some(program);
    }
    for path in ["/usr/local/cuda/bin/nvcc", "/opt/cuda/bin/nvcc"] {
        let path = PathBuf::from(path);
        if is_executable(&path)
            && let Some(version) = version_line(&path).await
        {
            return Some(Program { path, version });
        }
    }
    None
}

/// The first word of the driver's line that looks like a version.
fn parse_driver_version(text: &str) -> Option<String> {
    let line = text.lines().find(|line| line.contains("NVRM"))?;
    let looks_right =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(looks_right).map(str::to_owned)
}

fn has_entries(directory: &str, prefix: &str) -> bool {
    std::fs::read_dir(directory).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_is_known_by_vendor_and_class() {
        let dir = tempfile::tempdir().unwrap();
        let device = |name: &str, vendor: &str, class: &str| {
            let device = dir.path().join(name);
            std::fs::create_dir(&device).unwrap();
            std::fs::write(device.join("vendor"), vendor).unwrap();
            std::fs::write(device.join("class"), class).unwrap();
        };
        device("0000:00:02.0", "0x8086\n", "0x030000\n");
        // Its network adapters are no cards to compute on.
        device("0000:01:00.0", "0x10de\n", "0x020000\n");
        assert!(!nvidia_card(dir.path()));
        device("0000:02:00.0", "0x10de\n", "0x030200\n");
        assert!(nvidia_card(dir.path()));
        assert!(!nvidia_card(&dir.path().join("no-such-bus")));
    }

    #[test]
    fn features_do_not_depend_on_their_order() {
        let x86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: sse avx fpu\nprocessor\t: 1\nflags\t\t: other\n";
        assert_eq!(parse_cpu_features(x86), "avx fpu sse");
        assert_eq!(parse_cpu_features("Features\t: fp asimd\n"), "asimd fp");
        assert_eq!(parse_cpu_features(""), "");
    }

    #[test]
    fn code_runs_where_its_instruction_sets_are() {
        let built_for = "x86_64 aes avx avx2 hypervisor fma rtm sse4_2 md_clear";
        // A new kernel says more, new microcode takes a mitigation's flags away.
        assert!(runs_on(
            built_for,
            "x86_64 aes avx avx2 avx512f fma sse4_2 ibrs_enhanced"
        ));
        assert!(!runs_on(built_for, "x86_64 aes avx fma sse4_2"));
        assert!(!runs_on("x86_64 avx", "aarch64 avx"));
        assert!(!runs_on("aarch64 asimd sve", "aarch64 asimd"));
        let here = cpu_features();
        assert!(runs_on(&here, &here));
        assert!(here.starts_with(env::consts::ARCH), "{here}");
    }

    #[test]
    fn what_changes_a_build_is_told_from_what_does_not() {
        for name in ["CXXFLAGS", "CC", "CMAKE_TOOLCHAIN_FILE", "LDFLAGS"] {
            assert!(changes_builds(name), "{name}");
        }
        for name in ["CXX", "PATH", "CMAKE_BUILD_PARALLEL_LEVEL", "CMAKEX"] {
            assert!(!changes_builds(name), "{name}");
        }
    }

    #[test]
    fn the_drivers_version_is_found() {
        let text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version:  gcc 14.2.0\n";
        assert_eq!(parse_driver_version(text).as_deref(), Some("580.95.05"));
        assert_eq!(parse_driver_version("nothing"), None);
    }

    #[tokio::test]
    async fn programs_are_found_or_not() {
        assert!(find_on_path("sh").is_some());
        assert_eq!(probe("no-such-program-here").await, None);
        // `false --version` says its version and fails, or says nothing: not a usable program.
        assert_eq!(version_line(Path::new("/nowhere/x")).await, None);
    }
}
