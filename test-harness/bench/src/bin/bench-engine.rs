//! An engine without a model: emits llama-server's events as fast as they are
//! read, or at a rate. It is what every side of the relay benchmark reads from,
//! so it does as little as it can: one thread, one write for each token.
//!
//! How many tokens and how fast is read from `bench-engine.json` beside the
//! executable for every request, so that one process serves every operating
//! point.
//!
//! At a rate, streams do not emit in step: each has its own place within the
//! time between two of its tokens, given out in turn, so that every side meets
//! the same pattern whenever its requests come. The timers have steps of a
//! millisecond.
#![allow(
    clippy::print_stderr,
    reason = "like the real engine, it answers --version on stderr"
)]

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep_until};

const CTX: u32 = 1_048_576;

/// A thousand streams that come at once all find room: one that does not comes
/// again after a second.
const BACKLOG: u32 = 4096;

/// Places within the time between two tokens of a stream, in thousandths:
/// neighbours in order of coming are far apart.
const PLACE_STEP: u32 = 382;

#[derive(Debug, Clone, Deserialize)]
struct Point {
    tokens: u32,
    /// For each stream; 0 is flat out.
    tokens_per_second: u32,
    /// How long it takes to the first token. With it a stream begins when it is
    /// asked for, and has no place among others.
    #[serde(default)]
    first_token_ms: u32,
}

fn point() -> Point {
    let beside = std::env::current_exe().map(|exe| exe.with_file_name("bench-engine.json"));
    let text = beside.and_then(std::fs::read_to_string);
    text.ok()
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or(Point {
            tokens: 16,
            tokens_per_second: 0,
            first_token_ms: 0,
        })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (mut host, mut port, mut slots, mut model) =
        ("127.0.0.1".to_owned(), 8080, 1, PathBuf::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_default();
        match argument.as_str() {
            "--version" => {
                eprintln!("version: 0.6.0-dev (build 11434, commit fa4ee61)");
                eprintln!("built with bench-engine");
                return Ok(());
            }
            "--list-devices" => return Ok(()),
            "--host" => host = value(),
            "--port" => port = value().parse().unwrap_or(port),
            "-np" | "--parallel" => slots = value().parse().unwrap_or(slots),
            "-m" | "--model" => model = value().into(),
            _ => {}
        }
    }
    let address = format!("{host}:{port}").parse::<SocketAddr>();
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address.map_err(io::Error::other)?)?;
    let listener = socket.listen(BACKLOG)?;
    let model = model.display().to_string();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream, slots, model.clone()));
    }
}

/// Requests of one connection, one after the other, until the client goes or a stream is
/// over: llama-server closes the connection after each.
async fn serve(mut stream: TcpStream, slots: u32, model: String) -> io::Result<()> {
    let mut buffer = Vec::new();
    while let Some(Request { path, most }) = next_request(&mut stream, &mut buffer).await? {
        match path.as_str() {
            "/completion" => return emit(&mut stream, &Native, most).await,
            "/v1/chat/completions" => return emit(&mut stream, &Chat, most).await,
            _ => answer(&mut stream, &fixed(&path, slots, &model)).await?,
        }
    }
    Ok(())
}

/// What is looked at of a request.
struct Request {
    path: String,
    /// The most tokens that its body asks for.
    most: u32,
}

/// Reads one request whole; `None` at the end.
async fn next_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> io::Result<Option<Request>> {
    loop {
        if let Some(end) = find(buffer, b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&buffer[..end]).into_owned();
            let length = head
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
                .and_then(|(_, value)| value.trim().parse().ok())
                .unwrap_or(0);
            let whole = end + 4 + length;
            if buffer.len() >= whole {
                let most = most_tokens(&buffer[end + 4..whole]);
                buffer.drain(..whole);
                let path = head.split(' ').nth(1).unwrap_or_default();
                let path = path.split('?').next().unwrap_or_default().to_owned();
                return Ok(Some(Request { path, most }));
            }
        }
        if stream.read_buf(buffer).await? == 0 {
            return Ok(None);
        }
    }
}

fn most_tokens(body: &[u8]) -> u32 {
    #[derive(Deserialize)]
    struct Body {
        #[serde(alias = "max_tokens")]
        n_predict: Option<u32>,
    }
    let body: Option<Body> = serde_json::from_slice(body).ok();
    body.and_then(|body| body.n_predict).unwrap_or(u32::MAX)
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}

fn fixed(path: &str, slots: u32, model: &str) -> String {
    match path {
        "/health" => r#"{"status":"ok"}"#.to_owned(),
        "/props" => format!(
            r#"{{"default_generation_settings":{{"n_ctx":{CTX},"params":{{"dynatemp_range":0.0,"dynatemp_exponent":1.0}}}},"total_slots":{slots},"model_path":{model:?},"build_info":"b11434-fa4ee61"}}"#
        ),
        "/apply-template" => r#"{"prompt":"a"}"#.to_owned(),
        "/tokenize" => r#"{"tokens":[1]}"#.to_owned(),
        "/slots" => "[]".to_owned(),
        _ => r#"{"data":[]}"#.to_owned(),
    }
}

async fn answer(stream: &mut TcpStream, body: &str) -> io::Result<()> {
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: ";
    let text = format!("{head}{}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes()).await
}

/// How a route writes its events.
trait Events {
    fn token(&self, out: &mut Vec<u8>, index: u32);
    fn last(&self, out: &mut Vec<u8>, tokens: u32);
}

/// Of `/completion`.
struct Native;

impl Events for Native {
    fn token(&self, out: &mut Vec<u8>, index: u32) {
        let predicted = index + 1;
        push(
            out,
            format_args!(
                r#"data: {{"index":0,"content":" word","tokens":[1717],"stop":false,"id_slot":-1,"tokens_predicted":{predicted},"tokens_evaluated":1}}"#
            ),
        );
    }

    fn last(&self, out: &mut Vec<u8>, tokens: u32) {
        push(
            out,
            format_args!(
                r#"data: {{"index":0,"content":"","tokens":[],"stop":true,"id_slot":-1,"tokens_predicted":{tokens},"tokens_evaluated":1,"generation_settings":{{"seed":1}},"truncated":false,"stop_type":"limit","timings":{{"cache_n":0,"prompt_n":1,"prompt_ms":1.0,"predicted_n":{tokens},"predicted_ms":1.0}}}}"#
            ),
        );
    }
}

/// Of `/v1/chat/completions`.
struct Chat;

const CHAT_REST: &str = r#""created":1732464000,"id":"chatcmpl-0123456789abcdefghijklmnopqrstuv","model":"bench","system_fingerprint":"b11434-fa4ee61","object":"chat.completion.chunk""#;

impl Events for Chat {
    fn token(&self, out: &mut Vec<u8>, _: u32) {
        push(
            out,
            format_args!(
                r#"data: {{"choices":[{{"finish_reason":null,"index":0,"delta":{{"content":" word"}}}}],{CHAT_REST}}}"#
            ),
        );
    }

    fn last(&self, out: &mut Vec<u8>, tokens: u32) {
        push(
            out,
            format_args!(
                r#"data: {{"choices":[{{"finish_reason":"length","index":0,"delta":{{}}}}],{CHAT_REST},"timings":{{"cache_n":0,"prompt_n":1,"prompt_ms":1.0,"predicted_n":{tokens},"predicted_ms":1.0}}}}"#
            ),
        );
        push(out, format_args!("data: [DONE]"));
    }
}

/// One event as a chunk of the transfer encoding, as cpp-httplib writes it.
fn push(out: &mut Vec<u8>, event: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let mut text = Vec::with_capacity(256);
    // Writing to a Vec cannot fail.
    let _ = write!(text, "{event}\n\n");
    let _ = write!(out, "{:x}\r\n", text.len());
    out.extend_from_slice(&text);
    out.extend_from_slice(b"\r\n");
}

async fn emit(stream: &mut TcpStream, events: &impl Events, most: u32) -> io::Result<()> {
    let point = point();
    let tokens = point.tokens.min(most);
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nServer: llama.cpp\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    let first_token = if point.first_token_ms > 0 {
        Duration::from_millis(point.first_token_ms.into())
    } else {
        place(point.tokens_per_second)
    };
    let begun = Instant::now() + first_token;
    let mut out = Vec::with_capacity(1024);
    for index in 0..tokens {
        if point.tokens_per_second > 0 {
            let due = f64::from(index) / f64::from(point.tokens_per_second);
            sleep_until(begun + Duration::from_secs_f64(due)).await;
        }
        out.clear();
        events.token(&mut out, index);
        stream.write_all(&out).await?;
        if point.tokens_per_second == 0 && index % 16 == 15 {
            // Others on this thread get their turn.
            tokio::task::yield_now().await;
        }
    }
    out.clear();
    events.last(&mut out, tokens);
    out.extend_from_slice(b"0\r\n\r\n");
    stream.write_all(&out).await
}

/// How long from now a stream's first token is due, so that it falls on the
/// stream's own place within the time between two tokens.
fn place(tokens_per_second: u32) -> Duration {
    static STREAMS: AtomicU32 = AtomicU32::new(0);
    static ORIGIN: OnceLock<Instant> = OnceLock::new();
    if tokens_per_second == 0 {
        return Duration::ZERO;
    }
    let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
    let share = f64::from(stream.wrapping_mul(PLACE_STEP) % 1000) / 1000.0;
    let since = ORIGIN.get_or_init(Instant::now).elapsed().as_secs_f64();
    let between = 1.0 / f64::from(tokens_per_second);
    let wait = (share - since / between).rem_euclid(1.0) * between;
    Duration::from_secs_f64(wait)
}
