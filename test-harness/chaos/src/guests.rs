//! Clients of `/v1` in front of two pools that are loaded on demand, of which only
//! one may be loaded at a time, and which are unloaded after a second without work.
//!
//! Their engines are healthy all along: what happens to these pools is what happens
//! to the daemon, and that they come and go.

use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::Response;
use serde::Serialize;
use serde_json::{Value, json};

use crate::client::chain;
use crate::keeper::{Fate, Up};
use crate::rng::Rng;
use crate::setup::GUESTS;
use crate::world::World;

/// For one call, whatever it waits for.
const CALL_LIMIT: Duration = Duration::from_secs(100);
/// Until a task is over whose client has gone.
const GONE_LIMIT: Duration = Duration::from_secs(20);
/// Until pools without work are unloaded, with a second of it to wait for.
const UNLOAD_LIMIT: Duration = Duration::from_secs(20);

/// How the calls ended.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Tally {
    pub completed: u64,
    pub cancelled: u64,
    pub left: u64,
    pub failed: u64,
    pub refused: u64,
    /// The daemon was ended meanwhile.
    pub lost: u64,
}

/// What a client does with its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Habit {
    Whole,
    Stream,
    /// Cancels after so many pieces, and reads on.
    Cancel(u64),
    /// Goes away after so many pieces.
    Leave(u64),
}

impl Habit {
    fn any(rng: &mut Rng, tokens: u64) -> Self {
        match rng.between(0, 5) {
            0 => Self::Whole,
            1 => Self::Cancel(rng.between(0, tokens)),
            2 => Self::Leave(rng.between(0, tokens)),
            _ => Self::Stream,
        }
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    Done,
    Error,
}

/// A stream as far as it was read.
#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    text: String,
    pieces: u64,
    ending: Option<Ending>,
    problem: Option<String>,
}

impl Seen {
    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        while let Some(end) = self.bytes.windows(2).position(|two| two == b"\n\n") {
            let block: Vec<u8> = self.bytes.drain(..end + 2).collect();
            let block = String::from_utf8_lossy(&block).into_owned();
            for data in block.lines().filter_map(|line| line.strip_prefix("data: ")) {
                self.event(data);
            }
        }
    }

    fn event(&mut self, data: &str) {
        if let Some(ending) = self.ending {
            self.problem = Some(format!("{data} after {ending:?}"));
        } else if data == "[DONE]" {
            self.ending = Some(Ending::Done);
        } else if let Ok(event) = serde_json::from_str::<Value>(data) {
            if event["error"].is_object() {
                self.ending = Some(Ending::Error);
            } else if let Some(piece) = event["choices"][0]["delta"]["content"].as_str()
                && !piece.is_empty()
            {
                self.text.push_str(piece);
                self.pieces += 1;
            }
        } else {
            self.problem = Some(format!("no JSON: {data}"));
        }
    }
}

/// The words that so many pieces make up.
fn numbered(pieces: u64) -> String {
    let words: Vec<String> = (0..pieces).map(|number| format!("w{number} ")).collect();
    words.concat()
}

/// A call that was taken.
struct Call {
    up: Up,
    task: String,
    pool: &'static str,
}

/// Runs one client until the run is over.
pub async fn client(world: Arc<World>, mut rng: Rng) {
    while !world.is_over() {
        if world.is_paused() {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        }
        call(&world, &mut rng).await;
        // Now and then long enough for the pools to be unloaded.
        let pause = if rng.percent(20) {
            rng.millis(1200, 2500)
        } else {
            rng.millis(0, 150)
        };
        tokio::time::sleep(pause).await;
    }
}

async fn call(world: &World, rng: &mut Rng) {
    let Some(up) = world.keeper.until_up(Duration::from_mins(1)).await else {
        return;
    };
    let pool = *rng.one_of(&GUESTS);
    let tokens = rng.between(3, 60);
    let habit = Habit::any(rng, tokens);
    let body = json!({
        "model": pool,
        "messages": [{ "role": "user", "content": "count" }],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": habit != Habit::Whole,
    });
    let post = world.http.post(format!("{}/v1/chat/completions", up.url));
    let answer = match post.json(&body).timeout(CALL_LIMIT).send().await {
        Ok(answer) => answer,
        Err(error) => return broke(world, &up, &format!("{pool}: {}", chain(&error))).await,
    };
    let status = answer.status().as_u16();
    if status != 200 {
        return refused(world, &up, status, answer).await;
    }
    let task = answer.headers().get("X-Task-Id");
    let task = task.and_then(|id| id.to_str().ok()).unwrap_or_default();
    let call = Call {
        task: task.to_owned(),
        up,
        pool,
    };
    match habit {
        Habit::Whole => whole(world, &call, answer, tokens).await,
        habit => stream(world, &call, answer, habit, tokens).await,
    }
}

/// A connection breaks only if the daemon is ended, and that by the harness.
async fn broke(world: &World, up: &Up, why: &str) {
    // Whether it was killed shows in a moment.
    tokio::time::sleep(Duration::from_millis(50)).await;
    if world.keeper.fate(up.generation) == Fate::Serving {
        world.broken("calls are answered", why);
    }
    world.tally(|tally| tally.lost += 1);
}

async fn refused(world: &World, up: &Up, status: u16, answer: Response) {
    let again = answer.headers().contains_key("retry-after");
    let body = match answer.text().await {
        Ok(body) => body,
        Err(error) => return broke(world, up, &chain(&error)).await,
    };
    let error: Value = serde_json::from_str(&body).unwrap_or(Value::Null);
    // An engine that is lost, or not to be had, or a queue that is full.
    let known = matches!(status, 429 | 502 | 503 | 504);
    if !known || !error["error"]["message"].is_string() || (status == 429 && !again) {
        let detail = format!("{status}: {body}");
        world.broken("calls are refused for want of room or engine only", detail);
    }
    world
        .journal
        .write(format!("guest refused: {status} {body}"));
    world.tally(|tally| tally.refused += 1);
}

async fn whole(world: &World, call: &Call, answer: Response, tokens: u64) {
    let body = match answer.json::<Value>().await {
        Ok(body) => body,
        Err(error) => return broke(world, &call.up, &chain(&error)).await,
    };
    let text = body["choices"][0]["message"]["content"].as_str();
    if text.map(str::trim) != Some(numbered(tokens).trim()) {
        world.broken("an answer is whole", format!("{}: {body}", call.pool));
    }
    outcome(world, call, &["completed"]).await;
    world.tally(|tally| tally.completed += 1);
}

async fn stream(world: &World, call: &Call, mut answer: Response, habit: Habit, tokens: u64) {
    let mut seen = Seen::default();
    let mut most = None;
    loop {
        match habit {
            Habit::Leave(after) if seen.pieces >= after => {
                drop(answer);
                return left(world, call).await;
            }
            Habit::Cancel(after) if seen.pieces >= after && most.is_none() => {
                most = Some(cancel(world, call).await);
            }
            _ => {}
        }
        match answer.chunk().await {
            Ok(Some(bytes)) => seen.push(&bytes),
            Ok(None) => break,
            Err(error) => return broke(world, &call.up, &chain(&error)).await,
        }
    }
    if world.keeper.fate(call.up.generation) == Fate::Killed {
        return world.tally(|tally| tally.lost += 1);
    }
    let tell = |invariant, what: &str| {
        let detail = format!(
            "{}/{} of {}: {what}; {seen:?}",
            call.up.generation, call.task, call.pool
        );
        world.broken(invariant, detail);
    };
    if let Some(problem) = &seen.problem {
        tell("a call has one outcome", problem);
    }
    if seen.text != numbered(seen.pieces) {
        tell("pieces come once and in order", "");
    }
    if let Some(Some(most)) = most
        && seen.pieces > most
    {
        tell(
            "no token follows a cancel's answer",
            &format!("{most} at the cancel"),
        );
    }
    match seen.ending {
        None => tell("a call has one outcome", "none was seen"),
        Some(Ending::Done) => {
            if seen.pieces != tokens {
                tell("an answer is whole", &format!("{tokens} were asked for"));
            }
            outcome(world, call, &["completed"]).await;
            world.tally(|tally| tally.completed += 1);
        }
        Some(Ending::Error) if most.is_some() => {
            outcome(world, call, &["cancelled", "failed"]).await;
            world.tally(|tally| tally.cancelled += 1);
        }
        Some(Ending::Error) => {
            outcome(world, call, &["failed"]).await;
            world.tally(|tally| tally.failed += 1);
        }
    }
}

/// Cancels, and says how many pieces there may be at the most.
async fn cancel(world: &World, call: &Call) -> Option<u64> {
    let path = format!("/v2/tasks/{}/cancel", call.task);
    let reply = world.ask(&call.up, "POST", &path, None).await?;
    if reply.status != 200 {
        let detail = format!("{}: {} {}", call.task, reply.status, reply.body);
        world.broken("a cancel is answered", detail);
    }
    view(world, call).await?["pieces"].as_u64()
}

/// A client that goes away has cancelled.
async fn left(world: &World, call: &Call) {
    world.tally(|tally| tally.left += 1);
    let begun = Instant::now();
    while let Some(view) = view(world, call).await {
        if !matches!(view["status"].as_str(), Some("queued" | "running")) {
            return;
        }
        if begun.elapsed() > GONE_LIMIT {
            return world.broken("who goes away has cancelled", view.to_string());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn outcome(world: &World, call: &Call, expected: &[&str]) {
    if let Some(view) = view(world, call).await
        && !expected.iter().any(|status| view["status"] == *status)
    {
        let detail = format!("{expected:?} expected: {view}");
        world.broken("a task is shown as its call ended", detail);
    }
}

/// The task as it is shown; none if the daemon was ended.
async fn view(world: &World, call: &Call) -> Option<Value> {
    let path = format!("/v2/tasks/{}", call.task);
    let reply = world.ask(&call.up, "GET", &path, None).await?;
    if reply.status != 200 {
        let detail = format!("{}: {} {}", call.task, reply.status, reply.body);
        world.broken("every admitted task can be looked at", detail);
        return None;
    }
    Some(reply.body)
}

/// Of the pools of a group only one may have an engine.
pub fn look(world: &World) {
    let engines = world.guest_engines();
    if engines.len() > 1 {
        world.broken(
            "a group has no more engines than it may",
            format!("{engines:?}"),
        );
    }
}

/// Pools without work give their memory back.
pub async fn let_go(world: &World) {
    let begun = Instant::now();
    while !world.guest_engines().is_empty() {
        if begun.elapsed() > UNLOAD_LIMIT {
            let detail = format!("{:?} {UNLOAD_LIMIT:?} later", world.guest_engines());
            return world.broken("idle pools are unloaded", detail);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_taken_apart_and_nothing_may_follow_its_end() {
        let mut seen = Seen::default();
        for piece in ["w0 ", "w1 "] {
            let chunk = json!({ "choices": [{ "delta": { "content": piece } }] });
            let event = format!(": alive\n\ndata: {chunk}\n\n");
            let (head, tail) = event.as_bytes().split_at(20);
            seen.push(head);
            seen.push(tail);
        }
        assert_eq!((seen.pieces, seen.text.as_str()), (2, numbered(2).as_str()));
        seen.push(b"data: [DONE]\n\n");
        assert_eq!((seen.ending, &seen.problem), (Some(Ending::Done), &None));
        seen.push(b"data: {\"error\":{}}\n\n");
        assert!(seen.problem.is_some());
    }
}
