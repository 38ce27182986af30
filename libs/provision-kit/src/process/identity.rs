//! Which process a process id means.

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};

/// A process id alone says little: ids are used again. Together with the start time and the
/// executable it names one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    pub pid: u32,
    /// Clock ticks from the machine's start to the process's, as the kernel counts them.
    pub start_time_ticks: u64,
    /// The executable, symbolic links resolved.
    pub exe: PathBuf,
}

impl ProcessIdentity {
    /// Reads who has this id now. `None`: nobody, or one that has ended and only awaits reaping.
    pub fn of(pid: u32) -> io::Result<Option<Self>> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let read = || -> io::Result<Option<Self>> {
            let stat = fs::read_to_string(proc.join("stat"))?;
            let (state, start_time_ticks) = parse_stat(&stat)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "odd /proc stat line"))?;
            if matches!(state, 'Z' | 'X') {
                return Ok(None);
            }
            let exe = strip_deleted(fs::read_link(proc.join("exe"))?);
            Ok(Some(Self {
                pid,
                start_time_ticks,
                exe,
            }))
        };
        match read() {
            // It ended before or while we looked.
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    || error.raw_os_error() == Some(nix::libc::ESRCH) =>
            {
                Ok(None)
            }
            result => result,
        }
    }

    /// Our own identity.
    pub fn own() -> io::Result<Self> {
        Self::of(std::process::id())?.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Whether the process that has this id now is still this one. A process that may not be
    /// looked at is somebody else's, and so not this one.
    pub fn matches(&self) -> bool {
        matches!(Self::of(self.pid), Ok(Some(live)) if live == *self)
    }

    /// Whether the process is still there, whatever it executes by now: between fork and exec, and
    /// after a script's `exec`, a process changes its executable and stays the same process.
    pub fn is_alive(&self) -> bool {
        matches!(
            Self::of(self.pid),
            Ok(Some(live)) if live.start_time_ticks == self.start_time_ticks
        )
    }
}

/// All processes that descend from one, as far as the kernel still tells. Blocking.
pub(super) fn descendants(ancestor: u32) -> Vec<ProcessIdentity> {
    let parent_of = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The parent is field 4, the second behind the name.
        let parent = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?;
        parent.parse::<u32>().ok()
    };
    let parents: Vec<(u32, u32)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent_of(pid)?)))
        .collect();
    let mut family = vec![ancestor];
    let mut next = 0;
    while let Some(&member) = family.get(next) {
        let children = parents.iter().filter(|(_, parent)| *parent == member);
        family.extend(children.map(|(pid, _)| pid));
        next += 1;
    }
    family[1..]
        .iter()
        .filter_map(|&pid| ProcessIdentity::of(pid).ok().flatten())
        .collect()
}

/// The state and the start time out of `/proc/<pid>/stat`. The second field is the program's name
/// in parentheses and may itself hold spaces and parentheses, so fields are counted from the last
/// closing one.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3 and the start time field 22.
    let start_time = fields.nth(18)?.parse().ok()?;
    Some((state, start_time))
}

/// The kernel marks an executable that was replaced or removed while it runs.
fn strip_deleted(exe: PathBuf) -> PathBuf {
    match exe
        .to_str()
        .and_then(|text| text.strip_suffix(" (deleted)"))
    {
        Some(path) => Path::new(path).to_owned(),
        None => exe,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_with_a_hostile_name_is_read() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 987654 1 2 3";
        assert_eq!(parse_stat(line), Some(('S', 987_654)));
        assert_eq!(parse_stat("42 (sh) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    #[test]
    fn we_are_ourselves_and_nobody_else() {
        let own = ProcessIdentity::own().unwrap();
        assert!(own.matches());
        let earlier = ProcessIdentity {
            start_time_ticks: own.start_time_ticks - 1,
            ..own.clone()
        };
        assert!(!earlier.matches());
        assert!(!earlier.is_alive());
        let other = ProcessIdentity {
            exe: "/bin/other".into(),
            ..own
        };
        assert!(!other.matches());
        assert!(other.is_alive());
    }

    #[test]
    fn an_id_that_nobody_has_is_nobody() {
        // Above the kernel's largest possible process id.
        assert_eq!(ProcessIdentity::of(4_194_305).unwrap(), None);
    }

    #[test]
    fn a_removed_executable_keeps_its_name() {
        assert_eq!(strip_deleted("/a/b (deleted)".into()), Path::new("/a/b"));
        assert_eq!(strip_deleted("/a/b".into()), Path::new("/a/b"));
    }
}
