//! What a token costs on its way through: tokens per second and CPU seconds
//! per million tokens of the relay alone, at named operating points.

use std::io;
use std::net::SocketAddr;

use crate::goals::Goal;
use crate::place::{Process, on_path};
use crate::points::{Point, points};
use crate::report::{Cell, Table};
use crate::scripted::Scripted;
use crate::sides::{Api, Side, nginx, until_serving};
use crate::stats::{Summary, ratios, turns};
use crate::window::{Run, Watched, measure};
use crate::{Context, Measured};

/// The most that an engine has.
const SLOTS: u32 = 256;

/// A side and the process that relays.
struct Relay {
    side: Side,
    pid: Option<u32>,
    /// The name of the side that relays the same events of the engine.
    base: Option<&'static str>,
}

const NGINX_NATIVE: &str = "nginx /completion";
const NGINX_CHAT: &str = "nginx /v1";
const OWN: [&str; 2] = ["orchestratord /v2", "orchestratord /v1"];

pub async fn run(context: &Context<'_>) -> io::Result<Measured> {
    let scripted = Scripted::install(context.dir, context.engine)?;
    let daemon = scripted.daemon(context.dir, SLOTS).await?;
    let (engine, engine_pid) = daemon.engine().await?;
    let nginx = start_nginx(context, engine).await?;
    let relays = relays(
        engine,
        (daemon.address, daemon.process.pid()),
        nginx
            .as_ref()
            .map(|(process, address)| (*address, process.pid())),
    );
    let mut measured = Measured::default();
    for point in points(context.size) {
        scripted.set(point)?;
        let mut runs: Vec<Vec<Run>> = vec![Vec::new(); relays.len()];
        for round in 0..context.rounds {
            for turn in turns(relays.len(), round) {
                let relay = &relays[turn];
                if relay.pid.is_none() && !point.flat_out() {
                    // Its rate is its own; only how fast it can be tells something.
                    continue;
                }
                let watched = Watched::new(relay.pid, engine_pid);
                runs[turn].push(measure(&relay.side, &watched, point).await?);
            }
        }
        measured.tables.push(table(point, &relays, &runs));
        measured.goals.extend(goals(point, &relays, &runs));
    }
    Ok(measured)
}

/// Addresses and processes of those that take part.
fn relays(
    engine: SocketAddr,
    daemon: (SocketAddr, u32),
    nginx: Option<(SocketAddr, u32)>,
) -> Vec<Relay> {
    let relay = |name, api, (address, pid): (SocketAddr, Option<u32>), base| Relay {
        side: Side {
            name,
            address,
            api,
            model: None,
        },
        pid,
        base,
    };
    let (bare, own) = ((engine, None), (daemon.0, Some(daemon.1)));
    let mut relays = vec![
        relay("engine itself", Api::Chat, bare, None),
        relay(OWN[0], Api::Tasks, own, Some(NGINX_NATIVE)),
        relay(OWN[1], Api::Chat, own, Some(NGINX_CHAT)),
    ];
    if let Some((address, pid)) = nginx {
        let other = (address, Some(pid));
        relays.push(relay(NGINX_NATIVE, Api::Completion, other, None));
        relays.push(relay(NGINX_CHAT, Api::Chat, other, None));
    }
    relays
}

async fn start_nginx(
    context: &Context<'_>,
    engine: SocketAddr,
) -> io::Result<Option<(Process, SocketAddr)>> {
    let Some(program) = on_path("nginx") else {
        return Ok(None);
    };
    let (mut process, address) = nginx(&program, context.dir, engine)?;
    until_serving(&mut process, address, "/health").await?;
    Ok(Some((process, address)))
}

/// One figure of every round.
fn each(runs: &[Run], of: impl Fn(&Run) -> Option<f64>) -> Vec<f64> {
    runs.iter().filter_map(of).collect()
}

/// The runs that one side's are compared with.
fn base<'a>(relay: &Relay, relays: &[Relay], runs: &'a [Vec<Run>]) -> Option<&'a [Run]> {
    let place = relays
        .iter()
        .position(|other| Some(other.side.name) == relay.base)?;
    Some(&runs[place])
}

fn compared(own: &[Run], base: Option<&[Run]>, of: fn(&Run) -> Option<f64>) -> Option<Summary> {
    ratios(&each(own, of), &each(base?, of))
}

const SPEED: fn(&Run) -> Option<f64> = |run| Some(run.tokens_per_second);
const COST: fn(&Run) -> Option<f64> = |run| run.cpu_per_million;

fn goals(point: Point, relays: &[Relay], runs: &[Vec<Run>]) -> Vec<Goal> {
    let mut goals = Vec::new();
    for (relay, own) in relays.iter().zip(runs) {
        let Some(base_name) = relay.base else {
            continue;
        };
        let base = base(relay, relays, runs);
        let name = relay.side.name;
        let lost: u64 = own.iter().map(|run| run.lost).sum();
        if !point.flat_out() {
            let goal = Goal::at_most(
                format!("relay, {}: CPU, {name} to {base_name}", point.name),
                1.0,
            );
            goals.push(goal.median(compared(own, base, COST)));
        } else if matches!(point.streams, 16 | 128) {
            let goal = Goal::at_least(
                format!("relay, {}: tokens/s, {name} to {base_name}", point.name),
                1.0,
            );
            goals.push(goal.median(compared(own, base, SPEED)));
        } else if point.streams == 1000 {
            let goal = Goal::at_most(format!("relay, 1,000 streams: tokens lost, {name}"), 0.0);
            goals.push(goal.in_unit("", 0).seen(lost as f64));
        }
    }
    goals
}

fn table(point: Point, relays: &[Relay], runs: &[Vec<Run>]) -> Table {
    let rows = relays.iter().zip(runs).filter(|(_, runs)| !runs.is_empty());
    let rows = rows.map(|(relay, own)| {
        let base = base(relay, relays, runs);
        let summary = |of: fn(&Run) -> Option<f64>| Summary::some(each(own, of));
        let median = |of: fn(&Run) -> f64| Summary::of(own.iter().map(of)).median;
        let cores = [
            relay.pid.map(|_| median(|run| run.relay_cores)),
            Some(median(|run| run.engine_cores)),
            Some(median(|run| run.client_cores)),
        ];
        vec![
            Cell::text(relay.side.name),
            Cell::spread(compared(own, base, SPEED)),
            Cell::spread(compared(own, base, COST)),
            Cell::summary(summary(SPEED), 0),
            Cell::summary(summary(COST), 2),
            Cell::summary(summary(|run| run.whole_cpu_per_million), 2),
            Cell::list(&cores, 2),
            Cell::mebibytes(own.iter().map(|run| run.peak_bytes).max().unwrap_or(0)),
            Cell::count(own.iter().map(|run| run.lost).sum()),
        ]
    });
    Table {
        name: format!("relay, {}, {} tokens each", point.name, point.tokens),
        columns: [
            "side",
            "tokens/s to nginx",
            "CPU to nginx",
            "tokens/s",
            "CPU s per million",
            "with setting up",
            "cores: relay/engine/client",
            "peak MiB",
            "lost",
        ]
        .map(str::to_owned)
        .to_vec(),
        rows: rows.collect(),
        plotted: if point.flat_out() {
            vec![3, 4]
        } else {
            vec![4]
        },
    }
}
