//! Looks at processes through `/proc`: who belongs to this run, what they
//! hold, and whether anybody is left.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A process, told apart from a later one with the same number.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Process {
    pub pid: u32,
    /// In clock ticks since the machine started.
    pub begun: u64,
    pub parent: u32,
    pub name: String,
}

impl Process {
    /// `None` if there is no such process, or if it only awaits reaping.
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold any character.
        let (head, rest) = stat.rsplit_once(") ")?;
        let name = head.split_once('(')?.1.to_owned();
        let fields: Vec<&str> = rest.split(' ').collect();
        let state = *fields.first()?;
        let process = Self {
            pid,
            begun: fields.get(19)?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            name,
        };
        (!matches!(state, "Z" | "X")).then_some(process)
    }

    pub fn lives(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.begun == self.begun)
    }

    pub fn executable(&self) -> Option<PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.pid)).ok()
    }

    /// Whether it was told to listen, as a serving engine is.
    pub fn serves(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.pid))
            .is_ok_and(|bytes| bytes.split(|byte| *byte == 0).any(|part| part == b"--port"))
    }

    fn bears(&self, mark: &str) -> bool {
        let holds = |file: &str| {
            fs::read(format!("/proc/{}/{file}", self.pid)).is_ok_and(|bytes| {
                bytes
                    .windows(mark.len())
                    .any(|part| part == mark.as_bytes())
            })
        };
        holds("environ") || holds("cmdline")
    }
}

pub fn all() -> Vec<Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Process::of(entry.file_name().to_str()?.parse().ok()?))
        .collect()
}

/// Everything below a process, without itself.
pub fn descendants(of: u32) -> Vec<Process> {
    let all = all();
    let mut known = HashSet::from([of]);
    let mut found = Vec::new();
    loop {
        let before = found.len();
        for process in &all {
            if known.contains(&process.parent) && known.insert(process.pid) {
                found.push(process.clone());
            }
        }
        if found.len() == before {
            return found;
        }
    }
}

/// Processes whose environment or command line holds the mark of this run.
pub fn marked(mark: &str) -> Vec<Process> {
    let own = std::process::id();
    let mut all = all();
    all.retain(|process| process.pid != own && process.bears(mark));
    all
}

/// Open file descriptors.
pub fn descriptors(pid: u32) -> Option<usize> {
    Some(fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count())
}

/// Memory that is in use and not shared with others, in KiB.
pub fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Which of these ports something listens on, over IPv4 loopback or all
/// addresses.
pub fn listening(ports: &BTreeSet<u16>) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let table = fs::read_to_string("/proc/net/tcp").unwrap_or_default();
    let local_port = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let port = fields.get(1)?.split_once(':')?.1;
        (fields.get(3) == Some(&LISTEN)).then(|| u16::from_str_radix(port, 16).ok())?
    };
    let open = table.lines().skip(1).filter_map(local_port);
    open.filter(|port| ports.contains(port)).collect()
}

/// All files below a directory, by their paths within it.
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    fn collect(root: &Path, directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.is_dir() {
                collect(root, &path, found);
            } else if let Ok(within) = path.strip_prefix(root) {
                found.push(within.to_owned());
            }
        }
    }
    let mut found = Vec::new();
    collect(directory, directory, &mut found);
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_child_is_found_by_descent_and_by_mark_until_it_is_gone() {
        let mark = format!("chaos-mark-{}", std::process::id());
        let mut child = Command::new("sleep")
            .arg("100")
            .env("CHAOS_TEST_MARK", &mark)
            .spawn()
            .unwrap();
        let process = Process::of(child.id()).unwrap();
        assert!(descendants(std::process::id()).contains(&process));
        // The environment is the child's own only once it runs its program.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !marked(&mark).contains(&process) {
            assert!(std::time::Instant::now() < deadline, "never seen marked");
        }
        assert!(process.lives());
        child.kill().unwrap();
        let _ = child.wait();
        assert!(!process.lives());
        assert!(marked(&mark).is_empty());
    }

    #[test]
    fn a_listening_port_is_seen() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let ports = BTreeSet::from([port]);
        assert_eq!(listening(&ports), [port]);
        assert!(descriptors(std::process::id()).unwrap() > 2);
        assert!(resident_kib(std::process::id()).unwrap() > 100);
    }
}
