//! Ten thousand queued tasks, and ten thousand open readers.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::goals::Goal;
use crate::http::{Connection, find};
use crate::points::Point;
use crate::processes::resident_bytes;
use crate::report::{Cell, Table};
use crate::scripted::Scripted;
use crate::sides::{POOL, checked};
use crate::stats::Summary;
use crate::{Context, Measured};

const KIB: f64 = 1024.0;

/// Connections that submit side by side.
const SUBMITTERS: usize = 8;

/// Fresh daemons that are measured, at the most: each takes some seconds.
const MOST_ROUNDS: usize = 3;

/// Lengths of the queue that are told apart.
const STEPS: usize = 10;

/// How long a daemon or its readers are left alone before memory is read.
const SETTLE: Duration = Duration::from_secs(1);

/// What was seen of one daemon.
struct Seen {
    idle_bytes: u64,
    /// In seconds.
    admitted_in: f64,
    /// Median milliseconds of an admission, for each tenth of all tasks.
    steps_ms: Vec<f64>,
    bytes_per_task: f64,
    bytes_per_reader: f64,
    /// In seconds.
    opened_in: f64,
    /// In seconds.
    woken_in: f64,
}

pub async fn run(context: &Context<'_>) -> io::Result<Measured> {
    let wanted = context.size.pick(10_000, 1000, 500);
    let count = wanted.min(most_readers(context.descriptors));
    let scripted = Scripted::install(context.dir, context.engine)?;
    // One slot that its task never leaves.
    scripted.set(Point {
        name: "endless",
        streams: 1,
        tokens_per_second: 1,
        tokens: 1_000_000,
    })?;
    let mut rounds = Vec::new();
    for _ in 0..context.rounds.min(MOST_ROUNDS) {
        rounds.push(round(context, &scripted, count).await?);
    }
    let mut measured = Measured {
        tables: vec![table(count, &rounds), queue_table(count, &rounds)],
        goals: goals(count, &rounds),
        with: Vec::new(),
    };
    if count < wanted {
        let cut =
            format!("{wanted} tasks and readers need more file descriptors: {count} were measured");
        measured.with.push(cut);
    }
    Ok(measured)
}

/// Each reader takes one descriptor here and one there.
fn most_readers(descriptors: u64) -> usize {
    let most = usize::try_from(descriptors).unwrap_or(usize::MAX);
    most.saturating_sub(500)
}

async fn round(context: &Context<'_>, scripted: &Scripted, count: usize) -> io::Result<Seen> {
    let daemon = scripted.daemon(context.dir, 1).await?;
    let pid = daemon.process.pid();
    tokio::time::sleep(SETTLE).await;
    let idle_bytes = resident_bytes(pid);
    let begun = Instant::now();
    let submitted = submit(daemon.address, count).await?;
    let admitted_in = begun.elapsed().as_secs_f64();
    let with_tasks = resident_bytes(pid);
    let begun = Instant::now();
    let readers = read_all(daemon.address, &submitted).await?;
    let opened_in = begun.elapsed().as_secs_f64();
    tokio::time::sleep(SETTLE).await;
    let with_readers = resident_bytes(pid);
    let woken_in = wake_all(daemon.address, readers).await?;
    let step = (count / STEPS).max(1);
    let steps = submitted.chunks(step).take(STEPS);
    Ok(Seen {
        idle_bytes,
        admitted_in,
        steps_ms: steps
            .map(|step| Summary::of(step.iter().map(|(_, ms)| *ms)).median)
            .collect(),
        bytes_per_task: with_tasks.saturating_sub(idle_bytes) as f64 / count as f64,
        bytes_per_reader: with_readers.saturating_sub(with_tasks) as f64 / count as f64,
        opened_in,
        woken_in,
    })
}

/// Ends all tasks at once; how long it takes until the last reader has the end
/// of its task, in seconds.
async fn wake_all(address: SocketAddr, readers: Readers) -> io::Result<f64> {
    let mut connection = Connection::open(address).await?;
    let begun = Instant::now();
    let path = format!("/v2/pools/{POOL}/drain");
    checked(&mut connection, "POST", &path, r#"{"deadline_ms":0}"#).await?;
    for reader in readers {
        reader.await.map_err(io::Error::other)??;
    }
    Ok(begun.elapsed().as_secs_f64())
}

/// Submits so many tasks; each one's stream and how long its admission took,
/// in milliseconds, in about the order of admission.
async fn submit(address: SocketAddr, count: usize) -> io::Result<Vec<(String, f64)>> {
    let submitters = (0..SUBMITTERS).map(|own| async move {
        let mut connection = Connection::open(address).await?;
        let mut seen = Vec::new();
        for index in (own..count).step_by(SUBMITTERS) {
            let begun = Instant::now();
            let body = format!(r#"{{"pool_id":"{POOL}","prompt":"go","max_tokens":1000}}"#);
            let answer = checked(&mut connection, "POST", "/v2/tasks", &body).await?;
            let took = begun.elapsed().as_secs_f64() * 1000.0;
            let accepted: Value = serde_json::from_str(&answer)?;
            let stream = accepted["streams"]["sse"].as_str().unwrap_or_default();
            seen.push((index, (stream.to_owned(), took)));
        }
        Ok::<_, io::Error>(seen)
    });
    let mut all: Vec<_> = try_join_all(submitters)
        .await?
        .into_iter()
        .flatten()
        .collect();
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, seen)| seen).collect())
}

type Readers = Vec<tokio::task::JoinHandle<io::Result<()>>>;

/// Opens a reader for each task; returns when all are open.
async fn read_all(address: SocketAddr, tasks: &[(String, f64)]) -> io::Result<Readers> {
    let (mut readers, mut opened) = (Vec::new(), Vec::new());
    for (path, _) in tasks {
        let (open, is_open) = oneshot::channel();
        let path = path.clone();
        readers.push(tokio::spawn(async move {
            let mut connection = Connection::open(address).await?;
            let status = connection.send("GET", &path, "").await?;
            let _ = open.send(());
            let mut over = false;
            connection
                .events(|event| {
                    let ends = |name: &[u8]| find(event, name).is_some();
                    over |= ends(b"event: end") || ends(b"event: error");
                })
                .await?;
            if status == 200 && over {
                Ok(())
            } else {
                Err(io::Error::other(format!(
                    "a reader ended early, with {status}"
                )))
            }
        }));
        opened.push(is_open);
        if opened.len() == 64 {
            // Not more at once than a listening socket keeps waiting.
            for is_open in opened.drain(..) {
                is_open
                    .await
                    .map_err(|_| io::Error::other("a reader could not be opened"))?;
            }
        }
    }
    for is_open in opened {
        is_open
            .await
            .map_err(|_| io::Error::other("a reader could not be opened"))?;
    }
    Ok(readers)
}

fn summary(rounds: &[Seen], of: impl Fn(&Seen) -> f64) -> Option<Summary> {
    Summary::some(rounds.iter().map(of))
}

fn last_to_first(seen: &Seen) -> f64 {
    match seen.steps_ms.as_slice() {
        [first, .., last] => last / first,
        _ => f64::NAN,
    }
}

fn goals(count: usize, rounds: &[Seen]) -> Vec<Goal> {
    let of = |of: fn(&Seen) -> f64| summary(rounds, of);
    let mib = |seen: &Seen| seen.idle_bytes as f64 / KIB / KIB;
    vec![
        Goal::at_most(format!("scale: each of {count} queued tasks"), 4.0)
            .in_unit("KiB", 2)
            .median(of(|seen| seen.bytes_per_task / KIB)),
        Goal::at_most(format!("scale: each of {count} open readers"), 16.0)
            .in_unit("KiB", 2)
            .median(of(|seen| seen.bytes_per_reader / KIB)),
        Goal::at_most("scale: 10,000 admissions", 1.0)
            .in_unit("s", 3)
            .median(summary(rounds, |seen| {
                seen.admitted_in * 10_000.0 / count as f64
            }))
            .noted(format!("{count} on {SUBMITTERS} connections")),
        Goal::at_most("scale: resident memory when idle", 20.0)
            .in_unit("MiB", 1)
            .median(of(mib)),
    ]
}

fn table(count: usize, rounds: &[Seen]) -> Table {
    let row = |name: &str, of: fn(&Seen) -> f64, decimals| {
        vec![
            Cell::text(name),
            Cell::summary(summary(rounds, of), decimals),
        ]
    };
    let admitted = format!("all admitted on {SUBMITTERS} connections, s");
    let mib = |seen: &Seen| seen.idle_bytes as f64 / KIB / KIB;
    Table {
        name: format!("scale, {count} queued tasks and readers"),
        columns: vec!["what".to_owned(), "figure".to_owned()],
        rows: vec![
            row("idle, MiB", mib, 1),
            row(&admitted, |seen| seen.admitted_in, 3),
            row("admission of the last tenth to the first", last_to_first, 2),
            row(
                "for each queued task, KiB",
                |seen| seen.bytes_per_task / KIB,
                2,
            ),
            row(
                "for each reader, KiB",
                |seen| seen.bytes_per_reader / KIB,
                2,
            ),
            row("all readers opened in, s", |seen| seen.opened_in, 3),
            row("all readers ended in, s", |seen| seen.woken_in, 3),
        ],
        // Units differ from row to row.
        plotted: Vec::new(),
    }
}

/// What an admission costs in a queue of so many.
fn queue_table(count: usize, rounds: &[Seen]) -> Table {
    let steps = rounds.first().map_or(0, |seen| seen.steps_ms.len());
    let row = |step: usize| {
        let at = |seen: &Seen| seen.steps_ms.get(step).copied().unwrap_or(f64::NAN);
        let to_first = summary(rounds, |seen| at(seen) / seen.steps_ms[0]);
        let length = count / STEPS * step;
        vec![
            Cell::text(format!("{length} and more")),
            Cell::spread(to_first),
            Cell::summary(summary(rounds, at), 3),
        ]
    };
    Table {
        name: "scale, one admission by the queue's length".to_owned(),
        columns: ["queued before", "to the first", "ms"]
            .map(str::to_owned)
            .to_vec(),
        rows: (0..steps).map(row).collect(),
        plotted: vec![2],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(steps_ms: Vec<f64>) -> Seen {
        Seen {
            idle_bytes: 10 * 1024 * 1024,
            admitted_in: 0.05,
            steps_ms,
            bytes_per_task: 2048.0,
            bytes_per_reader: 8192.0,
            opened_in: 0.1,
            woken_in: 0.1,
        }
    }

    #[test]
    fn a_shorter_queue_is_scaled_to_the_goals_length() {
        let goals = goals(500, &[seen(vec![1.0, 2.0])]);
        let measured: Vec<f64> = goals.iter().filter_map(|goal| goal.measured).collect();
        let right = [2.0, 8.0, 1.0, 10.0];
        assert_eq!(measured.len(), right.len());
        let near = |(seen, right): (&f64, &f64)| (seen - right).abs() < 1e-9;
        assert!(measured.iter().zip(&right).all(near), "{measured:?}");
    }

    #[test]
    fn the_queues_cost_is_told_by_its_length() {
        let table = queue_table(1000, &[seen(vec![1.0, 3.0])]);
        assert_eq!(table.rows.len(), 2);
        assert_eq!(table.rows[1][0].shown, "100 and more");
        assert_eq!(table.rows[1][1].value, Some(3.0));
        assert!(last_to_first(&seen(Vec::new())).is_nan());
    }

    #[test]
    fn descriptors_bound_the_readers() {
        assert_eq!(most_readers(1024), 524);
        assert_eq!(most_readers(10), 0);
    }
}
