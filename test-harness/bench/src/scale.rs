//! Ten thousand queued tasks, and ten thousand open readers.

use std::io;
use std::path::Path;
use std::time::Instant;

use futures::future::try_join_all;
use serde_json::Value;
use tokio::sync::oneshot;

use crate::http::{Connection, find};
use crate::processes::resident_bytes;
use crate::relay;
use crate::report::{Cell, Table};
use crate::sides::checked;
use crate::stats::Summary;

const KIB: f64 = 1024.0;

/// Connections that submit side by side.
const SUBMITTERS: usize = 8;

/// What was seen.
struct Seen {
    idle_bytes: u64,
    admitted_in: f64,
    /// Of the first and the last tenth of all tasks, each.
    first_tenth_ms: f64,
    last_tenth_ms: f64,
    bytes_per_task: f64,
    bytes_per_reader: f64,
    woken_in: f64,
    count: usize,
}

pub async fn run(dir: &Path, quick: bool, descriptors: u64) -> io::Result<Vec<Table>> {
    // Each reader takes one descriptor here and one there.
    let most = usize::try_from(descriptors)
        .unwrap_or(usize::MAX)
        .saturating_sub(500);
    let count = if quick { 1000 } else { 10_000 }.min(most);
    let daemon = relay::endless(dir).await?;
    let pid = daemon.process.pid();
    let idle_bytes = resident_bytes(pid);
    let begun = Instant::now();
    let submitted = submit(daemon.address, count).await?;
    let admitted_in = begun.elapsed().as_secs_f64();
    let with_tasks = resident_bytes(pid);
    let readers = read_all(daemon.address, &submitted).await?;
    let with_readers = resident_bytes(pid);
    let begun = Instant::now();
    let mut connection = Connection::open(daemon.address).await?;
    checked(
        &mut connection,
        "POST",
        "/v2/pools/default/drain",
        r#"{"deadline_ms":0}"#,
    )
    .await?;
    for reader in readers {
        reader.await.map_err(io::Error::other)??;
    }
    let woken_in = begun.elapsed().as_secs_f64();
    let tenth = count / 10;
    let mean = |times: &[(String, f64)]| Summary::of(times.iter().map(|(_, ms)| *ms)).median;
    let seen = Seen {
        idle_bytes,
        admitted_in,
        first_tenth_ms: mean(&submitted[..tenth]),
        last_tenth_ms: mean(&submitted[count - tenth..]),
        bytes_per_task: with_tasks.saturating_sub(idle_bytes) as f64 / count as f64,
        bytes_per_reader: with_readers.saturating_sub(with_tasks) as f64 / count as f64,
        woken_in,
        count,
    };
    Ok(vec![table(&seen)])
}

/// Submits so many tasks; each one's stream and how long its admission took,
/// in milliseconds, in about the order of admission.
async fn submit(address: std::net::SocketAddr, count: usize) -> io::Result<Vec<(String, f64)>> {
    let submitters = (0..SUBMITTERS).map(|own| async move {
        let mut connection = Connection::open(address).await?;
        let mut seen = Vec::new();
        for index in (own..count).step_by(SUBMITTERS) {
            let begun = Instant::now();
            let body = r#"{"prompt":"go","max_tokens":1000}"#;
            let answer = checked(&mut connection, "POST", "/v2/tasks", body).await?;
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
async fn read_all(address: std::net::SocketAddr, tasks: &[(String, f64)]) -> io::Result<Readers> {
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

fn table(seen: &Seen) -> Table {
    let row =
        |name: &str, value: f64, decimals| vec![Cell::text(name), Cell::figure(value, decimals)];
    Table {
        name: format!("scale, {} queued tasks and readers", seen.count),
        columns: vec!["what".to_owned(), "figure".to_owned()],
        rows: vec![
            row("idle, MiB", seen.idle_bytes as f64 / KIB / KIB, 1),
            row("all admitted in, s", seen.admitted_in, 3),
            row(
                "admission of the last tenth to the first",
                seen.last_tenth_ms / seen.first_tenth_ms,
                2,
            ),
            row("for each queued task, KiB", seen.bytes_per_task / KIB, 2),
            row("for each reader, KiB", seen.bytes_per_reader / KIB, 2),
            row("all readers ended in, s", seen.woken_in, 3),
        ],
        plotted: 1,
    }
}
