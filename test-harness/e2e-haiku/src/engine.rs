//! Looks at the engine process behind a pool, past the daemon.

use std::fmt::Write;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::client::Api;

/// An engine that can be asked and looked at.
#[derive(Debug, Clone)]
pub struct Engine {
    pub api: Api,
    pub pid: u32,
}

impl Engine {
    /// From a pool as the daemon shows it.
    pub fn of(pool: &Value) -> Self {
        let replica = &pool["replica"];
        let (Some(url), Some(pid)) = (replica["url"].as_str(), replica["pid"].as_u64()) else {
            panic!("a replica with URL and pid is expected: {pool:#}");
        };
        Self {
            api: Api::new(url),
            pid: pid.try_into().expect("a pid"),
        }
    }

    /// How many tokens it has generated since it started, by its own count.
    pub async fn tokens_predicted(&self) -> u64 {
        let text = self.api.text("/metrics").await;
        counter(&text, "llamacpp:tokens_predicted_total")
            .unwrap_or_else(|| panic!("the engine counts no predicted tokens:\n{text}"))
    }

    /// How many of its slots are at work.
    pub async fn busy_slots(&self) -> usize {
        let slots = self.api.json("/slots").await;
        let slots = slots
            .as_array()
            .unwrap_or_else(|| panic!("no list of slots: {slots}"));
        assert!(!slots.is_empty(), "the engine has no slots");
        slots
            .iter()
            .filter(|slot| slot["is_processing"] != Value::Bool(false))
            .count()
    }

    pub fn executable(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/exe", self.pid))
    }

    /// The process that started it.
    pub fn parent(&self) -> Option<u32> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
        line.trim().parse().ok()
    }

    /// Its command line.
    pub fn arguments(&self) -> Vec<String> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        text.split_terminator('\0').map(str::to_owned).collect()
    }

    /// Whether this very process is the one that listens at its URL.
    pub fn owns_its_port(&self) -> bool {
        let port = self
            .api
            .url()
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        let socket = port.and_then(listening_socket);
        let files = fs::read_dir(format!("/proc/{}/fd", self.pid));
        let (Some(socket), Ok(files)) = (socket, files) else {
            return false;
        };
        let socket = PathBuf::from(format!("socket:[{socket}]"));
        files
            .flatten()
            .any(|file| fs::read_link(file.path()).is_ok_and(|to| to == socket))
    }
}

/// Whether a process has ended; one that only awaits reaping has.
pub fn is_gone(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return true;
    };
    // The state follows the name, which is in parentheses and may hold any.
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with(['Z', 'X']))
}

/// The inode of the socket that listens on a loopback port.
fn listening_socket(port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    let wanted = format!("0100007F:{port:04X}");
    let table = fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let matches = fields.get(1) == Some(&wanted.as_str()) && fields.get(3) == Some(&LISTEN);
        matches.then(|| fields.get(9)?.parse().ok()).flatten()
    })
}

/// The sum over a metric's labels, from Prometheus' text format.
pub fn counter(text: &str, name: &str) -> Option<u64> {
    let samples = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        // Another metric may begin with this one's name.
        if !rest.starts_with([' ', '{']) {
            return None;
        }
        let value: f64 = rest.rsplit(' ').next()?.parse().ok()?;
        Some(value as u64)
    });
    samples.reduce(|sum, value| sum + value)
}

/// A file's sha256, written as the daemon writes it.
pub fn sha256(path: &Path) -> io::Result<String> {
    let (mut hasher, mut file) = (Sha256::new(), File::open(path)?);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            count => hasher.update(&buffer[..count]),
        }
    }
    let mut text = "sha256:".to_owned();
    for byte in hasher.finalize() {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_counter_is_found_by_its_whole_name() {
        let text =
            "# HELP a_total x\na_total_b 7\na_total{pool=\"x y\"} 3\na_total{pool=\"z\"} 4.0\n";
        assert_eq!(counter(text, "a_total"), Some(7));
        assert_eq!(counter(text, "a"), None);
    }

    #[test]
    fn a_digest_is_the_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, "abc").unwrap();
        let expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256(&path).unwrap(), expected);
    }

    #[test]
    fn a_port_belongs_to_the_process_that_listens() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let engine = |pid| Engine {
            api: Api::new(url.clone()),
            pid,
        };
        let own = std::process::id();
        assert!(engine(own).owns_its_port());
        assert!(!engine(engine(own).parent().unwrap()).owns_its_port());
        drop(listener);
        assert!(!engine(own).owns_its_port());
    }

    #[test]
    fn an_ended_process_is_gone() {
        let mut child = std::process::Command::new("sleep")
            .arg("100")
            .spawn()
            .unwrap();
        assert!(!is_gone(child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(is_gone(child.id()));
    }
}
