//! Clients of the daemon: submit, read to the end whatever happens, cancel.
//! Everything that is seen goes into the ledger.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::keeper::{Fate, Up};
use crate::ledger::{Facts, Key};
use crate::rng::Rng;
use crate::setup::POOL;
use crate::sse::{Event, Parser};
use crate::world::World;

/// How long a task may take, whatever happens to its engine.
const TASK_LIMIT: Duration = Duration::from_secs(150);
/// A stream without even a comment for so long is dead.
const SILENCE: Duration = Duration::from_secs(30);
/// Tries to reach a daemon that is meant to serve.
const TRIES: u32 = 4;

/// An answer, whatever its status.
#[derive(Debug, Clone)]
pub struct Reply {
    pub status: u16,
    /// It names a time to come back.
    pub retry_after: bool,
    pub body: Value,
}

/// A task that was admitted.
#[derive(Debug, Clone)]
pub struct Task {
    pub key: Key,
    pub up: Up,
    pub verbose: bool,
}

/// How a submission went.
#[derive(Debug)]
pub enum Submitted {
    Admitted(Task),
    Refused {
        code: String,
        retry_after: bool,
    },
    /// The daemon went away meanwhile.
    Gone,
}

/// How a reader behaves.
#[derive(Debug, Clone, Default)]
pub struct Manner {
    /// Leave after so many tokens each, and come back.
    pub leave_after: Vec<u64>,
    /// How long to stay away.
    pub away: Duration,
    /// How long to wait before each read.
    pub pause: Duration,
    /// Cancel after so many tokens.
    pub cancel_after: Option<u64>,
    /// Cancel twice at once.
    pub twice: bool,
}

impl Manner {
    fn is_slow(&self) -> bool {
        !self.pause.is_zero()
    }
}

/// Why a connection's reading ended.
enum Left {
    Terminal,
    OnPurpose,
    CleanEnd,
    Broke(String),
}

impl World {
    /// Asks the daemon. `None` if it has gone away, which it may only if the
    /// harness made it.
    pub async fn ask(
        &self,
        up: &Up,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Option<Reply> {
        let mut problem = String::new();
        for _ in 0..TRIES {
            match self.try_ask(up, method, path, body).await {
                Ok(reply) => {
                    if reply.status >= 400 {
                        let what = format!("{method} {path}");
                        self.ledger().refusal(&what, reply.status, &reply.body);
                    }
                    return Some(reply);
                }
                Err(error) => problem = error,
            }
            // Whether it was killed shows in a moment.
            tokio::time::sleep(Duration::from_millis(50)).await;
            if self.keeper.fate(up.generation) != Fate::Serving {
                return None;
            }
            // A submission that may have arrived must not be sent again.
            if method != "GET" {
                break;
            }
        }
        self.broken("the daemon answers", format!("{method} {path}: {problem}"));
        None
    }

    async fn try_ask(
        &self,
        up: &Up,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Reply, String> {
        let url = format!("{}{path}", up.url);
        let request = match body {
            Some(body) => self.http.post(url).json(body),
            None if method == "POST" => self.http.post(url),
            None => self.http.get(url),
        };
        let response = request.timeout(Duration::from_secs(40)).send().await;
        let response = response.map_err(|error| chain(&error))?;
        let status = response.status().as_u16();
        let retry_after = response.headers().contains_key("retry-after");
        let text = response.text().await.map_err(|error| chain(&error))?;
        Ok(Reply {
            status,
            retry_after,
            body: serde_json::from_str(&text).unwrap_or(Value::String(text)),
        })
    }

    pub async fn submit(&self, body: &Value, facts: Facts) -> Submitted {
        let Some(up) = self.keeper.until_up(Duration::from_mins(1)).await else {
            return Submitted::Gone;
        };
        let Some(reply) = self.ask(&up, "POST", "/v2/tasks", Some(body)).await else {
            return Submitted::Gone;
        };
        if reply.status == 202 {
            let id = reply.body["task_id"].as_str().unwrap_or("").to_owned();
            let key = Key {
                generation: up.generation,
                task: id,
            };
            self.ledger().admitted(&key, facts, Instant::now());
            self.journal.write(format!("task {key} admitted"));
            return Submitted::Admitted(Task {
                key,
                up,
                verbose: facts.verbose,
            });
        }
        let code = reply.body["error"]["code"]
            .as_str()
            .unwrap_or("?")
            .to_owned();
        self.ledger().refused(&code);
        if reply.status == 429 && !reply.retry_after {
            self.broken(
                "a full queue says when to come back",
                reply.body.to_string(),
            );
        }
        Submitted::Refused {
            code,
            retry_after: reply.retry_after,
        }
    }

    /// Reads a task to its end, over as many connections as it takes, and
    /// compares what the daemon shows then.
    pub async fn follow(&self, task: &Task, manner: &Manner) -> Option<String> {
        let limit = Instant::now() + TASK_LIMIT;
        let mut leave_after = manner.leave_after.clone();
        let mut cancel = None;
        let mut failures = 0;
        loop {
            let left = self
                .read_once(task, manner, &mut leave_after, &mut cancel, limit)
                .await;
            let fate = self.keeper.fate(task.up.generation);
            match left {
                Left::Terminal => break,
                Left::OnPurpose => {
                    self.ledger().reconnected();
                    tokio::time::sleep(manner.away).await;
                }
                Left::CleanEnd if fate == Fate::Serving => {
                    self.ledger()
                        .stream_ended(&task.key, "while the daemon serves");
                }
                Left::CleanEnd if fate == Fate::Stopping && !manner.is_slow() => {
                    self.ledger()
                        .stream_ended(&task.key, "while the daemon was stopping in order");
                }
                Left::CleanEnd => {}
                Left::Broke(why) => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    failures += 1;
                    if self.keeper.fate(task.up.generation) == Fate::Serving && failures >= TRIES {
                        self.ledger()
                            .overdue(&task.key, &format!("its stream cannot be read: {why}"));
                    }
                }
            }
            if self.keeper.fate(task.up.generation) == Fate::Killed {
                self.ledger().lost(&task.key);
            } else if Instant::now() > limit {
                self.ledger().overdue(&task.key, "not over within its time");
            }
            if !self.ledger().is_open(&task.key) {
                break;
            }
        }
        if let Some(cancel) = cancel {
            // Ends with the bounds of its request.
            let _ = cancel.await;
        }
        let (ending, tokens) = {
            let ledger = self.ledger();
            (ledger.ending(&task.key), ledger.tokens(&task.key))
        };
        let how = ending.as_deref().unwrap_or("lost");
        self.journal
            .write(format!("task {} {how} after {tokens} tokens", task.key));
        if ending.is_some() {
            self.look(task).await;
        }
        ending
    }

    async fn read_once(
        &self,
        task: &Task,
        manner: &Manner,
        leave_after: &mut Vec<u64>,
        cancel: &mut Option<tokio::task::JoinHandle<()>>,
        limit: Instant,
    ) -> Left {
        let last = self.ledger().last_id(&task.key);
        let mut response = match self.open(task, last).await {
            Ok(response) => response,
            Err(why) => return Left::Broke(why),
        };
        let mut parser = Parser::default();
        loop {
            if manner.is_slow() {
                tokio::time::sleep(manner.pause).await;
            }
            let wait = SILENCE.min(limit.saturating_duration_since(Instant::now()));
            let chunk = match tokio::time::timeout(wait, response.chunk()).await {
                Err(_) => return Left::Broke(format!("no byte for {wait:?}")),
                Ok(Err(error)) => return Left::Broke(chain(&error)),
                Ok(Ok(None)) => return Left::CleanEnd,
                Ok(Ok(Some(chunk))) => chunk,
            };
            let events = match parser.push(&chunk) {
                Ok(events) => events,
                Err(error) => {
                    self.broken(
                        "a stream holds whole events",
                        format!("{}: {error}", task.key),
                    );
                    return Left::Broke(error.to_string());
                }
            };
            for event in events {
                let (open, tokens) = {
                    let mut ledger = self.ledger();
                    ledger.event(&task.key, &event, Instant::now());
                    (ledger.is_open(&task.key), ledger.tokens(&task.key))
                };
                if !open {
                    return self.after_the_end(task, parser, response).await;
                }
                if manner.cancel_after.is_some_and(|after| tokens >= after) && cancel.is_none() {
                    *cancel = Some(self.cancel_aside(task, manner.twice));
                }
                if leave_after.first().is_some_and(|after| tokens >= *after) {
                    leave_after.remove(0);
                    return Left::OnPurpose;
                }
            }
        }
    }

    /// Nothing may follow a terminal event, and the stream must close.
    async fn after_the_end(
        &self,
        task: &Task,
        mut parser: Parser,
        mut response: reqwest::Response,
    ) -> Left {
        let rest = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                for event in parser.push(&chunk).unwrap_or_default() {
                    self.ledger().event(&task.key, &event, Instant::now());
                }
            }
        };
        if tokio::time::timeout(Duration::from_secs(10), rest)
            .await
            .is_err()
        {
            self.broken(
                "a stream closes after its terminal event",
                task.key.to_string(),
            );
        }
        Left::Terminal
    }

    async fn open(&self, task: &Task, last: u64) -> Result<reqwest::Response, String> {
        let query = if task.verbose { "?verbose=true" } else { "" };
        let url = format!("{}/v2/tasks/{}/events{query}", task.up.url, task.key.task);
        let mut request = self.http.get(url);
        if last > 0 {
            request = request.header("Last-Event-ID", last);
        }
        let sent = tokio::time::timeout(Duration::from_secs(20), request.send()).await;
        let response = sent
            .map_err(|_| "no answer within 20 s".to_owned())?
            .map_err(|error| chain(&error))?;
        match response.status().as_u16() {
            200 => Ok(response),
            status => Err(format!(
                "{status}: {}",
                response.text().await.unwrap_or_default()
            )),
        }
    }

    fn cancel_aside(&self, task: &Task, twice: bool) -> tokio::task::JoinHandle<()> {
        let (world, task) = (self.arc(), task.clone());
        // Awaited by the reader that asked for it.
        tokio::spawn(async move {
            if twice {
                tokio::join!(world.cancel(&task), world.cancel(&task));
            } else {
                world.cancel(&task).await;
            }
        })
    }

    /// Cancels a task, and fixes how many pieces it may have at the most.
    pub async fn cancel(&self, task: &Task) -> Option<Value> {
        let path = format!("/v2/tasks/{}/cancel", task.key.task);
        let reply = self.ask(&task.up, "POST", &path, None).await?;
        if reply.status != 200 {
            let detail = format!("{}: {} {}", task.key, reply.status, reply.body);
            self.broken("a cancel is answered", detail);
            return None;
        }
        let (started, tokens) = {
            let ledger = self.ledger();
            (ledger.has_started(&task.key), ledger.tokens(&task.key))
        };
        // Of queued tasks nothing has to be freed.
        if let (true, Some(true), Some(freed)) = (
            started,
            reply.body["cancelled"].as_bool(),
            reply.body["freed_ms"].as_u64(),
        ) {
            self.note_freed(freed, tokens == 0);
        }
        let path = format!("/v2/tasks/{}", task.key.task);
        let view = self.ask(&task.up, "GET", &path, None).await?;
        if let Some(pieces) = view.body["pieces"].as_u64() {
            self.ledger().cancel_answered(&task.key, pieces);
        }
        Some(reply.body)
    }

    /// What the daemon shows of a task that is over.
    async fn look(&self, task: &Task) {
        let path = format!("/v2/tasks/{}", task.key.task);
        let Some(reply) = self.ask(&task.up, "GET", &path, None).await else {
            return;
        };
        if reply.status == 200 {
            self.ledger().shown(&task.key, &reply.body);
        } else {
            let detail = format!("{}: {} {}", task.key, reply.status, reply.body);
            self.broken("every admitted task can be looked at", detail);
        }
    }

    /// Reads an ended task once more, from the start.
    pub async fn replay(&self, task: &Task) {
        let Ok(mut response) = self.open(task, 0).await else {
            return;
        };
        let mut parser = Parser::default();
        let mut events: Vec<Event> = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                events.extend(parser.push(&chunk).unwrap_or_default());
            }
        };
        let whole = tokio::time::timeout(Duration::from_secs(20), read)
            .await
            .is_ok();
        if whole && self.keeper.fate(task.up.generation) == Fate::Serving {
            self.ledger().replayed(&task.key, &events, Instant::now());
        }
    }

    /// A task like those of the clients that run all along.
    pub fn task_body(&self, rng: &mut Rng, max_tokens: u64) -> (Value, Facts) {
        let resumes = self.offers().resume_tasks && rng.percent(40);
        let facts = Facts {
            verbose: rng.percent(50),
            numbered: self.is_scripted(),
            resumes,
            deadline: None,
        };
        let prompt = if self.is_scripted() {
            // What is continued is put right behind it.
            "count the words of this: ".to_owned()
        } else {
            format!("1, 2, 3, 4, 5, {}, ", rng.between(6, 99))
        };
        let mut body = json!({
            "pool_id": POOL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "seed": 1,
            "priority": if rng.percent(30) { "batch" } else { "interactive" },
        });
        if resumes {
            body["on_worker_reset"] = json!("resume");
        }
        (body, facts)
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
