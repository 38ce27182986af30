//! Clients that mean no good, or know no better.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::daemon::offering;
use crate::error::{Failing, Verdict};
use crate::keeper::Up;
use crate::rng::Rng;
use crate::setup::POOL;
use crate::world::World;

/// How soon a daemon must answer others while it is molested.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Within this a client that sends nothing more is let go, where the run has
/// set a limit of two seconds.
const SILENCE_LIMIT: Duration = Duration::from_secs(20);

async fn connect(up: &Up) -> Result<TcpStream, Failing> {
    let address = up.url.trim_start_matches("http://");
    let connected = TcpStream::connect(address).await;
    connected.map_err(|error| Failing::broken("the daemon answers", format!("connect: {error}")))
}

/// Sends bytes, and reads what is answered within a while; a closed connection
/// is an answer too.
async fn exchange(up: &Up, bytes: &[u8]) -> Result<String, Failing> {
    let mut stream = connect(up).await?;
    // The daemon may have closed in the middle, which is its right.
    let _ = stream.write_all(bytes).await;
    let mut answer = vec![0; 4096];
    let read = tokio::time::timeout(Duration::from_millis(1500), stream.read(&mut answer)).await;
    let count = read.ok().and_then(Result::ok).unwrap_or(0);
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

/// No answer may say that the daemon failed.
fn acceptable(world: &World, what: &str, answer: &str) {
    let status = answer
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse::<u16>().ok());
    if status.is_some_and(|status| (200..300).contains(&status) || (status >= 500 && status != 503))
    {
        let start: String = answer.chars().take(200).collect();
        world.broken("nonsense is refused", format!("{what}: {start}"));
    }
}

async fn answers_others(world: &World, up: &Up) -> Verdict {
    let begun = Instant::now();
    let reply = world.ask(up, "GET", "/health", None).await;
    if reply.is_some() && begun.elapsed() > ANSWER_LIMIT {
        return Err(Failing::broken(
            "the daemon answers others meanwhile",
            format!("{:?}", begun.elapsed()),
        ));
    }
    Ok(String::new())
}

pub(super) async fn half_open(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, true, "")?;
    let starts: &[&[u8]] = &[
        b"POST /v2/tas",
        b"POST /v2/tasks HTTP/1.1\r\nHost: x\r\n",
        b"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n{\"prompt\": \"a",
    ];
    let mut held = Vec::new();
    let count = rng.between(10, 30);
    for _ in 0..count {
        let mut stream = connect(&up).await?;
        let start: &[u8] = rng.one_of::<&[u8]>(starts);
        let _ = stream.write_all(start).await;
        held.push(stream);
    }
    answers_others(&world, &up).await?;
    tokio::time::sleep(rng.millis(200, 1000)).await;
    answers_others(&world, &up).await?;
    if world.has_limits() {
        for mut stream in held.drain(..) {
            let mut rest = Vec::new();
            let closed = stream.read_to_end(&mut rest);
            if tokio::time::timeout(SILENCE_LIMIT, closed).await.is_err() {
                return Err(Failing::broken(
                    "a client that falls silent is let go",
                    format!("not within {SILENCE_LIMIT:?}"),
                ));
            }
        }
    }
    Ok(format!("{count} connections"))
}

pub(super) async fn garbage(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, true, "")?;
    for _ in 0..8 {
        let (what, bytes) = nonsense(&mut rng);
        let answer = exchange(&up, &bytes).await?;
        acceptable(&world, what, &answer);
    }
    answers_others(&world, &up).await
}

fn post(body: &str) -> Vec<u8> {
    format!(
        "POST /v2/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").into_bytes()
}

fn nonsense(rng: &mut Rng) -> (&'static str, Vec<u8>) {
    match rng.between(0, 11) {
        0 => (
            "bytes",
            (0..rng.between(1, 2000))
                .map(|_| rng.number() as u8)
                .collect(),
        ),
        1 => ("no JSON", post("{\"prompt\": ")),
        2 => (
            "deep JSON",
            post(&format!(
                "{{\"json_schema\": {}1{}}}",
                "[".repeat(20_000),
                "]".repeat(20_000)
            )),
        ),
        3 => (
            "wrong types",
            post("{\"prompt\": 7, \"max_tokens\": \"many\"}"),
        ),
        4 => (
            "unknown keys",
            post("{\"prompt\": \"a\", \"prompts\": [\"b\"]}"),
        ),
        5 => (
            "wrong ranges",
            post("{\"prompt\": \"a\", \"temperature\": 1e999, \"max_tokens\": -3}"),
        ),
        6 => (
            "no such pool",
            post("{\"prompt\": \"a\", \"pool_id\": \"../../etc/passwd\"}"),
        ),
        7 => (
            "a wild path",
            get("/v2/tasks/%00%ff/../../../../etc/passwd"),
        ),
        8 => (
            "a long path",
            get(&format!("/v2/pools/{}", "a".repeat(9000))),
        ),
        9 => (
            "a long header",
            format!(
                "GET /v2/nothing HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n",
                "b".repeat(100_000)
            )
            .into_bytes(),
        ),
        10 => ("many headers", {
            let headers = "X-Again: y\r\n".repeat(500);
            format!("GET /v2/nothing HTTP/1.1\r\nHost: x\r\n{headers}\r\n").into_bytes()
        }),
        _ => (
            "a wrong method",
            format!("BREW /v2/pools/{POOL} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                .into_bytes(),
        ),
    }
}

pub(super) async fn huge(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, true, "")?;
    let size = rng.between(300_000, 4_000_000) as usize;
    let answer = exchange(
        &up,
        &post(&format!("{{\"prompt\": \"{}\"}}", "a ".repeat(size / 2))),
    )
    .await?;
    acceptable(&world, "a huge body", &answer);
    // Promised only, and chunked without a length.
    let promised = b"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n{";
    acceptable(&world, "a promised body", &exchange(&up, promised).await?);
    let mut chunked =
        b"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for _ in 0..40 {
        chunked.extend(b"4000\r\n");
        chunked.extend(vec![b'a'; 0x4000]);
        chunked.extend(b"\r\n");
    }
    acceptable(&world, "an endless body", &exchange(&up, &chunked).await?);
    answers_others(&world, &up).await
}

pub(super) async fn slow(world: Arc<World>, mut rng: Rng) -> Verdict {
    let up = offering(&world, true, "")?;
    let mut senders = Vec::new();
    for _ in 0..rng.between(3, 8) {
        senders.push(connect(&up).await?);
    }
    let head =
        b"POST /v2/tasks HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{\"prompt\": \"";
    let mut bytes = head.iter().chain(std::iter::repeat(&b'a'));
    for _ in 0..rng.between(60, 160) {
        let byte = bytes.next().copied().unwrap_or(b'a');
        for sender in &mut senders {
            // Cut off by the daemon is what they deserve.
            let _ = sender.write_all(&[byte]).await;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    answers_others(&world, &up).await
}
