//! From a process's start to its first token, with everything cached.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::http::Connection;
use crate::overhead::{Provided, provided};
use crate::place::{Process, free_address};
use crate::report::{Cell, Table};
use crate::sides::{Api, Ask, Daemon, Side, until_serving};
use crate::stats::Summary;

const LIMIT: Duration = Duration::from_mins(1);

/// One start, in milliseconds since the process was started.
#[derive(Debug, Clone, Copy)]
struct Start {
    listens: f64,
    first_token: f64,
}

pub async fn run(dir: &Path, rounds: usize, threads: u32) -> io::Result<Vec<Table>> {
    let pool = json!({ "model": "haiku", "threads": threads });
    let provided = {
        // Provides whatever is missing; its engine's flags are everybody's.
        let daemon = Daemon::start(dir, &pool).await?;
        provided(&daemon.pool().await?)?
    };
    let (mut by_hand, mut by_daemon) = (Vec::new(), Vec::new());
    for _ in 0..rounds * 2 {
        by_hand.push(hand(dir, &provided).await?);
        by_daemon.push(daemon(dir, &pool).await?);
    }
    Ok(vec![table(&by_hand, &by_daemon)])
}

async fn hand(dir: &Path, provided: &Provided) -> io::Result<Start> {
    let address = free_address()?;
    let mut command = provided.command(address);
    let begun = Instant::now();
    let mut process = Process::start("llama-server", &mut command, dir)?;
    until_listening(address).await?;
    let listens = millis(begun);
    until_serving(&mut process, address, "/health").await?;
    first_token(address, Api::Chat, begun, listens).await
}

async fn daemon(dir: &Path, pool: &serde_json::Value) -> io::Result<Start> {
    let (mut command, address) = Daemon::command(dir, pool)?;
    let begun = Instant::now();
    let _process = Process::start("orchestratord", &mut command, dir)?;
    until_listening(address).await?;
    let listens = millis(begun);
    // The task waits for the engine by itself.
    first_token(address, Api::Tasks, begun, listens).await
}

async fn first_token(
    address: SocketAddr,
    api: Api,
    begun: Instant,
    listens: f64,
) -> io::Result<Start> {
    let side = Side {
        name: "start",
        address,
        api,
        model: None,
    };
    let ask = Ask {
        prompt: "Hello".to_owned(),
        max_tokens: 1,
    };
    let mut connection = Connection::open(address).await?;
    let mut first = None;
    side.stream(&mut connection, &ask, || {
        first.get_or_insert_with(|| millis(begun));
    })
    .await?;
    let first_token = first.ok_or_else(|| io::Error::other("no token came"))?;
    Ok(Start {
        listens,
        first_token,
    })
}

async fn until_listening(address: SocketAddr) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        match tokio::net::TcpStream::connect(address).await {
            Ok(_) => return Ok(()),
            Err(error) if begun.elapsed() > LIMIT => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    }
}

fn millis(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

fn table(by_hand: &[Start], by_daemon: &[Start]) -> Table {
    let first = |starts: &[Start]| Summary::of(starts.iter().map(|start| start.first_token));
    let base = first(by_hand).median;
    let row = |name: &str, starts: &[Start]| {
        let (first, listens) = (
            first(starts),
            Summary::of(starts.iter().map(|start| start.listens)),
        );
        vec![
            Cell::text(name),
            Cell::ratio(Some(first.median / base)),
            Cell::summary(Some(first), 1),
            Cell::summary(Some(listens), 1),
        ]
    };
    Table {
        name: "start, everything cached".to_owned(),
        columns: [
            "side",
            "first token to by hand",
            "first token ms",
            "listens ms",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: vec![
            row("llama-server by hand", by_hand),
            row("orchestratord", by_daemon),
        ],
        plotted: 1,
    }
}
