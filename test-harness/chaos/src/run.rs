//! One run: clients, faults one after the other, and the look at what is left.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::{JoinHandle, JoinSet};

use crate::args::Options;
use crate::error::{Failing, HarnessError};
use crate::faults::{self, Fault};
use crate::guests;
use crate::procs;
use crate::report::{Report, Row};
use crate::rng::Rng;
use crate::sampler::{self, Peaks};
use crate::scheduler::Scheduler;
use crate::setup::GUESTS;
use crate::traffic;
use crate::world::{DEATH_LIMIT, World};

/// So many broken promises are enough to look at.
const ENOUGH: usize = 20;
/// How long one fault may take, with everything that it waits for.
const FAULT_LIMIT: Duration = Duration::from_mins(6);
/// How long clients may take to finish once they begin nothing new.
const WIND_DOWN: Duration = Duration::from_secs(170);

/// Takes a line now and then for whoever watches.
pub type Progress<'a> = &'a (dyn Fn(&str) + Sync);

/// Carries a run out. An error says that the harness could not; what was
/// broken stands in the report.
pub async fn run(options: Options, progress: Progress<'_>) -> Result<Report, HarnessError> {
    let chosen = choose(&options)?;
    let dir = tempfile::Builder::new()
        .prefix("orchestratord-chaos-")
        .tempdir();
    let mut dir = dir.map_err(HarnessError::file("cannot make", std::env::temp_dir()))?;
    let world = World::make(options.clone(), dir.path().to_owned()).await?;
    let report = with_daemon(&world, &chosen, progress).await;
    // Whatever happened, nothing of ours stays.
    world.set_over();
    world.keeper.kill9().await;
    let report = report?;
    if options.keep || !report.broken.is_empty() {
        dir.disable_cleanup(true);
    }
    if let Some(path) = &options.json {
        write_json(path, &report)?;
    }
    Ok(report)
}

fn write_json(path: &Path, report: &Report) -> Result<(), HarnessError> {
    let text = serde_json::to_string_pretty(report).unwrap_or_default();
    std::fs::write(path, text).map_err(HarnessError::file("cannot write", path))
}

fn choose(options: &Options) -> Result<Vec<Fault>, HarnessError> {
    let all = faults::all();
    for name in &options.faults {
        if !all.iter().any(|fault| fault.name == name) {
            return Err(HarnessError::NoSuchFault(name.clone()));
        }
    }
    let scripted = options.engine == crate::args::EngineChoice::Scripted;
    let wanted = |fault: &Fault| {
        (options.faults.is_empty() || options.faults.iter().any(|name| name == fault.name))
            && (scripted || !fault.scripted_only)
    };
    let chosen: Vec<Fault> = all.into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        return Err(HarnessError::NoFaults);
    }
    Ok(chosen)
}

async fn with_daemon(
    world: &Arc<World>,
    chosen: &[Fault],
    progress: Progress<'_>,
) -> Result<Report, HarnessError> {
    let begun = Instant::now();
    world.start().await.map_err(no_daemon)?;
    world.settle().await.map_err(no_daemon)?;
    let sampler: JoinHandle<Peaks> = tokio::spawn(sampler::sample(Arc::clone(world)));
    let mut clients = JoinSet::new();
    let mut rng = Rng::new(world.options.seed ^ 0xC11E_0000);
    for _ in 0..world.options.clients {
        clients.spawn(traffic::client(Arc::clone(world), rng.fork()));
    }
    if world.setup.engine.guests.is_some() {
        for _ in GUESTS {
            clients.spawn(guests::client(Arc::clone(world), rng.fork()));
        }
    }
    let rows = inject_all(world, chosen, progress).await;
    wind_down(world, &mut clients).await;
    guests::let_go(world).await;
    sampler::lets_go(world).await;
    // Ended before the daemon is, which it would take for a death.
    world.set_over();
    let peaks = sampler.await.unwrap_or_default();
    at_the_end(world).await;
    world.ledger().finish();
    let broken = world.all_broken();
    Ok(Report::new(world, rows, peaks, broken, begun.elapsed()))
}

fn no_daemon(failing: Failing) -> HarnessError {
    HarnessError::NoDaemon(match failing {
        Failing::Missing(what) => what.to_owned(),
        Failing::Broken { invariant, detail } => format!("{invariant}: {detail}"),
    })
}

async fn inject_all(world: &Arc<World>, chosen: &[Fault], progress: Progress<'_>) -> Vec<Row> {
    let mut rows: Vec<Row> = chosen.iter().map(|fault| Row::new(fault.name)).collect();
    let weights = chosen.iter().map(|fault| fault.weight).collect();
    let mut scheduler = Scheduler::new(weights, world.options.seed);
    let end = Instant::now() + world.options.duration();
    let mut told = Instant::now();
    let mut count = 0u64;
    while Instant::now() < end {
        let Some(pick) = scheduler.pick() else {
            break;
        };
        let (fault, row) = (&chosen[pick.fault], &mut rows[pick.fault]);
        inject(world, fault, pick.rng, row).await;
        count += 1;
        let broken = world.collect_broken();
        if told.elapsed() > Duration::from_secs(10) {
            told = Instant::now();
            progress(&progress_line(world, count, broken, end));
        }
        if broken >= ENOUGH || (broken > 0 && world.options.fail_fast) {
            world.journal.write("enough is broken");
            break;
        }
    }
    rows
}

fn progress_line(world: &World, count: u64, broken: usize, end: Instant) -> String {
    let left = end.saturating_duration_since(Instant::now()).as_secs();
    let ledger = world.ledger();
    let totals = ledger.totals();
    format!(
        "{left:>5} s left: {count} faults, {} tasks ({} completed, {} tokens), {broken} broken",
        totals.admitted, totals.completed, totals.tokens
    )
}

/// Injects one fault, and waits until the pool serves again.
async fn inject(world: &Arc<World>, fault: &Fault, rng: Rng, row: &mut Row) {
    let before = world.collect_broken();
    world.journal.write(format!("fault {}", fault.name));
    row.injected += 1;
    let begun = Instant::now();
    let injected = tokio::time::timeout(FAULT_LIMIT, (fault.inject)(Arc::clone(world), rng)).await;
    let verdict = injected.unwrap_or_else(|_| {
        Err(Failing::broken(
            "a fault is over in time",
            format!("not within {FAULT_LIMIT:?}"),
        ))
    });
    // A fault that was given up half-way leaves no trap for the next one.
    world.source.behave();
    world.script(&crate::setup::healthy());
    if let Some(dir) = &world.setup.engine.script_dir {
        test_harness_fake_engine::orders::take_back(dir);
    }
    let settled = world.settle().await;
    match (&verdict, &settled) {
        (Err(Failing::Missing(what)), _) => {
            row.missing(what);
            if !world.options.allow_missing && row.injected == 0 && row.missing == 1 {
                world.broken(
                    "the daemon has what this fault needs",
                    format!("{}: {what}", fault.name),
                );
            }
        }
        (Ok(note), Ok(again)) => row.note(note, begun.elapsed(), *again),
        _ => {}
    }
    // What the fault itself complains of is the cause of what comes after.
    if let Some(Failing::Broken { invariant, detail }) = verdict.err().or(settled.err()) {
        world.broken(invariant, format!("{}: {detail}", fault.name));
    }
    let broke = world.collect_broken() > before;
    if !broke && row.last_was_injected {
        row.survived += 1;
    }
    world.journal.write(format!(
        "fault {} {} in {:.2} s",
        fault.name,
        if broke { "BROKE a promise" } else { "is over" },
        begun.elapsed().as_secs_f64()
    ));
}

/// Lets the clients finish what they began.
async fn wind_down(world: &World, clients: &mut JoinSet<()>) {
    let limit = tokio::time::Instant::now() + WIND_DOWN;
    world.close();
    while tokio::time::Instant::now() < limit && world.ledger().open_tasks() > 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    clients.abort_all();
    while clients.join_next().await.is_some() {}
}

/// After the last fault: stop in order, and look for what was left behind.
async fn at_the_end(world: &World) {
    let ports = world.keeper.ports();
    if let Err(Failing::Broken { invariant, detail }) = world.stop().await {
        world.broken(invariant, format!("at the end: {detail}"));
    }
    if let Err(Failing::Broken { invariant, detail }) = world.nothing_lives(&[], DEATH_LIMIT).await
    {
        world.broken(invariant, format!("at the end: {detail}"));
    }
    let listening = procs::listening(&ports);
    if !listening.is_empty() {
        world.broken("no port is left open", format!("{listening:?}"));
    }
    let files = faults::leftovers(world);
    if !files.is_empty() {
        world.broken("no file is left after a stop", files.join(", "));
    }
}
