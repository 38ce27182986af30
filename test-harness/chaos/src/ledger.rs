//! The book of tasks: what was promised, what came, and what that breaks.
//! Pure: it is told what was seen and says what must not be.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::sse::Event;

/// Every code that the daemon may name.
const CODES: [&str; 14] = [
    "INVALID_PARAMS",
    "CONTEXT_LENGTH_EXCEEDED",
    "ADMISSION_REJECT",
    "QUEUE_FULL",
    "DEADLINE_UNMET",
    "POOL_NOT_FOUND",
    "POOL_UNREADY",
    "POOL_UNAVAILABLE",
    "MODEL_NOT_FOUND",
    "TASK_NOT_FOUND",
    "DECODE_TIMEOUT",
    "WORKER_RESET",
    "UNAUTHORIZED",
    "INTERNAL",
];

/// A task's id and the start of the daemon that gave it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub generation: u64,
    pub task: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.generation, self.task)
    }
}

/// What is known of a task when it is admitted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts {
    /// Its reader is shown `metrics` events, so that no event id is left out.
    pub verbose: bool,
    /// The engine answers `w0 w1 w2 …`.
    pub numbered: bool,
    /// It asked to be continued when the engine is lost.
    pub resumes: bool,
    pub deadline: Option<Duration>,
}

/// A promise that was not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    pub invariant: &'static str,
    pub detail: String,
}

/// How a task stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    Open,
    Ended {
        reason: String,
    },
    Failed {
        code: String,
    },
    /// Its daemon ended, and its reader was cut off before the task's end.
    Lost,
}

#[derive(Debug)]
struct Entry {
    facts: Facts,
    admitted: Instant,
    last_id: u64,
    started: bool,
    tokens: u64,
    /// Of the tokens' texts, in order.
    text_sum: u64,
    cancelled_at: Option<u64>,
    standing: Standing,
}

/// Counts for the report.
#[derive(Debug, Clone, Default, PartialEq, serde::Serialize)]
pub struct Totals {
    pub admitted: u64,
    pub completed: u64,
    pub cancelled: u64,
    pub lost_with_the_daemon: u64,
    /// By code.
    pub failed: BTreeMap<String, u64>,
    /// Not admitted, by code.
    pub refused: BTreeMap<String, u64>,
    /// Continued on another engine.
    pub resumed: u64,
    pub tokens: u64,
    pub reconnects: u64,
    pub replays: u64,
    pub most_queued: u64,
}

/// How long after an engine's end tasks that were put back may stand beyond
/// the queue's bound.
const PUT_BACK: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub struct Ledger {
    tasks: HashMap<Key, Entry>,
    broken: Vec<Broken>,
    totals: Totals,
    engine_exits: Option<u64>,
    engine_lost: Option<Instant>,
}

impl Ledger {
    pub fn totals(&self) -> &Totals {
        &self.totals
    }

    /// What was broken since this was last asked.
    pub fn take_broken(&mut self) -> Vec<Broken> {
        std::mem::take(&mut self.broken)
    }

    pub fn break_promise(&mut self, invariant: &'static str, detail: impl Into<String>) {
        self.broken.push(Broken {
            invariant,
            detail: detail.into(),
        });
    }

    pub fn admitted(&mut self, key: &Key, facts: Facts, now: Instant) {
        self.totals.admitted += 1;
        let entry = Entry {
            facts,
            admitted: now,
            last_id: 0,
            started: false,
            tokens: 0,
            text_sum: 0,
            cancelled_at: None,
            standing: Standing::Open,
        };
        if let Some(earlier) = self.tasks.insert(key.clone(), entry) {
            let detail = format!("{key} was given twice; the first: {earlier:?}");
            self.break_promise("every task has an id of its own", detail);
        }
    }

    pub fn refused(&mut self, code: &str) {
        *self.totals.refused.entry(code.to_owned()).or_default() += 1;
    }

    pub fn reconnected(&mut self) {
        self.totals.reconnects += 1;
    }

    /// Where the task's reader is: the id of the last event that it saw.
    pub fn last_id(&self, key: &Key) -> u64 {
        self.tasks.get(key).map_or(0, |entry| entry.last_id)
    }

    pub fn tokens(&self, key: &Key) -> u64 {
        self.tasks.get(key).map_or(0, |entry| entry.tokens)
    }

    /// Whether the engine has begun with it.
    pub fn has_started(&self, key: &Key) -> bool {
        self.tasks.get(key).is_some_and(|entry| entry.started)
    }

    pub fn is_open(&self, key: &Key) -> bool {
        self.tasks
            .get(key)
            .is_some_and(|entry| entry.standing == Standing::Open)
    }

    /// How many tasks are neither over nor lost.
    pub fn open_tasks(&self) -> usize {
        let open = |entry: &&Entry| entry.standing == Standing::Open;
        self.tasks.values().filter(open).count()
    }

    /// How a task ended: `stop`, `length`, `cancelled` or an error's code;
    /// `None` if it has not, or was lost with its daemon.
    pub fn ending(&self, key: &Key) -> Option<String> {
        match &self.tasks.get(key)?.standing {
            Standing::Ended { reason } => Some(reason.clone()),
            Standing::Failed { code } => Some(code.clone()),
            Standing::Open | Standing::Lost => None,
        }
    }

    /// One event of the task's one reader, over all its connections.
    pub fn event(&mut self, key: &Key, event: &Event, now: Instant) {
        let Some(entry) = self.tasks.get_mut(key) else {
            return self.break_promise(
                "only admitted tasks have events",
                format!("{key}: {event:?}"),
            );
        };
        let mut broken = Vec::new();
        entry.take(event, now, &mut broken);
        let resumed = event.data["resumed"].as_u64().unwrap_or(0);
        match (&entry.standing, event.name.as_str()) {
            (Standing::Ended { reason }, "end") if reason == "cancelled" => {
                self.totals.cancelled += 1;
            }
            (Standing::Ended { .. }, "end") => self.totals.completed += 1,
            (Standing::Failed { code }, "error") => {
                *self.totals.failed.entry(code.clone()).or_default() += 1;
            }
            (_, "token") => self.totals.tokens += 1,
            _ => {}
        }
        self.totals.resumed += u64::from(resumed > 0);
        for (invariant, detail) in broken {
            self.break_promise(invariant, format!("{key}: {detail}; event {event:?}"));
        }
    }

    /// The answer to a cancel came; the daemon then showed the task with so
    /// many pieces, and there must never be more.
    pub fn cancel_answered(&mut self, key: &Key, pieces: u64) {
        let Some(entry) = self.tasks.get_mut(key) else {
            return;
        };
        let pieces = entry
            .cancelled_at
            .map_or(pieces, |earlier| earlier.min(pieces));
        entry.cancelled_at = Some(pieces);
        if entry.tokens > pieces {
            let detail = format!("{key}: {} tokens read, {pieces} shown", entry.tokens);
            self.break_promise("a cancelled task gives no token after the answer", detail);
        }
    }

    /// The daemon that had the task is gone, and the task with it.
    pub fn lost(&mut self, key: &Key) {
        if let Some(entry) = self.tasks.get_mut(key)
            && entry.standing == Standing::Open
        {
            entry.standing = Standing::Lost;
            self.totals.lost_with_the_daemon += 1;
        }
    }

    /// The stream ended in order, though nobody had ended the task.
    pub fn stream_ended(&mut self, key: &Key, when: &str) {
        if self.is_open(key) {
            self.lost(key);
            self.break_promise(
                "every stream ends with `end` or `error`",
                format!("{key}: the stream ended without, {when}"),
            );
        }
    }

    /// The task was given up waiting for.
    pub fn overdue(&mut self, key: &Key, why: &str) {
        if let Some(entry) = self.tasks.get_mut(key)
            && entry.standing == Standing::Open
        {
            entry.standing = Standing::Lost;
            let detail = format!(
                "{key}: {why}; admitted {} s ago, {} tokens read, last event {}, started: {}",
                entry.admitted.elapsed().as_secs(),
                entry.tokens,
                entry.last_id,
                entry.started
            );
            self.break_promise("every admitted task ends", detail);
        }
    }

    /// `GET /v2/tasks/{id}` of a task whose stream has ended.
    pub fn shown(&mut self, key: &Key, view: &Value) {
        let Some(entry) = self.tasks.get(key) else {
            return;
        };
        let expected = match &entry.standing {
            Standing::Open | Standing::Lost => return,
            Standing::Ended { reason } if reason == "cancelled" => "cancelled",
            Standing::Ended { .. } => "completed",
            Standing::Failed { .. } => "failed",
        };
        if view["status"] != expected || view["pieces"].as_u64() != Some(entry.tokens) {
            let detail = format!(
                "{key}: {expected} with {} tokens in the stream, but the daemon shows {view}",
                entry.tokens
            );
            self.break_promise("a task is shown as it ended", detail);
        }
    }

    /// A later reader read the ended task's whole stream.
    pub fn replayed(&mut self, key: &Key, events: &[Event], now: Instant) {
        self.totals.replays += 1;
        let Some(entry) = self.tasks.get(key) else {
            return;
        };
        let facts = Facts {
            deadline: None,
            ..entry.facts
        };
        let mut again = Entry {
            facts,
            admitted: now,
            last_id: 0,
            started: false,
            tokens: 0,
            text_sum: 0,
            cancelled_at: entry.cancelled_at,
            standing: Standing::Open,
        };
        let mut broken = Vec::new();
        for event in events {
            again.take(event, now, &mut broken);
        }
        let same = |entry: &Entry| {
            (
                entry.last_id,
                entry.tokens,
                entry.text_sum,
                entry.standing.clone(),
            )
        };
        if !broken.is_empty() || same(&again) != same(entry) {
            let detail = format!(
                "{key}: first {:?}, later {:?}, {broken:?}",
                same(entry),
                same(&again)
            );
            self.break_promise("every reader sees the same events", detail);
        }
    }

    /// The pool as shown: `GET /v2/pools/{id}`.
    pub fn pool(&mut self, view: &Value, now: Instant) {
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let exits = number(&view["engine_exits"]);
        if self.engine_exits != Some(exits) || view["state"] != "ready" {
            self.engine_exits = Some(exits);
            self.engine_lost = Some(now);
        }
        let queue = &view["queue"];
        let (capacity, slots) = (number(&queue["capacity"]), number(&view["slots"]));
        let queued = number(&queue["interactive"]) + number(&queue["batch"]);
        let put_back = self
            .engine_lost
            .is_some_and(|lost| now.duration_since(lost) < PUT_BACK);
        let bound = capacity + if put_back { slots } else { 0 };
        self.totals.most_queued = self.totals.most_queued.max(queued);
        if queued > bound {
            self.break_promise(
                "the queue never holds more than its bound",
                format!("{queued} queued, {bound} allowed: {view}"),
            );
        }
    }

    /// An answer that refuses: it must say why, in the agreed shape.
    pub fn refusal(&mut self, what: &str, status: u16, body: &Value) {
        let error = &body["error"];
        if let Some(problem) = shape_problem(error) {
            self.break_promise(
                "an error says code and retriable",
                format!("{what}: {status} {body}: {problem}"),
            );
        } else if error["code"] == "INTERNAL" || status == 500 {
            self.break_promise(
                "nothing goes wrong inside the daemon",
                format!("{what}: {status} {body}"),
            );
        }
    }

    /// At the end of a run nothing may be open.
    pub fn finish(&mut self) {
        let mut open: Vec<Key> = self
            .tasks
            .iter()
            .filter(|(_, entry)| entry.standing == Standing::Open)
            .map(|(key, _)| key.clone())
            .collect();
        open.sort();
        for key in open {
            self.overdue(&key, "still open at the end of the run");
        }
    }
}

fn shape_problem(error: &Value) -> Option<String> {
    let code = error["code"].as_str().unwrap_or("");
    if !CODES.contains(&code) {
        return Some(format!("unknown code {:?}", error["code"]));
    }
    if !error["retriable"].is_boolean() {
        return Some("`retriable` is missing".to_owned());
    }
    let said = error["message"]
        .as_str()
        .is_some_and(|text| !text.is_empty());
    (!said).then(|| "no message".to_owned())
}

type Problems = Vec<(&'static str, String)>;

impl Entry {
    fn take(&mut self, event: &Event, now: Instant, broken: &mut Problems) {
        if self.standing != Standing::Open {
            let detail = format!("the task was over: {:?}", self.standing);
            broken.push(("nothing comes after a terminal event", detail));
            return;
        }
        let in_order = if self.facts.verbose {
            event.id == self.last_id + 1
        } else {
            event.id > self.last_id
        };
        if !in_order {
            let detail = format!("event {} follows event {}", event.id, self.last_id);
            broken.push(("event ids have no gap and no repeat", detail));
        }
        self.last_id = event.id;
        match event.name.as_str() {
            "started" => self.started(event, now, broken),
            "token" => self.token(event, broken),
            "metrics" if self.facts.verbose => {}
            "end" => self.end(event, broken),
            "error" => {
                if let Some(problem) = shape_problem(&event.data) {
                    broken.push(("an error says code and retriable", problem));
                }
                let code = event.data["code"].as_str().unwrap_or("?").to_owned();
                // A fault of ours; an engine's has codes of its own.
                if code == "INTERNAL" {
                    broken.push(("nothing goes wrong inside the daemon", code.clone()));
                }
                self.standing = Standing::Failed { code };
            }
            other => broken.push(("only known events come", other.to_owned())),
        }
    }

    fn started(&mut self, event: &Event, _now: Instant, broken: &mut Problems) {
        if std::mem::replace(&mut self.started, true) {
            broken.push(("a task starts once", "a second `started`".to_owned()));
        }
        // The daemon's own measure, so that a busy machine decides nothing.
        let waited = event.data["waited_ms"].as_u64().map(Duration::from_millis);
        if let (Some(deadline), Some(waited)) = (self.facts.deadline, waited)
            && waited > deadline + Duration::from_millis(100)
        {
            let detail = format!("waited {waited:?} with a deadline of {deadline:?}");
            broken.push(("no task runs late in silence", detail));
        }
    }

    fn token(&mut self, event: &Event, broken: &mut Problems) {
        let (index, text) = (event.data["i"].as_u64(), event.data["t"].as_str());
        if !self.started {
            broken.push(("`started` comes before tokens", String::new()));
        }
        if index != Some(self.tokens) {
            let detail = format!("index {} was due", self.tokens);
            broken.push(("token indices have no gap and no repeat", detail));
        }
        if self.facts.numbered && text != Some(&format!("w{} ", self.tokens)) {
            let detail = format!("`w{} ` was due", self.tokens);
            broken.push(("the text has no gap and no repeat", detail));
            // One slip shifts all that follows; it is told once.
            self.facts.numbered = false;
        }
        self.tokens += 1;
        for byte in text.unwrap_or("").bytes() {
            self.text_sum = (self.text_sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.cancelled_at.is_some_and(|pieces| self.tokens > pieces) {
            let detail = format!("{} pieces at the answer", self.cancelled_at.unwrap_or(0));
            broken.push(("a cancelled task gives no token after the answer", detail));
        }
    }

    fn end(&mut self, event: &Event, broken: &mut Problems) {
        let reason = event.data["finish_reason"].as_str().unwrap_or("?");
        if !["stop", "length", "cancelled"].contains(&reason) {
            broken.push(("an end says why", reason.to_owned()));
        }
        if event.data["resumed"]
            .as_u64()
            .is_some_and(|times| times > 0)
            && !self.facts.resumes
        {
            broken.push(("only who asked for it is continued", reason.to_owned()));
        }
        self.standing = Standing::Ended {
            reason: reason.to_owned(),
        };
    }
}

#[cfg(test)]
mod tests;
