//! What a client of a real engine notices of a layer in front of it: time to
//! first token, pauses between tokens, tokens per second.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::http::Connection;
use crate::place::{Process, free_address};
use crate::report::{Cell, Table};
use crate::sides::{Api, Ask, Daemon, Side, models_dir, until_serving};
use crate::stats::Summary;

const SLOTS: u32 = 8;

/// What one stream came to, in milliseconds but for the tokens.
#[derive(Debug, Clone, Default)]
struct Stream {
    first_token: f64,
    gaps: Vec<f64>,
    tokens: u64,
}

/// What all streams of one side came to.
#[derive(Debug, Clone, Default)]
struct Seen {
    streams: Vec<Stream>,
    tokens_per_second: Vec<f64>,
}

/// The engine and the model that a pool was provided with.
#[derive(Debug)]
pub struct Provided {
    pub program: String,
    pub flags: Vec<String>,
    pub model: String,
}

pub async fn run(dir: &Path, quick: bool, rounds: usize, threads: u32) -> io::Result<Vec<Table>> {
    let pool = json!({ "model": "haiku", "slots": SLOTS, "ctx": 1024, "threads": threads, "queue_capacity": 64 });
    let daemon = Daemon::start(dir, &pool).await?;
    let provided = provided(&daemon.pool().await?)?;
    let (_direct, direct) = direct(dir, &provided).await?;
    let (_router, router) = router(dir, &provided).await?;
    let model = Some("haiku".to_owned());
    let side = |name, address, api| Side {
        name,
        address,
        api,
        model: model.clone(),
    };
    let sides = [
        side("llama-server", direct, Api::Chat),
        side("its router mode", router, Api::Chat),
        side("orchestratord /v2", daemon.address, Api::Tasks),
        side("orchestratord /v1", daemon.address, Api::Chat),
    ];
    let tokens = if quick { 24 } else { 64 };
    for side in &sides {
        // The model is paged in, the router has loaded it.
        round(side, 1, tokens, 0).await?;
    }
    let mut tables = Vec::new();
    for streams in [1, 2, 4, 8] {
        let mut seen = vec![Seen::default(); sides.len()];
        for number in 1..=rounds {
            for (side, seen) in sides.iter().zip(&mut seen) {
                let begun = Instant::now();
                let round = round(side, streams, tokens, number).await?;
                let tokens: u64 = round.iter().map(|stream| stream.tokens).sum();
                seen.tokens_per_second
                    .push(tokens as f64 / begun.elapsed().as_secs_f64());
                seen.streams.extend(round);
            }
        }
        tables.push(table(streams, &sides, &seen));
    }
    Ok(tables)
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

async fn direct(dir: &Path, provided: &Provided) -> io::Result<(Process, SocketAddr)> {
    let address = free_address()?;
    let mut process = Process::start("llama-server", &mut provided.command(address), dir)?;
    until_serving(&mut process, address, "/health").await?;
    Ok((process, address))
}

/// The same engine in router mode: it starts another one of itself when the
/// first request names the model.
async fn router(dir: &Path, provided: &Provided) -> io::Result<(Process, SocketAddr)> {
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

async fn round(side: &Side, streams: usize, tokens: u32, number: usize) -> io::Result<Vec<Stream>> {
    let sign = if side.api == Api::Tasks { 'A' } else { 'B' };
    let all = (0..streams).map(|index| async move {
        let ask = Ask {
            // Another one for every side and round, so that none answers from a
            // cache that two of them share.
            prompt: format!(
                "{sign} {number} {index}. Tell a long story about a river and a bridge, with many words."
            ),
            max_tokens: tokens,
        };
        let mut connection = Connection::open(side.address).await?;
        let begun = Instant::now();
        let mut times = Vec::new();
        side.stream(&mut connection, &ask, || {
            times.push(begun.elapsed().as_secs_f64() * 1000.0);
        })
        .await?;
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let first_token = times.first().copied();
        let first_token =
            first_token.ok_or_else(|| io::Error::other(format!("{} sent no token", side.name)))?;
        Ok::<_, io::Error>(Stream {
            first_token,
            gaps,
            tokens: times.len() as u64,
        })
    });
    try_join_all(all).await
}

fn table(streams: usize, sides: &[Side], seen: &[Seen]) -> Table {
    let speed = |seen: &Seen| Summary::of(seen.tokens_per_second.iter().copied());
    let first = |seen: &Seen| Summary::of(seen.streams.iter().map(|stream| stream.first_token));
    let base = (speed(&seen[0]), first(&seen[0]));
    let rows = sides.iter().zip(seen).map(|(side, seen)| {
        let gaps = Summary::of(
            seen.streams
                .iter()
                .flat_map(|stream| stream.gaps.iter().copied()),
        );
        let (speed, first) = (speed(seen), first(seen));
        vec![
            Cell::text(side.name),
            Cell::ratio(Some(speed.median / base.0.median)),
            Cell::figure(first.median - base.1.median, 2),
            Cell::figure(first.p99 - base.1.p99, 2),
            Cell::summary(Some(speed), 1),
            Cell::summary(Some(first), 1),
            Cell::figure(gaps.median, 2),
            Cell::figure(gaps.p99, 2),
        ]
    });
    let columns = [
        "side",
        "tokens/s to direct",
        "added first token ms",
        "added at p99 ms",
        "tokens/s",
        "first token ms",
        "gap p50 ms",
        "gap p99 ms",
    ];
    Table {
        name: format!("overhead, {streams} streams"),
        columns: columns.map(str::to_owned).to_vec(),
        rows: rows.collect(),
        plotted: 1,
    }
}
