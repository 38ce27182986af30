//! Ports on the loopback address, and who listens on them.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};

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

/// Whether a process of this process group listens on the port; `None` if the kernel does not say.
/// Blocking.
pub(super) fn group_listens(group: u32, port: u16) -> Option<bool> {
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    let sockets: Vec<String> = listening_inodes(&table, port)
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    for pid in members(group) {
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        let holds = |entry: fs::DirEntry| {
            fs::read_link(entry.path()).is_ok_and(|link| {
                sockets
                    .iter()
                    .any(|socket| link.as_os_str() == socket.as_str())
            })
        };
        if files.flatten().any(holds) {
            return Some(true);
        }
    }
    Some(false)
}

/// The group's processes: its leader first, since it is nearly always the one.
fn members(group: u32) -> impl Iterator<Item = u32> {
    let others = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter(move |&pid| pid != group && group_of(pid) == Some(group));
    std::iter::once(group).chain(others)
}

/// Field 5 of `/proc/<pid>/stat`, counted from behind the name, which may hold anything.
fn group_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(2)?.parse().ok()
}

/// The inodes of sockets that listen on the port at 127.0.0.1 or at every address.
fn listening_inodes(table: &str, port: u16) -> impl Iterator<Item = &str> {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).filter_map(move |line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (local, state, inode) = (fields.get(1)?, fields.get(3)?, fields.get(9)?);
        let here = matches!(local.strip_suffix(&suffix)?, "0100007F" | "00000000");
        // 0A: listening.
        (here && *state == "0A").then_some(*inode)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_table_is_read() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 100 0 0 10 0\n\
            1: 0100007F:9C40 0100007F:1234 01 00000000:00000000 00:00000000 00000000  1000        0 4712 1 0 100 0 0 10 0\n\
            2: 0200000A:9C40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 4713 1 0 100 0 0 10 0\n";
        assert_eq!(listening_inodes(table, 40000).collect::<Vec<_>>(), ["4711"]);
        assert_eq!(listening_inodes(table, 40001).count(), 0);
    }

    #[test]
    fn our_own_socket_is_ours() {
        let socket = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = socket.local_addr().unwrap().port();
        let own_group = group_of(std::process::id()).unwrap();
        assert!(is_taken(port));
        assert_eq!(group_listens(own_group, port), Some(true));
        // Nobody leads a group above the largest process id.
        assert_eq!(group_listens(4_194_305, port), Some(false));
        drop(socket);
        assert_eq!(group_listens(own_group, port), Some(false));
    }

    #[test]
    fn a_free_port_can_be_had() {
        assert!(!is_taken(free_port().unwrap()));
    }
}
