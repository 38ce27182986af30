//! What processes have used: CPU time and memory, with their children.

use std::fs;

use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::Pid;

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

/// The name of a process's program, cut to 15 bytes by the kernel.
pub fn name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim().to_owned()
}

/// CPU seconds used so far by all threads of these processes, in user and
/// kernel mode, as exactly as the kernel's scheduler counts them.
pub fn cpu_seconds(pids: &[u32]) -> f64 {
    pids.iter().filter_map(|pid| cpu_of(*pid)).sum()
}

fn cpu_of(pid: u32) -> Option<f64> {
    let clock: ClockId = clock_getcpuclockid(Pid::from_raw(pid.cast_signed())).ok()?;
    let time = clock_gettime(clock).ok()?;
    Some(time.tv_sec() as f64 + time.tv_nsec() as f64 / 1e9)
}

/// The largest resident memory that a process has had since [`forget_peak`]
/// or since its start, in bytes.
pub fn peak_bytes(pid: u32) -> u64 {
    memory(pid, "VmHWM:")
}

/// Lets the peak of a process begin anew; where the kernel refuses, it stays
/// the peak since its start.
pub fn forget_peak(pid: u32) {
    const PEAK: &str = "5";
    let _ = fs::write(format!("/proc/{pid}/clear_refs"), PEAK);
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
        let before = cpu_seconds(&[own]);
        let mut sum = 0_u64;
        for step in 0..100_000_u64 {
            sum = std::hint::black_box(sum ^ step.wrapping_mul(31));
        }
        // Far less than a tick of the kernel's slow clock is seen, too.
        assert!(cpu_seconds(&[own]) > before, "{sum}");
        // The other process may not have run yet, but has a clock.
        assert!(cpu_of(child.id()).is_some());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
