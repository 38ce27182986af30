//! What a client of a real engine notices of a layer in front of it: time to
//! first token, pauses between tokens, tokens per second.
//!
//! Two comparisons, one after the other: tasks beside `/completion` of the bare
//! engine with the same prompt, and `/v1` beside its own `/v1` and its router
//! mode. Every side has an engine process of its own with the same flags, and
//! within a comparison each of them is asked exactly the same in the same order:
//! so their prompt caches hold the same at every moment, and no side profits
//! from what another one has asked.
//!
//! A real engine's times move by more than a layer may add. So the same is asked once
//! more of `bench-engine`, which takes as long for each token every time.

mod engine;
mod outcome;

use std::io;
use std::path::Path;
use std::time::Instant;

use futures::future::try_join_all;
use serde_json::{Value, json};

pub use self::engine::{Provided, provided};
use self::engine::{direct, router};
use self::outcome::{Engine, Point, STEADY_MS, Seen, goals_of, table, worst_of_all};
use crate::http::Client;
use crate::points::Size;
use crate::scripted::Scripted;
use crate::sides::{Api, Ask, Daemon, Side};
use crate::stats::turns;
use crate::{Context, Measured, machine};

const SLOTS: u32 = 8;

const STREAMS: [usize; 4] = [1, 2, 4, 8];

/// Of a request that is asked for its first token.
const SHORT_TOKENS: u32 = 2;

/// Rounds of the real engine for the tokens per second, to each that the run has: they
/// differ by several per cent, and the more tokens one has the less.
const fn long_rounds(streams: usize) -> usize {
    if streams < 4 { 2 } else { 1 }
}

/// Tokens of one answer in such a round.
const LONG_TOKENS: u32 = 16;

/// What one stream came to, in milliseconds but for the tokens.
#[derive(Debug, Clone, Default)]
struct Stream {
    first_token: f64,
    gaps: Vec<f64>,
    tokens: u64,
}

/// Sides that are compared with the first of them.
struct Comparison {
    engine: Engine,
    /// The bare engine first.
    sides: Vec<Side>,
    /// Before every prompt, so that two comparisons share none.
    sign: char,
}

impl Comparison {
    /// For each side as many as ask it at once.
    fn clients(&self) -> Vec<Vec<Client>> {
        let of_side = |side: &Side| (0..SLOTS).map(|_| Client::new(side.address)).collect();
        self.sides.iter().map(of_side).collect()
    }
}

pub async fn run(context: &Context<'_>) -> io::Result<Measured> {
    let mut measured = Measured::default();
    let mut points = real(context, &mut measured).await?;
    points.extend(steady(context, &mut measured).await?);
    measured.goals = worst_of_all(points);
    Ok(measured)
}

/// The real engine, bare, in its router mode and behind the daemon.
async fn real(context: &Context<'_>, measured: &mut Measured) -> io::Result<Vec<Point>> {
    let daemon = Daemon::start(context.dir, &pool(context)?).await?;
    let provided = provided(&daemon.pool().await?)?;
    let (_direct, direct) = direct(context.dir, &provided).await?;
    let (_router, router) = router(context.dir, &provided).await?;
    if context.size != Size::Smoke {
        let version = machine::engine(Path::new(&provided.program));
        let version = version.map(|version| format!("llama-server {version}"));
        measured.with.extend(version);
        let threads = context.threads;
        let model = format!("model `haiku`, threads {threads}");
        measured.with.push(model);
    }
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
            engine: Engine::Real,
            sides: vec![
                side("llama-server /completion", direct, Api::Completion),
                side("orchestratord /v2", daemon.address, Api::Tasks),
            ],
            sign: 'A',
        },
        Comparison {
            engine: Engine::Real,
            sides: vec![
                side("llama-server /v1", direct, Api::Chat),
                side("its router mode /v1", router, Api::Chat),
                side("orchestratord /v1", daemon.address, Api::Chat),
            ],
            sign: 'B',
        },
    ];
    take(&comparisons, context, measured).await
}

/// `bench-engine` at a steady pace, bare and behind the daemon.
async fn steady(context: &Context<'_>, measured: &mut Measured) -> io::Result<Vec<Point>> {
    let dir = context.dir.join("steady");
    std::fs::create_dir_all(&dir)?;
    let scripted = Scripted::install(&dir, context.engine)?;
    scripted.set_steady(STEADY_MS)?;
    let daemon = scripted.daemon(&dir, SLOTS).await?;
    let (bare, _) = daemon.engine().await?;
    let comparison = |names: [&'static str; 2], apis: [Api; 2], sign| {
        let sides = [
            (names[0], bare, apis[0]),
            (names[1], daemon.address, apis[1]),
        ];
        Comparison {
            engine: Engine::Steady,
            sides: sides
                .map(|(name, address, api)| Side {
                    name,
                    address,
                    api,
                    model: None,
                })
                .into(),
            sign,
        }
    };
    let comparisons = [
        comparison(
            ["bench-engine /completion", "orchestratord /v2"],
            [Api::Completion, Api::Tasks],
            'C',
        ),
        comparison(
            ["bench-engine /v1", "orchestratord /v1"],
            [Api::Chat, Api::Chat],
            'D',
        ),
    ];
    take(&comparisons, context, measured).await
}

/// All comparisons, one after the other.
async fn take(
    comparisons: &[Comparison],
    context: &Context<'_>,
    measured: &mut Measured,
) -> io::Result<Vec<Point>> {
    let mut points = Vec::new();
    for comparison in comparisons {
        let (engine, sides) = (comparison.engine, &comparison.sides);
        let mut clients = comparison.clients();
        for (side, clients) in sides.iter().zip(&mut clients) {
            // The model is paged in, the router has loaded it.
            let sign = format!("{}000", comparison.sign);
            round(side, &mut clients[..1], SHORT_TOKENS, &sign).await?;
        }
        for streams in STREAMS {
            let seen = compare(comparison, &mut clients, streams, context).await?;
            measured.tables.push(table(engine, streams, sides, &seen));
            points.extend(goals_of(engine, streams, sides, &seen));
        }
    }
    Ok(points)
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
    clients: &mut [Vec<Client>],
    streams: usize,
    context: &Context<'_>,
) -> io::Result<Vec<Seen>> {
    let sides = &comparison.sides;
    let mut seen = vec![Seen::default(); sides.len()];
    let (requests, long) = match (comparison.engine, context.size) {
        (Engine::Real, Size::Full) => (24, context.rounds * long_rounds(streams)),
        (_, size) => (size.pick(60, 24, 4), context.rounds),
    };
    let short = requests.max(streams) / streams;
    for number in 0..short + long {
        let tokens = if number < short {
            SHORT_TOKENS
        } else {
            LONG_TOKENS
        };
        let sign = format!("{}{streams}{number:03}", comparison.sign);
        for turn in turns(sides.len(), number) {
            let begun = Instant::now();
            let clients = &mut clients[turn][..streams];
            let round = round(&sides[turn], clients, tokens, &sign).await?;
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

/// All streams at once; `sign` tells this round's prompts from all others, from
/// their first characters on.
async fn round(
    side: &Side,
    clients: &mut [Client],
    tokens: u32,
    sign: &str,
) -> io::Result<Vec<Stream>> {
    let all = clients.iter_mut().enumerate().map(|(index, client)| {
        let ask = Ask {
            prompt: format!("{index}{sign}: Tell a long story."),
            max_tokens: tokens,
        };
        stream(side, client, ask)
    });
    try_join_all(all).await
}

/// From the request, with its connection where there is none, to the end of the answer.
async fn stream(side: &Side, client: &mut Client, ask: Ask) -> io::Result<Stream> {
    let begun = Instant::now();
    let connection = client.connection().await?;
    let mut times = Vec::new();
    side.stream(connection, &ask, || {
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
