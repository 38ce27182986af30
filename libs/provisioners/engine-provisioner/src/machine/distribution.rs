//! Which Linux distribution this is, and how it installs things.

use std::fs;

/// Families of distributions, by their package manager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Distribution {
    /// Debian, Ubuntu and theirs.
    Apt,
    /// Arch, CachyOS, Manjaro and theirs.
    Pacman,
    /// Fedora, RHEL and theirs.
    Dnf,
    /// openSUSE and theirs.
    Zypper,
    Unknown,
}

/// Something that building an engine needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    Compiler,
    Cmake,
    Ninja,
    Pip,
    Git,
    Nvcc,
    NvidiaDriver,
    Vulkan,
}

impl Distribution {
    /// Reads what this machine says about itself.
    pub fn here() -> Self {
        ["/etc/os-release", "/usr/lib/os-release"]
            .iter()
            .find_map(|path| fs::read_to_string(path).ok())
            .map_or(Self::Unknown, |text| Self::parse(&text))
    }

    fn parse(os_release: &str) -> Self {
        let value = |key: &str| {
            os_release
                .lines()
                .filter_map(|line| line.split_once('='))
                .find(|(name, _)| name.trim() == key)
                .map(|(_, value)| value.trim().trim_matches(['"', '\'']).to_ascii_lowercase())
                .unwrap_or_default()
        };
        let (id, like) = (value("ID"), value("ID_LIKE"));
        std::iter::once(id.as_str())
            .chain(like.split_whitespace())
            .find_map(Self::by_name)
            .unwrap_or(Self::Unknown)
    }

    fn by_name(name: &str) -> Option<Self> {
        Some(match name {
            "debian" | "ubuntu" | "linuxmint" | "pop" | "raspbian" => Self::Apt,
            "arch" | "cachyos" | "manjaro" | "endeavouros" | "archarm" => Self::Pacman,
            "fedora" | "rhel" | "centos" | "rocky" | "almalinux" => Self::Dnf,
            "suse" | "opensuse" | "opensuse-tumbleweed" | "opensuse-leap" => Self::Zypper,
            _ => return None,
        })
    }

    /// The command that installs something, to be shown to a person.
    pub fn install_command(self, need: Need) -> String {
        let (apt, pacman, dnf, zypper, words) = match need {
            Need::Compiler => (
                "build-essential",
                "base-devel",
                "gcc gcc-c++ make",
                "gcc gcc-c++ make",
                "a C and C++ compiler (gcc or clang)",
            ),
            Need::Cmake => ("cmake", "cmake", "cmake", "cmake", "cmake 3.14 or later"),
            Need::Ninja => ("ninja-build", "ninja", "ninja-build", "ninja", "ninja"),
            Need::Pip => (
                "python3-pip",
                "python-pip",
                "python3-pip",
                "python3-pip",
                "Python 3 with pip",
            ),
            Need::Git => ("git", "git", "git", "git", "git"),
            Need::Nvcc => (
                "nvidia-cuda-toolkit",
                "cuda",
                "cuda-toolkit",
                "cuda-toolkit",
                "NVIDIA's CUDA toolkit",
            ),
            Need::NvidiaDriver => (
                "nvidia-driver",
                "nvidia-open",
                "akmod-nvidia",
                "nvidia-open-driver-G06",
                "NVIDIA's driver",
            ),
            Need::Vulkan => (
                "libvulkan-dev glslc spirv-headers",
                "vulkan-headers vulkan-icd-loader shaderc spirv-headers",
                "vulkan-headers vulkan-loader-devel glslc spirv-headers-devel",
                "vulkan-headers vulkan-devel shaderc spirv-headers",
                "the Vulkan headers and loader, SPIR-V headers and glslc",
            ),
        };
        match self {
            Self::Apt => format!("sudo apt-get install {apt}"),
            Self::Pacman => format!("sudo pacman -S --needed {pacman}"),
            Self::Dnf => format!("sudo dnf install {dnf}"),
            Self::Zypper => format!("sudo zypper install {zypper}"),
            Self::Unknown => format!("install {words} with this system's package manager"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distributions_are_told_by_name_or_by_likeness() {
        for (text, expected) in [
            ("NAME=\"Debian\"\nID=debian\n", Distribution::Apt),
            ("ID=cachyos\nID_LIKE=arch\n", Distribution::Pacman),
            (
                "ID=\"somearch\"\nID_LIKE=\"arch linux\"\n",
                Distribution::Pacman,
            ),
            ("ID='fedora'\n", Distribution::Dnf),
            (
                "ID=nobara\nID_LIKE=\"rhel centos fedora\"\n",
                Distribution::Dnf,
            ),
            ("ID=\"opensuse-tumbleweed\"\n", Distribution::Zypper),
            ("ID=nixos\n", Distribution::Unknown),
            ("", Distribution::Unknown),
        ] {
            assert_eq!(Distribution::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn each_distribution_gets_its_command() {
        assert_eq!(
            Distribution::Pacman.install_command(Need::Ninja),
            "sudo pacman -S --needed ninja"
        );
        assert_eq!(
            Distribution::Apt.install_command(Need::Compiler),
            "sudo apt-get install build-essential"
        );
        assert!(
            Distribution::Unknown
                .install_command(Need::Pip)
                .contains("Python 3")
        );
    }
}
