//! One run of one side at one operating point, and what everybody used in it.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use futures::future::{join, try_join_all};

use crate::http::Connection;
use crate::points::Point;
use crate::processes::{cpu_seconds, family, forget_peak, name, peak_bytes};
use crate::sides::{Ask, Side};

/// After the last stream's first token, before CPU time counts.
const WARM_UP: Duration = Duration::from_millis(250);

/// Of all tokens, those after which a rate's window ends: no stream ends in it.
const WINDOW_ENDS_AT: f64 = 0.9;

/// What one run came to.
#[derive(Debug, Clone, Copy)]
pub struct Run {
    pub tokens_per_second: f64,
    /// CPU seconds of the relay per million tokens: in the window at a rate,
    /// over the whole run flat out. None for the engine itself.
    pub cpu_per_million: Option<f64>,
    /// Over the whole run, the setting up of its streams included.
    pub whole_cpu_per_million: Option<f64>,
    /// How many cores each kept busy.
    pub relay_cores: f64,
    pub engine_cores: f64,
    pub client_cores: f64,
    pub peak_bytes: u64,
    /// Tokens that did not come, or came twice.
    pub lost: u64,
}

/// Whose CPU time is read.
#[derive(Debug)]
pub struct Watched {
    relay: Vec<u32>,
    engine: Vec<u32>,
    client: Vec<u32>,
}

impl Watched {
    /// The engine behind a daemon is its child, and none of the relay's own.
    pub fn new(relay: Option<u32>, engine: u32) -> Self {
        let mut relay = relay.map(family).unwrap_or_default();
        relay.retain(|pid| *pid != engine && name(*pid) != "llama-server");
        Self {
            relay,
            engine: vec![engine],
            client: vec![std::process::id()],
        }
    }

    fn read(&self, tokens: u64) -> Reading {
        Reading {
            at: Instant::now(),
            tokens,
            relay: cpu_seconds(&self.relay),
            engine: cpu_seconds(&self.engine),
            client: cpu_seconds(&self.client),
        }
    }
}

/// What everybody had used at one moment.
#[derive(Debug, Clone, Copy)]
struct Reading {
    at: Instant,
    tokens: u64,
    relay: f64,
    engine: f64,
    client: f64,
}

impl Reading {
    fn relay_per_million(&self, since: &Self) -> f64 {
        (self.relay - since.relay) * 1e6 / (self.tokens - since.tokens).max(1) as f64
    }
}

/// What the streams of a run tell its clock.
#[derive(Debug, Default)]
struct Progress {
    tokens: Cell<u64>,
    running: Cell<u32>,
    over: Cell<bool>,
}

/// Asks for all streams of a point at once and reads them to their ends.
pub async fn measure(side: &Side, watched: &Watched, point: Point) -> io::Result<Run> {
    watched.relay.iter().copied().for_each(forget_peak);
    let ask = Ask {
        prompt: "go".to_owned(),
        max_tokens: point.tokens,
    };
    let progress = Progress::default();
    let begun = watched.read(0);
    let streams = async {
        let streams = (0..point.streams).map(|_| stream(side, &ask, &progress));
        let ended = try_join_all(streams).await;
        progress.over.set(true);
        ended
    };
    let (ended, steady) = join(streams, window(&progress, watched, point)).await;
    ended?;
    let over = watched.read(progress.tokens.get());
    let (from, to) = steady.unwrap_or((begun, over));
    let took = (to.at - from.at).as_secs_f64();
    let relays = !watched.relay.is_empty();
    Ok(Run {
        tokens_per_second: (to.tokens - from.tokens) as f64 / took,
        cpu_per_million: relays.then(|| to.relay_per_million(&from)),
        whole_cpu_per_million: relays.then(|| over.relay_per_million(&begun)),
        relay_cores: (to.relay - from.relay) / took,
        engine_cores: (to.engine - from.engine) / took,
        client_cores: (to.client - from.client) / took,
        peak_bytes: watched.relay.iter().map(|pid| peak_bytes(*pid)).sum(),
        lost: point.all_tokens().abs_diff(over.tokens),
    })
}

async fn stream(side: &Side, ask: &Ask, progress: &Progress) -> io::Result<()> {
    let mut connection = Connection::open(side.address).await?;
    let mut runs = false;
    let seen = || {
        progress.tokens.set(progress.tokens.get() + 1);
        if !runs {
            runs = true;
            progress.running.set(progress.running.get() + 1);
        }
    };
    side.stream(&mut connection, ask, seen).await
}

/// At a rate: two readings between which all streams run, none begins and none
/// ends. `None` flat out, or where the streams ended before.
async fn window(
    progress: &Progress,
    watched: &Watched,
    point: Point,
) -> Option<(Reading, Reading)> {
    const LOOK: Duration = Duration::from_millis(5);
    if point.flat_out() {
        return None;
    }
    while progress.running.get() < point.streams {
        if progress.over.get() {
            return None;
        }
        tokio::time::sleep(LOOK).await;
    }
    tokio::time::sleep(WARM_UP).await;
    let from = watched.read(progress.tokens.get());
    let last = (point.all_tokens() as f64 * WINDOW_ENDS_AT) as u64;
    if from.tokens >= last {
        return None;
    }
    while progress.tokens.get() < last {
        if progress.over.get() {
            return None;
        }
        tokio::time::sleep(LOOK).await;
    }
    Some((from, watched.read(progress.tokens.get())))
}
