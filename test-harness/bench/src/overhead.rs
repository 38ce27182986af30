//! What a client of a real engine notices of a layer in front of it: time to
//! first token, pauses between tokens, tokens per second.
//!
//! Two comparisons, one after the other: tasks beside `/completion` of the bare
//! engine with the same prompt, and `/v1` beside its own `/v1` and its router
//! mode. Every side has an engine process of its own with the same flags, and
//! within a comparison each of them is asked exactly the same in the same order:
//! so their prompt caches hold the same at every moment, and no side profits
//! from what another one has asked.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use futures::future::try_join_all;
use serde_json::{Value, json};

use crate::goals::{Goal, worst};
use crate::http::Connection;
use crate::place::{Process, free_address};
use crate::points::Size;
use crate::report::{Cell, Table};
use crate::scripted::Scripted;
use crate::sides::{Api, Ask, Daemon, Side, models_dir, until_serving};
use crate::stats::{Summary, added, ratios, turns};
use crate::{Context, Measured, machine};

const SLOTS: u32 = 8;

const STREAMS: [usize; 4] = [1, 2, 4, 8];

/// Of a request that is asked for its first token.
const SHORT_TOKENS: u32 = 2;

/// What one stream came to, in milliseconds but for the tokens.
#[derive(Debug, Clone, Default)]
struct Stream {
    first_token: f64,
    gaps: Vec<f64>,
    tokens: u64,
}

/// What all rounds of one side came to, in order.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// Milliseconds of each stream, by round.
    first_tokens: Vec<Vec<f64>>,
    /// By round.
    tokens_per_second: Vec<f64>,
    gaps: Vec<f64>,
}

/// The engine and the model that a pool was provided with.
#[derive(Debug)]
pub struct Provided {
    pub program: String,
    pub flags: Vec<String>,
    pub model: String,
}

/// Sides that are compared with the first of them.
struct Comparison {
    /// The bare engine first.
    sides: Vec<Side>,
    /// Before every prompt, so that two comparisons share none.
    sign: char,
}

pub async fn run(context: &Context<'_>) -> io::Result<Measured> {
    let daemon = Daemon::start(context.dir, &pool(context)?).await?;
    let pool = daemon.pool().await?;
    let provided = provided(&pool)?;
    let (_direct, direct) = direct(context.dir, &provided).await?;
    let (_router, router) = router(context.dir, &provided).await?;
    // Router mode goes by names; a scripted engine has none.
    let model = (context.size != Size::Smoke).then(|| "haiku".to_owned());
    let side = |name, address, api| Side {
        name,
        address,
        api,
        model: model.clone(),
    };
    let comparisons = [
        Comparison {
            sides: vec![
                side("llama-server /completion", direct, Api::Completion),
                side("orchestratord /v2", daemon.address, Api::Tasks),
            ],
            sign: 'A',
        },
        Comparison {
            sides: vec![
                side("llama-server /v1", direct, Api::Chat),
                side("its router mode /v1", router, Api::Chat),
                side("orchestratord /v1", daemon.address, Api::Chat),
            ],
            sign: 'B',
        },
    ];
    let mut measured = Measured::default();
    if context.size != Size::Smoke {
        let version = machine::engine(Path::new(&provided.program));
        measured
            .with
            .extend(version.map(|version| format!("llama-server {version}")));
        let threads = context.threads;
        measured
            .with
            .push(format!("model `haiku`, threads {threads}"));
    }
    let mut goals = Vec::new();
    for comparison in &comparisons {
        for side in &comparison.sides {
            // The model is paged in, the router has loaded it.
            round(side, 1, SHORT_TOKENS, &format!("{}000", comparison.sign)).await?;
        }
        for streams in STREAMS {
            let seen = compare(comparison, streams, context).await?;
            measured
                .tables
                .push(table(streams, &comparison.sides, &seen));
            goals.extend(goals_of(streams, &comparison.sides, &seen));
        }
    }
    measured.goals = worst_of_all(goals);
    Ok(measured)
}

fn pool(context: &Context<'_>) -> io::Result<Value> {
    if context.size == Size::Smoke {
        return Ok(Scripted::install(context.dir, context.engine)?.pool(SLOTS));
    }
    let threads = context.threads;
    Ok(
        json!({ "model": "haiku", "slots": SLOTS, "ctx": 2048, "threads": threads, "queue_capacity": 64 }),
    )
}

/// Short answers for the first token, then long ones for the tokens per second.
async fn compare(
    comparison: &Comparison,
    streams: usize,
    context: &Context<'_>,
) -> io::Result<Vec<Seen>> {
    let sides = &comparison.sides;
    let mut seen = vec![Seen::default(); sides.len()];
    let short = context.size.pick(120, 24, 4).max(streams) / streams;
    let long_tokens = context.size.pick(48, 16, 16);
    for number in 0..short + context.rounds {
        let tokens = if number < short {
            SHORT_TOKENS
        } else {
            long_tokens
        };
        let sign = format!("{}{streams}{number:03}", comparison.sign);
        for turn in turns(sides.len(), number) {
            let begun = Instant::now();
            let round = round(&sides[turn], streams, tokens, &sign).await?;
            let took = begun.elapsed().as_secs_f64();
            let seen = &mut seen[turn];
            let first_tokens = round.iter().map(|stream| stream.first_token);
            seen.first_tokens.push(first_tokens.collect());
            if number >= short {
                let tokens: u64 = round.iter().map(|stream| stream.tokens).sum();
                seen.tokens_per_second.push(tokens as f64 / took);
                seen.gaps
                    .extend(round.into_iter().flat_map(|stream| stream.gaps));
            }
        }
    }
    Ok(seen)
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

/// All streams at once; `sign` tells this round's prompts from all others, from
/// their first characters on.
async fn round(side: &Side, streams: usize, tokens: u32, sign: &str) -> io::Result<Vec<Stream>> {
    let mut connections = Vec::new();
    for _ in 0..streams {
        connections.push(Connection::open(side.address).await?);
    }
    let all = connections
        .into_iter()
        .enumerate()
        .map(|(index, connection)| {
            let ask = Ask {
                prompt: format!("{index}{sign}: Tell a long story."),
                max_tokens: tokens,
            };
            stream(side, connection, ask)
        });
    try_join_all(all).await
}

/// From the request, with the connection open, to the end of the answer.
async fn stream(side: &Side, mut connection: Connection, ask: Ask) -> io::Result<Stream> {
    let begun = Instant::now();
    let mut times = Vec::new();
    side.stream(&mut connection, &ask, || {
        times.push(begun.elapsed().as_secs_f64() * 1000.0);
    })
    .await?;
    let first_token = times.first().copied();
    Ok(Stream {
        first_token: first_token
            .ok_or_else(|| io::Error::other(format!("{} sent no token", side.name)))?,
        gaps: times.windows(2).map(|pair| pair[1] - pair[0]).collect(),
        tokens: times.len() as u64,
    })
}

/// The bare engine beside itself, each round with the one after it: what is
/// added where nothing is added.
fn noise(base: &Seen) -> Option<Summary> {
    added(base.first_tokens.get(1..)?, &base.first_tokens)
}

/// Which figure a goal is for, so that the worst number of streams is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Figure {
    Speed,
    FirstToken,
    FirstTokenP99,
    SpeedToRouter,
    FirstTokenToRouter,
}

fn goals_of(streams: usize, sides: &[Side], seen: &[Seen]) -> Vec<(&'static str, Figure, Goal)> {
    let mut goals = Vec::new();
    let place = |part: &str| sides.iter().position(|side| side.name.contains(part));
    let Some(own) = place("orchestratord") else {
        return goals;
    };
    let (name, own, base) = (sides[own].name, &seen[own], &seen[0]);
    let at = match streams {
        1 => "at 1 stream".to_owned(),
        streams => format!("at {streams} streams"),
    };
    let named = |what: &str| format!("overhead, 1 to 8 streams: {what}, {name}");
    let speed = Goal::at_least(named("tokens/s to direct"), 0.99)
        .median(ratios(&own.tokens_per_second, &base.tokens_per_second));
    goals.push((name, Figure::Speed, speed.noted(at.clone())));
    let first = added(&own.first_tokens, &base.first_tokens);
    let median = Goal::at_most(named("added to first token, median"), 1.0).in_unit("ms", 2);
    let p99 = Goal::at_most(named("added to first token, p99"), 3.0).in_unit("ms", 2);
    if let Some(first) = first {
        goals.push((
            name,
            Figure::FirstToken,
            median.seen(first.median).noted(at.clone()),
        ));
        let alone = noise(base).map_or(f64::NAN, |noise| noise.p99);
        let note = format!("{at}; direct beside itself: {alone:.2}");
        goals.push((name, Figure::FirstTokenP99, p99.seen(first.p99).noted(note)));
    }
    if let Some(router) = place("router").map(|router| &seen[router]) {
        let speed = Goal::at_least(named("tokens/s to router mode"), 1.0)
            .median(ratios(&own.tokens_per_second, &router.tokens_per_second));
        goals.push((name, Figure::SpeedToRouter, speed.noted(at.clone())));
        let first = added(&own.first_tokens, &router.first_tokens);
        let goal =
            Goal::at_most(named("first token after router mode's, median"), 0.0).in_unit("ms", 2);
        goals.extend(first.map(|first| {
            let goal = goal.seen(first.median).noted(at);
            (name, Figure::FirstTokenToRouter, goal)
        }));
    }
    goals
}

/// Of each side's figures the one at the number of streams where it is worst.
fn worst_of_all(mut goals: Vec<(&'static str, Figure, Goal)>) -> Vec<Goal> {
    let mut all = Vec::new();
    while let Some((name, figure, _)) = goals.first() {
        let kind = (*name, *figure);
        let (same, rest): (Vec<_>, Vec<_>) = goals
            .into_iter()
            .partition(|(name, figure, _)| (*name, *figure) == kind);
        all.extend(worst(same.into_iter().map(|(_, _, goal)| goal)));
        goals = rest;
    }
    all
}

fn table(streams: usize, sides: &[Side], seen: &[Seen]) -> Table {
    let flat = |seen: &Seen| {
        seen.first_tokens
            .iter()
            .flatten()
            .copied()
            .collect::<Vec<_>>()
    };
    let base = &seen[0];
    let rows = sides
        .iter()
        .zip(seen)
        .enumerate()
        .map(|(place, (side, seen))| {
            let added = if place == 0 {
                noise(base)
            } else {
                added(&seen.first_tokens, &base.first_tokens)
            };
            let added = added.unwrap_or_default();
            let (first, gaps) = (
                Summary::of(flat(seen)),
                Summary::of(seen.gaps.iter().copied()),
            );
            vec![
                Cell::text(side.name),
                Cell::spread(ratios(&seen.tokens_per_second, &base.tokens_per_second)),
                Cell::figure(added.median, 2),
                Cell::figure(added.p99, 2),
                Cell::figure(first.p99 - Summary::of(flat(base)).p99, 2),
                Cell::summary(Summary::some(seen.tokens_per_second.iter().copied()), 1),
                Cell::summary(Some(first), 1),
                Cell::figure(gaps.median, 2),
                Cell::figure(gaps.p99, 2),
            ]
        });
    let columns = [
        "side",
        "tokens/s to direct",
        "added first token ms",
        "added, p99",
        "p99 less direct's",
        "tokens/s",
        "first token ms",
        "gap p50 ms",
        "gap p99 ms",
    ];
    let requests: usize = base.first_tokens.iter().map(Vec::len).sum();
    Table {
        name: format!(
            "overhead, {}, {streams} at a time, {requests} requests to each side",
            sides.last().map_or("", |side| side.name)
        ),
        columns: columns.map(str::to_owned).to_vec(),
        rows: rows.collect(),
        plotted: vec![5, 6],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn side(name: &'static str) -> Side {
        Side {
            name,
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            api: Api::Chat,
            model: None,
        }
    }

    fn seen(first: f64, speed: f64) -> Seen {
        Seen {
            first_tokens: vec![vec![first], vec![first + 1.0]],
            tokens_per_second: vec![speed, speed],
            gaps: vec![1.0],
        }
    }

    #[test]
    fn the_worst_number_of_streams_is_what_counts() {
        let sides = [
            side("llama-server"),
            side("its router mode"),
            side("orchestratord /v1"),
        ];
        let at = |streams, first, speed| {
            let seen = [seen(10.0, 100.0), seen(12.0, 90.0), seen(first, speed)];
            goals_of(streams, &sides, &seen)
        };
        let goals = worst_of_all([at(1, 10.5, 100.0), at(2, 14.0, 95.0)].concat());
        assert_eq!(goals.len(), 5);
        let found = |part: &str| goals.iter().find(|goal| goal.name.contains(part)).unwrap();
        let near = |goal: &Goal, right: f64| (goal.measured.unwrap() - right).abs() < 1e-9;
        assert!(near(found("tokens/s to direct"), 0.95));
        assert!(near(found("first token, median"), 4.0));
        assert!(found("first token, p99").note.contains("at 2 streams"));
        assert_eq!(found("tokens/s to router").reached(), Some(true));
        assert!(near(found("after router mode"), 2.0));
    }

    #[test]
    fn the_bare_engines_row_shows_the_noise() {
        let sides = [side("llama-server"), side("orchestratord /v2")];
        let table = table(1, &sides, &[seen(10.0, 100.0), seen(12.0, 90.0)]);
        assert_eq!(table.rows[0][2].value, Some(1.0));
        assert_eq!(table.rows[1][2].value, Some(2.0));
        assert!(table.name.contains("2 requests"));
    }

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
