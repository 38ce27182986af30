//! From a process's start to its first token, with everything cached.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::goals::Goal;
use crate::http::Connection;
use crate::machine;
use crate::overhead::{Provided, provided};
use crate::place::{Process, free_address};
use crate::points::Size;
use crate::processes::{family, name};
use crate::report::{Cell, Table};
use crate::scripted::Scripted;
use crate::sides::{Api, Ask, Daemon, Side, until_serving};
use crate::stats::{Summary, ratios, turns};
use crate::{Context, Measured};

const LIMIT: Duration = Duration::from_mins(1);

/// Pairs of starts in each round: one takes less than a second.
const PAIRS: usize = 4;

/// One start, in milliseconds since the process was started.
#[derive(Debug, Clone, Copy)]
struct Start {
    listens: f64,
    /// When the engine's process was there.
    engine: f64,
    first_token: f64,
}

pub async fn run(context: &Context<'_>) -> io::Result<Measured> {
    let (dir, pool) = (context.dir, pool(context)?);
    let provided = {
        // Provides whatever is missing; its engine's flags are everybody's.
        let daemon = Daemon::start(dir, &pool).await?;
        provided(&daemon.pool().await?)?
    };
    // What is cached and what is not is the same for both from the first pair on.
    hand(dir, &provided).await?;
    daemon(dir, &pool).await?;
    let (mut by_hand, mut by_daemon) = (Vec::new(), Vec::new());
    for pair in 0..context.rounds * PAIRS {
        for turn in turns(2, pair) {
            match turn {
                0 => by_hand.push(hand(dir, &provided).await?),
                _ => by_daemon.push(daemon(dir, &pool).await?),
            }
        }
    }
    let with = machine::engine(Path::new(&provided.program))
        .filter(|_| context.size != Size::Smoke)
        .map(|version| format!("llama-server {version}"));
    Ok(Measured {
        tables: vec![table(&by_hand, &by_daemon)],
        goals: goals(&by_hand, &by_daemon),
        with: with.into_iter().collect(),
    })
}

fn pool(context: &Context<'_>) -> io::Result<Value> {
    if context.size == Size::Smoke {
        return Ok(Scripted::install(context.dir, context.engine)?.pool(1));
    }
    Ok(json!({ "model": "haiku", "threads": context.threads }))
}

async fn hand(dir: &Path, provided: &Provided) -> io::Result<Start> {
    let address = free_address()?;
    let mut command = provided.command(address);
    let begun = Instant::now();
    let mut process = Process::start("llama-server", &mut command, dir)?;
    until_listening(address).await?;
    let listens = millis(begun);
    until_serving(&mut process, address, "/health").await?;
    Ok(Start {
        listens,
        engine: 0.0,
        first_token: first_token(address, Api::Completion, begun).await?,
    })
}

async fn daemon(dir: &Path, pool: &Value) -> io::Result<Start> {
    let (mut command, address) = Daemon::command(dir, pool)?;
    let begun = Instant::now();
    let process = Process::start("orchestratord", &mut command, dir)?;
    let asked = async {
        until_listening(address).await?;
        let listens = millis(begun);
        // The task waits for the engine by itself.
        let first_token = first_token(address, Api::Tasks, begun).await?;
        Ok::<_, io::Error>((listens, first_token))
    };
    let (asked, engine) = futures::future::join(asked, engine_seen(process.pid(), begun)).await;
    let (listens, first_token) = asked?;
    Ok(Start {
        listens,
        engine,
        first_token,
    })
}

/// When the daemon had started its engine, to a millisecond.
async fn engine_seen(daemon: u32, begun: Instant) -> f64 {
    while begun.elapsed() < LIMIT {
        if family(daemon)
            .iter()
            .any(|pid| name(*pid) == "llama-server")
        {
            return millis(begun);
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    millis(begun)
}

async fn first_token(address: SocketAddr, api: Api, begun: Instant) -> io::Result<f64> {
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
    first.ok_or_else(|| io::Error::other("no token came"))
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

fn each(starts: &[Start], of: fn(&Start) -> f64) -> Vec<f64> {
    starts.iter().map(of).collect()
}

fn compared(own: &[Start], base: &[Start]) -> Option<Summary> {
    let first = |start: &Start| start.first_token;
    ratios(&each(own, first), &each(base, first))
}

fn goals(by_hand: &[Start], by_daemon: &[Start]) -> Vec<Goal> {
    let listens = Summary::some(each(by_daemon, |start| start.listens));
    vec![
        Goal::at_most("start: first token, to llama-server by hand", 1.05)
            .median(compared(by_daemon, by_hand)),
        Goal::at_most("start: the daemon listens after", 30.0)
            .in_unit("ms", 1)
            .median(listens),
    ]
}

fn table(by_hand: &[Start], by_daemon: &[Start]) -> Table {
    let row = |name: &str, starts: &[Start]| {
        let summary = |of| Summary::some(each(starts, of));
        vec![
            Cell::text(name),
            Cell::spread(compared(starts, by_hand)),
            Cell::summary(summary(|start| start.first_token), 1),
            Cell::summary(summary(|start| start.listens), 1),
            Cell::summary(summary(|start| start.engine), 1),
        ]
    };
    Table {
        name: format!("start, everything cached, {} pairs", by_hand.len()),
        columns: [
            "side",
            "first token to by hand",
            "first token ms",
            "listens ms",
            "engine's process ms",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: vec![
            row("llama-server by hand", by_hand),
            row("orchestratord", by_daemon),
        ],
        plotted: vec![2],
    }
}
