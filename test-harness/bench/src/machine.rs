//! What the figures were measured on and with.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::place::on_path;

/// The CPU, its cores and the kernel.
pub fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{cores} cores of {}, Linux {}", cpu(&info), kernel.trim())
}

fn cpu(info: &str) -> &str {
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    model
        .and_then(|line| line.split_once(':'))
        .map_or("an unknown CPU", |(_, name)| name.trim())
}

/// nginx's version, where it is installed.
pub fn nginx() -> Option<String> {
    let output = Command::new(on_path("nginx")?).arg("-v").output().ok()?;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let version = text.trim().rsplit('/').next()?;
    Some(version.to_owned())
}

/// What a real engine says of its build.
pub fn engine(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = [output.stderr, output.stdout].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    let line = text.lines().find(|line| line.starts_with("version"))?;
    Some(line.trim_start_matches("version:").trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_named() {
        assert_eq!(cpu("processor: 0\nmodel name\t: A B\nx: y\n"), "A B");
        assert_eq!(cpu(""), "an unknown CPU");
        assert!(machine().contains("Linux"));
    }
}
