//! What a token costs on its way through: tokens per second and CPU seconds
//! per million tokens of the relay alone, at named operating points.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Instant;

use futures::future::try_join_all;
use serde::Serialize;
use serde_json::json;
use test_harness_fake_engine::gguf::tiny_gguf;

use crate::http::Connection;
use crate::place::{Process, on_path};
use crate::processes::{cpu_seconds, family, peak_bytes};
use crate::report::{Cell, Table};
use crate::sides::{Api, Ask, Daemon, Side, nginx, until_serving};
use crate::stats::Summary;

/// How many streams, how fast each, and how many tokens of each.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Point {
    pub name: &'static str,
    pub streams: u32,
    /// For each stream; 0 is flat out.
    pub tokens_per_second: u32,
    pub tokens: u32,
}

const POINTS: [Point; 6] = [
    Point {
        name: "100/s × 128",
        streams: 128,
        tokens_per_second: 100,
        tokens: 500,
    },
    Point {
        name: "1,000/s × 16",
        streams: 16,
        tokens_per_second: 1000,
        tokens: 4000,
    },
    Point {
        name: "flat out × 1",
        streams: 1,
        tokens_per_second: 0,
        tokens: 60_000,
    },
    Point {
        name: "flat out × 16",
        streams: 16,
        tokens_per_second: 0,
        tokens: 8000,
    },
    Point {
        name: "flat out × 128",
        streams: 128,
        tokens_per_second: 0,
        tokens: 1000,
    },
    Point {
        name: "flat out × 1,000",
        streams: 1000,
        tokens_per_second: 0,
        tokens: 150,
    },
];

/// What one run came to.
#[derive(Debug, Clone, Copy)]
struct Run {
    tokens_per_second: f64,
    /// Of the relay; none for the engine itself.
    cpu_per_million: Option<f64>,
    peak_bytes: u64,
    lost: u64,
}

/// A side and the process that relays.
struct Relay {
    side: Side,
    pid: Option<u32>,
}

pub async fn run(dir: &Path, quick: bool, rounds: usize) -> io::Result<Vec<Table>> {
    let engine_dir = dir.join("engine");
    let engine = install_engine(&engine_dir)?;
    let daemon = start_daemon(dir, &engine, 256).await?;
    let engine_address = daemon.engine().await?;
    let nginx = start_nginx(dir, engine_address).await?;
    let mut relays = vec![
        relay("engine itself", engine_address, Api::Chat, None),
        relay(
            "orchestratord /v2",
            daemon.address,
            Api::Tasks,
            Some(&daemon.process),
        ),
        relay(
            "orchestratord /v1",
            daemon.address,
            Api::Chat,
            Some(&daemon.process),
        ),
    ];
    if let Some((process, address)) = &nginx {
        relays.push(relay("nginx", *address, Api::Chat, Some(process)));
    }
    let mut tables = Vec::new();
    for point in points(quick) {
        set_point(&engine_dir, point)?;
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); relays.len()];
        for _ in 0..rounds {
            for (relay, runs) in relays.iter().zip(&mut runs) {
                runs.push(measure(relay, point).await?);
            }
        }
        tables.push(table(point, &relays, &runs));
    }
    Ok(tables)
}

fn points(quick: bool) -> Vec<Point> {
    let shorter = |point: Point| Point {
        tokens: point.tokens / 5,
        ..point
    };
    if quick {
        POINTS.into_iter().map(shorter).collect()
    } else {
        POINTS.to_vec()
    }
}

fn relay(name: &'static str, address: SocketAddr, api: Api, process: Option<&Process>) -> Relay {
    let side = Side {
        name,
        address,
        api,
        model: None,
    };
    Relay {
        side,
        pid: process.map(Process::pid),
    }
}

/// Puts the engine under the name that a system's engine has.
fn install_engine(dir: &Path) -> io::Result<PathBuf> {
    fs::create_dir_all(dir)?;
    let built = std::env::current_exe()?.with_file_name("bench-engine");
    let built = if built.exists() {
        built
    } else {
        build_engine()?
    };
    let place = dir.join("llama-server");
    fs::copy(built, &place)?;
    Ok(place)
}

fn build_engine() -> io::Result<PathBuf> {
    let build = escargot::CargoBuild::new()
        .package(env!("CARGO_PKG_NAME"))
        .bin("bench-engine")
        .current_release();
    let run = build.run().map_err(io::Error::other)?;
    Ok(run.path().to_owned())
}

async fn start_daemon(dir: &Path, engine: &Path, slots: u32) -> io::Result<Daemon> {
    let model = dir.join("tiny.gguf");
    fs::write(&model, tiny_gguf())?;
    let pool = json!({
        "model": model, "slots": slots, "ctx": 131_072, "queue_capacity": 20_000,
        "provision": { "mode": "system", "path": engine },
    });
    Daemon::start(dir, &pool).await
}

/// A daemon whose engine has one slot and takes for ever.
pub async fn endless(dir: &Path) -> io::Result<Daemon> {
    let engine_dir = dir.join("engine");
    let engine = install_engine(&engine_dir)?;
    let slow = Point {
        name: "endless",
        streams: 1,
        tokens_per_second: 1,
        tokens: 1_000_000,
    };
    set_point(&engine_dir, slow)?;
    start_daemon(dir, &engine, 1).await
}

async fn start_nginx(dir: &Path, engine: SocketAddr) -> io::Result<Option<(Process, SocketAddr)>> {
    let Some(program) = on_path("nginx") else {
        return Ok(None);
    };
    let (mut process, address) = nginx(&program, dir, engine)?;
    until_serving(&mut process, address, "/health").await?;
    Ok(Some((process, address)))
}

fn set_point(dir: &Path, point: Point) -> io::Result<()> {
    let text = json!({ "tokens": point.tokens, "tokens_per_second": point.tokens_per_second });
    let staged = dir.join("point.tmp");
    fs::write(&staged, text.to_string())?;
    fs::rename(staged, dir.join("bench-engine.json"))
}

async fn measure(relay: &Relay, point: Point) -> io::Result<Run> {
    let ask = Ask {
        prompt: "go".to_owned(),
        max_tokens: point.tokens,
    };
    let pids = relay.pid.map(relay_pids);
    let before = pids.as_deref().map(cpu_seconds);
    let begun = Instant::now();
    let streams = (0..point.streams).map(|_| async {
        let mut connection = Connection::open(relay.side.address).await?;
        let mut tokens = 0_u64;
        relay
            .side
            .stream(&mut connection, &ask, || tokens += 1)
            .await?;
        Ok::<_, io::Error>(tokens)
    });
    let tokens: u64 = try_join_all(streams).await?.into_iter().sum();
    let took = begun.elapsed().as_secs_f64();
    let expected = u64::from(point.streams) * u64::from(point.tokens);
    let used = pids
        .as_deref()
        .map(cpu_seconds)
        .zip(before)
        .map(|(after, before)| after - before);
    Ok(Run {
        tokens_per_second: tokens as f64 / took,
        cpu_per_million: used.map(|seconds| seconds * 1e6 / tokens as f64),
        peak_bytes: pids.iter().flatten().map(|pid| peak_bytes(*pid)).sum(),
        lost: expected.saturating_sub(tokens),
    })
}

/// The relay's own processes: the daemon's engine is none of them.
fn relay_pids(pid: u32) -> Vec<u32> {
    let mut pids = family(pid);
    let is_engine = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "llama-server"
    };
    pids.retain(|pid| !is_engine(pid));
    pids
}

fn table(point: Point, relays: &[Relay], runs: &[Vec<Run>]) -> Table {
    let summary = |runs: &[Run], of: fn(&Run) -> Option<f64>| {
        let values: Vec<f64> = runs.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| Summary::of(values))
    };
    let speed = |run: &Run| Some(run.tokens_per_second);
    let base = relays
        .iter()
        .zip(runs)
        .find(|(relay, _)| relay.side.name == "nginx");
    let base_speed = base.and_then(|(_, runs)| summary(runs, speed));
    let base_cpu = base.and_then(|(_, runs)| summary(runs, |run| run.cpu_per_million));
    let ratio = |own: Option<Summary>, base: Option<Summary>| {
        own.zip(base).map(|(own, base)| own.median / base.median)
    };
    let rows = relays.iter().zip(runs).map(|(relay, runs)| {
        let (tokens, cpu) = (
            summary(runs, speed),
            summary(runs, |run| run.cpu_per_million),
        );
        let lost: u64 = runs.iter().map(|run| run.lost).sum();
        let peak = runs.iter().map(|run| run.peak_bytes).max().unwrap_or(0);
        vec![
            Cell::text(relay.side.name),
            Cell::ratio(ratio(tokens, base_speed)),
            Cell::ratio(ratio(cpu, base_cpu)),
            Cell::summary(tokens, 0),
            Cell::summary(cpu, 2),
            Cell::mebibytes(peak),
            Cell::count(lost),
        ]
    });
    Table {
        name: format!("relay, {}", point.name),
        columns: [
            "side",
            "tokens/s to nginx",
            "CPU to nginx",
            "tokens/s",
            "CPU s per million",
            "peak MiB",
            "lost",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: rows.collect(),
        plotted: 2,
    }
}
