//! What processes have used: CPU time and memory, with their children.

use std::fs;

/// Every process that descends from this one, itself included.
pub fn family(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while next < family.len() {
        let parent = family[next];
        next += 1;
        let threads = fs::read_dir(format!("/proc/{parent}/task"))
            .into_iter()
            .flatten();
        for thread in threads.flatten() {
            let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
            family.extend(
                children
                    .split_whitespace()
                    .filter_map(|pid| pid.parse::<u32>().ok()),
            );
        }
    }
    family
}

/// CPU seconds used so far by these processes, in user and kernel mode.
pub fn cpu_seconds(pids: &[u32]) -> f64 {
    // The kernel's clock ticks a hundred times a second for user space.
    const TICKS: f64 = 100.0;
    let ticks = pids.iter().filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let fields: Vec<&str> = stat.rsplit(") ").next()?.split(' ').collect();
        let field = |index: usize| fields.get(index)?.parse::<f64>().ok();
        Some(field(11)? + field(12)?)
    });
    ticks.sum::<f64>() / TICKS
}

/// The largest resident memory that a process has had, in bytes.
pub fn peak_bytes(pid: u32) -> u64 {
    memory(pid, "VmHWM:")
}

/// The resident memory that a process has now, in bytes.
pub fn resident_bytes(pid: u32) -> u64 {
    memory(pid, "VmRSS:")
}

fn memory(pid: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_use_is_seen() {
        let own = std::process::id();
        assert!(resident_bytes(own) > 0 && peak_bytes(own) > 0);
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        assert!(family(own).contains(&child.id()));
        assert!(cpu_seconds(&[own, child.id()]) >= 0.0);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
