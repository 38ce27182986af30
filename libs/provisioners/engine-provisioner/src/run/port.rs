//! Ports on the loopback address, and who listens on them.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

/// A port that is free at this moment. Somebody else may take it before the engine does: the
/// engine then ends, and another port is tried.
pub(super) fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// Whether somebody holds the port.
pub(super) fn is_taken(port: u16) -> bool {
    matches!(
        TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse
    )
}

/// Who listens on a port, as far as a process group is concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listener {
    /// This process of the group.
    Member(u32),
    /// Nobody of the group.
    NotOurs,
    /// The kernel does not say.
    Unknown,
}

/// Which process of this process group listens on the port. Blocking.
pub(super) fn listener(group: u32, port: u16) -> Listener {
    match File::open("/proc/net/tcp") {
        // The kernel writes the table as it is read, the listening sockets first. So no more
        // is read than is needed: every connection of the last minute has a line too.
        Ok(table) => first_listener(listening_inodes(BufReader::new(table), port), |socket| {
            find_listener(members(group), socket, open_files)
        }),
        Err(_) => Listener::Unknown,
    }
}

/// What the first socket that is of the group says; several may listen on one port.
fn first_listener(
    inodes: impl Iterator<Item = io::Result<String>>,
    look: impl Fn(&Path) -> Listener,
) -> Listener {
    let mut answer = None;
    for inode in inodes {
        let Ok(inode) = inode else {
            return Listener::Unknown;
        };
        match look(Path::new(&format!("socket:[{inode}]"))) {
            member @ Listener::Member(_) => return member,
            Listener::Unknown => answer = Some(Listener::Unknown),
            Listener::NotOurs => answer = answer.or(Some(Listener::NotOurs)),
        }
    }
    // Where the table names nobody, it still matters whether all may be looked at.
    answer.unwrap_or_else(|| look(Path::new("")))
}

/// The first process that has the socket open. A process that may not be looked at (a
/// container, another user, an engine that may not be traced) may be the one.
fn find_listener(
    members: impl Iterator<Item = u32>,
    socket: &Path,
    open_files: impl Fn(u32) -> io::Result<Vec<PathBuf>>,
) -> Listener {
    let mut answer = Listener::NotOurs;
    for pid in members {
        match open_files(pid) {
            Ok(files) if files.iter().any(|file| file == socket) => {
                return Listener::Member(pid);
            }
            Ok(_) => {}
            // It has ended.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(_) => answer = Listener::Unknown,
        }
    }
    answer
}

fn open_files(pid: u32) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(entries
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .collect())
}

/// The group's processes: its leader first, since it is nearly always the one.
pub(super) fn members(group: u32) -> impl Iterator<Item = u32> {
    let others = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(move |&pid| pid != group && group_of(pid) == Some(group));
    std::iter::once(group).chain(others)
}

/// Field 5 of `/proc/<pid>/stat`, counted from behind the name, which may hold anything.
pub(super) fn group_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// What a process holds of memory, in bytes.
pub(super) fn resident_bytes(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The inodes of sockets that listen on the port at 127.0.0.1 or at every address.
fn listening_inodes(table: impl BufRead, port: u16) -> impl Iterator<Item = io::Result<String>> {
    let suffix = format!(":{port:04X}");
    table.lines().filter_map(move |line| {
        let inode = line.map(|line| Some(listening_inode(&line, &suffix)?.to_owned()));
        inode.transpose()
    })
}

fn listening_inode<'a>(line: &'a str, suffix: &str) -> Option<&'a str> {
    let mut fields = line.split_ascii_whitespace();
    let (local, state, inode) = (fields.nth(1)?, fields.nth(1)?, fields.nth(5)?);
    let here = matches!(local.strip_suffix(suffix)?, "0100007F" | "00000000");
    // 0A: listening.
    (here && state == "0A").then_some(inode)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_runs_holds_memory() {
        assert!(resident_bytes(std::process::id()).unwrap() > 100_000);
        assert_eq!(resident_bytes(u32::MAX), None);
    }

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100 0 0 10 0\n\
            1: 0100007F:9C40 0100007F:1234 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 100 0 0 10 0\n\
            2: 0200000A:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4713 1 0 100 0 0 10 0\n";
        let inodes = |port| {
            listening_inodes(table.as_bytes(), port)
                .collect::<io::Result<Vec<_>>>()
                .unwrap()
        };
        assert_eq!(inodes(40000), ["4711"]);
        assert_eq!(inodes(40001), [""; 0]);
    }

    #[test]
    fn no_more_of_the_table_is_read_than_is_needed() {
        let mut read = 0;
        let inodes = ["1", "2", "3"]
            .map(|inode| Ok(inode.to_owned()))
            .into_iter();
        let answer = first_listener(inodes.inspect(|_| read += 1), |socket| {
            if socket.ends_with("socket:[2]") {
                Listener::Member(7)
            } else {
                Listener::Unknown
            }
        });
        assert_eq!((answer, read), (Listener::Member(7), 2));
        let unknown = first_listener([Ok("1".to_owned())].into_iter(), |_| Listener::Unknown);
        assert_eq!(unknown, Listener::Unknown);
    }

    #[test]
    fn a_table_that_names_nobody_tells_only_of_processes_that_may_be_looked_at() {
        let of = |kind: Option<io::ErrorKind>| {
            let files = |_| kind.map_or(Ok(Vec::new()), |kind| Err(kind.into()));
            first_listener(std::iter::empty(), |socket| {
                find_listener([1].into_iter(), socket, files)
            })
        };
        assert_eq!(of(None), Listener::NotOurs);
        assert_eq!(of(Some(io::ErrorKind::PermissionDenied)), Listener::Unknown);
        let broken = [Err(io::ErrorKind::PermissionDenied.into())].into_iter();
        let broken = first_listener(broken, |_| Listener::NotOurs);
        assert_eq!(broken, Listener::Unknown);
    }

    #[test]
    fn our_own_socket_is_ours() {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        let own = std::process::id();
        let own_group = group_of(own).unwrap();
        assert!(is_taken(port));
        assert_eq!(listener(own_group, port), Listener::Member(own));
        // Nobody leads a group above the largest process id.
        assert_eq!(listener(4_194_305, port), Listener::NotOurs);
        drop(socket);
    }

    #[test]
    fn a_process_that_may_not_be_looked_at_may_be_the_one() {
        let socket = Path::new("socket:[1]");
        let files = |pid| match pid {
            1 => Err(io::ErrorKind::NotFound.into()),
            2 => Err(io::ErrorKind::PermissionDenied.into()),
            3 => Ok(vec![PathBuf::from("socket:[1]")]),
            _ => Ok(vec![PathBuf::from("socket:[2]")]),
        };
        let of = |members: &[u32]| find_listener(members.iter().copied(), socket, files);
        assert_eq!(of(&[1, 4]), Listener::NotOurs);
        assert_eq!(of(&[1, 2, 4]), Listener::Unknown);
        assert_eq!(of(&[2, 3]), Listener::Member(3));
    }

    #[test]
    fn a_free_port_can_be_had() {
        // Somebody else may be given the port in between, but not every time.
        assert!((0..10).any(|_| !is_taken(free_port().unwrap())));
    }
}
