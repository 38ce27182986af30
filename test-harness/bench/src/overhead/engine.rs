//! The real engine, bare and in its router mode, as the daemon runs it.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::place::{Process, free_address};
use crate::sides::{models_dir, until_serving};

/// The engine and the model that a pool was provided with.
#[derive(Debug)]
pub struct Provided {
    pub program: String,
    pub flags: Vec<String>,
    pub model: String,
}

/// What the daemon runs, from its own words.
pub fn provided(pool: &Value) -> io::Result<Provided> {
    let replica = &pool["replica"];
    let pid = replica["pid"].as_u64().unwrap_or_default();
    let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    let command = std::fs::read(format!("/proc/{pid}/cmdline"))?;
    let flags: Vec<String> = String::from_utf8_lossy(&command)
        .split_terminator('\0')
        .skip(1)
        .map(str::to_owned)
        .collect();
    let model = value_of(&flags, &["-m", "--model"])
        .ok_or_else(|| io::Error::other("the engine's command line names no model"))?;
    Ok(Provided {
        program: program.display().to_string(),
        model,
        flags,
    })
}

fn value_of(flags: &[String], names: &[&str]) -> Option<String> {
    let place = flags
        .iter()
        .position(|flag| names.contains(&flag.as_str()))?;
    flags.get(place + 1).cloned()
}

impl Provided {
    /// The engine with the same flags, at another address.
    pub fn command(&self, address: SocketAddr) -> Command {
        let mut command = Command::new(&self.program);
        let mut flags = self.flags.iter();
        while let Some(flag) = flags.next() {
            command.arg(flag);
            if flag == "--port" {
                flags.next();
                command.arg(address.port().to_string());
            }
        }
        command
    }
}

pub(super) async fn direct(dir: &Path, provided: &Provided) -> io::Result<(Process, SocketAddr)> {
    let address = free_address()?;
    let mut process = Process::start("llama-server", &mut provided.command(address), dir)?;
    until_serving(&mut process, address, "/health").await?;
    Ok((process, address))
}

/// The same engine in router mode: it starts another one of itself when the
/// first request names the model.
pub(super) async fn router(dir: &Path, provided: &Provided) -> io::Result<(Process, SocketAddr)> {
    let address = free_address()?;
    let models = models_dir(dir, Path::new(&provided.model))?;
    let mut command = Command::new(&provided.program);
    let mut flags = provided.flags.iter();
    while let Some(flag) = flags.next() {
        match flag.as_str() {
            "-m" | "--model" | "--alias" => {
                flags.next();
            }
            "--port" => {
                flags.next();
                command.arg(flag).arg(address.port().to_string());
            }
            _ => {
                command.arg(flag);
            }
        }
    }
    command.arg("--models-dir").arg(models);
    let mut process = Process::start("router", &mut command, dir)?;
    until_serving(&mut process, address, "/health").await?;
    Ok((process, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_keeps_its_value_and_the_port_is_ours() {
        let flags = ["-m", "a.gguf", "--port", "1", "-t", "1"].map(str::to_owned);
        let provided = Provided {
            program: "x".to_owned(),
            model: value_of(&flags, &["-m", "--model"]).unwrap(),
            flags: flags.to_vec(),
        };
        assert_eq!(provided.model, "a.gguf");
        let command = provided.command(SocketAddr::from(([127, 0, 0, 1], 77)));
        let seen: Vec<_> = command
            .get_args()
            .map(|arg| arg.to_string_lossy())
            .collect();
        assert_eq!(seen, ["-m", "a.gguf", "--port", "77", "-t", "1"]);
    }
}
