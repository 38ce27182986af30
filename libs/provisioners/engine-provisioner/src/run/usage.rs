//! What a process group has used so far, by the kernel's count.

use std::fs;
use std::time::Duration;

use super::load_watch::Sample;
use super::port;

/// How `/proc` counts time on every architecture that engines are built for.
const TICKS_PER_SECOND: u64 = 100;

/// Sums over the group's processes; what the kernel does not tell counts as nothing. Blocking.
pub(super) fn of_group(group: u32) -> Sample {
    let mut sum = Sample::default();
    for pid in port::members(group) {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).ok();
        sum.read_bytes += read("io").and_then(|text| read_bytes(&text)).unwrap_or(0);
        sum.resident_bytes += read("status").and_then(|text| resident(&text)).unwrap_or(0);
        sum.cpu_time += read("stat")
            .and_then(|text| cpu_time(&text))
            .unwrap_or_default();
    }
    sum
}

/// What went through read calls, from the disk or its cache.
fn read_bytes(io: &str) -> Option<u64> {
    let line = io.lines().find_map(|line| line.strip_prefix("rchar:"))?;
    line.trim().parse().ok()
}

fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// User and system time are fields 14 and 15, counted from behind the name, which may hold
/// anything.
fn cpu_time(stat: &str) -> Option<Duration> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_millis(
        ticks.saturating_mul(1000 / TICKS_PER_SECOND),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_words_are_read() {
        assert_eq!(read_bytes("rchar: 4292\nwchar: 0\n"), Some(4292));
        assert_eq!(
            resident("VmHWM:\t  9 kB\nVmRSS:\t    1024 kB\n"),
            Some(1024 * 1024)
        );
        let stat = "42 (a) b) S 1 42 42 0 -1 4194304 1 2 3 4 150 50 7 8 20 0 1 0 987654 1 2 3";
        assert_eq!(cpu_time(stat), Some(Duration::from_secs(2)));
        assert_eq!(cpu_time("42 (sh) S"), None);
    }

    #[test]
    fn we_use_something_ourselves() {
        let group = port::group_of(std::process::id()).unwrap();
        let usage = of_group(group);
        assert!(usage.resident_bytes > 0 && usage.read_bytes > 0);
    }
}
