//! One task, one event log, many cursors.
//!
//! The engine's stream is appended once. Every reader is a [`Cursor`] over the
//! log: a slow one never holds the engine, a late one misses nothing. A log is
//! closed by its terminal event, and a closed log takes no more events. That
//! is what makes "no token after cancel" true: whoever cancels closes the log
//! first, and what the engine still sends has nowhere to go.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use bytestring::ByteString;
use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use utoipa::ToSchema;
use worker_adapters_adapter_api::FinishReason;

/// What happened to a task, in the words of the SSE stream. Most events are
/// tokens, so the large ones are boxed.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskEvent {
    Started(Started),
    Token(Token),
    /// One event of the answer to a call; native readers see its text as a token.
    Chunk(Box<Chunk>),
    /// The whole answer to a call that does not stream.
    Answer(Box<Answer>),
    Metrics(Metrics),
    End(Box<End>),
    Error(Box<Failure>),
}

impl TaskEvent {
    /// The `event:` name on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Started(_) => "started",
            // What native readers are shown of a call's answer is its text.
            Self::Token(_) | Self::Chunk(_) | Self::Answer(_) => "token",
            Self::Metrics(_) => "metrics",
            Self::End(_) => "end",
            Self::Error(_) => "error",
        }
    }

    /// The piece of the answer's text in it, if there is one.
    pub fn token(&self) -> Option<&Token> {
        let token = match self {
            Self::Token(token) => return Some(token),
            Self::Chunk(chunk) => &chunk.token,
            Self::Answer(answer) => &answer.token,
            _ => return None,
        };
        (!token.t.is_empty()).then_some(token)
    }

    /// Memory it takes up, in bytes, about. Parameters and messages are small
    /// beside the answer and are counted at a flat rate.
    fn size(&self) -> usize {
        const TERMINAL: usize = 4096;
        let own = match self {
            Self::Token(token) => token.t.len(),
            Self::Chunk(chunk) => size_of::<Chunk>() + chunk.data.len() + chunk.token.t.len(),
            Self::Answer(answer) => size_of::<Answer>() + answer.body.len() + answer.token.t.len(),
            Self::Started(_) | Self::Metrics(_) => 0,
            Self::End(_) | Self::Error(_) => TERMINAL,
        };
        size_of::<Self>() + own
    }

    /// Whether this event closes the log.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::End(_) | Self::Error(_))
    }
}

/// Data of `event: started`: the engine has begun with the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// The queue position the task was admitted with; 0 is next.
    pub queue_position: u32,
    /// What was predicted at admission, in milliseconds.
    pub predicted_start_ms: u64,
    /// What it came to, in milliseconds.
    pub waited_ms: u64,
}

/// Data of `event: token`: a piece of the answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Token {
    /// The text.
    #[schema(value_type = String)]
    pub t: ByteString,
    /// Counts pieces: 0, 1, 2 and so on without a gap.
    pub i: u64,
}

/// One event of a call's answer, as the engine sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Its `event:` name, where the API gives one.
    pub name: Option<ByteString>,
    pub data: ByteString,
    /// What it adds to the answer's text, if it does; `i` counts those that do.
    pub token: Token,
}

/// The whole answer to a call that does not stream.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub body: Bytes,
    /// The text in it, if there is any.
    pub token: Token,
}

/// Data of `event: metrics`, sent to verbose readers only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Metrics {
    pub tokens_in: u64,
    pub tokens_out: u64,
    /// Milliseconds since the engine took the task.
    pub elapsed_ms: u64,
}

/// Data of `event: end`: the task is over and its answer complete, or it was
/// cancelled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct End {
    /// Tokens of the prompt; absent if the task was cancelled before the engine
    /// had told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_in: Option<u64>,
    /// Tokens generated; of a cancelled task, the pieces it had streamed.
    pub tokens_out: u64,
    /// Time the engine spent on generating, in milliseconds; of a cancelled
    /// task, the time since the engine took it.
    pub decode_time_ms: f64,
    /// `stop`, `length` or `cancelled`.
    #[schema(value_type = String)]
    pub finish_reason: FinishReason,
    /// How often it lost its engine and was gone on with on another; left out for
    /// most tasks, which never did.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub resumed: u32,
    /// What answered and how; absent where no engine took part.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub receipt: Option<Receipt>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &u32) -> bool {
    *count == 0
}

/// Says which engine and model answered, and with which parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    pub engine: String,
    pub engine_version: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub engine_digest: Option<String>,
    pub provisioning_mode: String,
    /// Which of the pool's replicas answered, where it has several places to ask.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model_digest: Option<String>,
    /// What the engine said at the end; absent if the task was cancelled.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub engine_says: Option<EngineSays>,
}

/// The engine's own words about a finished task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct EngineSays {
    /// Prompt tokens taken from the engine's prompt cache.
    pub tokens_cached: u64,
    /// Time the engine spent on the prompt, in milliseconds.
    pub prompt_time_ms: f64,
    /// The parameters really in force.
    pub effective: serde_json::Value,
}

/// Data of `event: error`: the task is over without a complete answer. The
/// same body is the `error` member of an HTTP error answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Failure {
    /// Stable; see the list in the API specification.
    #[schema(value_type = String)]
    pub code: ErrorCode,
    pub message: String,
    /// The next thing to try.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Whether the same request may succeed later.
    pub retriable: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u64>,
    /// The admission rule that refused the task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_label: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
}

impl Failure {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: None,
            retriable: false,
            retry_after_ms: None,
            policy_label: None,
            pool_id: None,
            engine: None,
            correlation_id: None,
        }
    }
}

/// The log was closed before the event came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed;

/// A task's events, append-only. Cheap to share.
#[derive(Debug, Default)]
pub struct EventLog {
    // Held for a push or a clone only, never across an await.
    events: Mutex<Vec<TaskEvent>>,
    /// What the events take up, about.
    bytes: AtomicUsize,
    changed: Notify,
}

impl EventLog {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Appends one event; a terminal one closes the log.
    pub fn append(&self, event: TaskEvent) -> Result<(), Closed> {
        let size = event.size();
        {
            let mut events = self.lock();
            if is_closed(&events) {
                return Err(Closed);
            }
            events.push(event);
        }
        self.bytes.fetch_add(size, Ordering::Relaxed);
        self.changed.notify_waiters();
        Ok(())
    }

    pub fn is_closed(&self) -> bool {
        is_closed(&self.lock())
    }

    /// The last event so far.
    pub fn last(&self) -> Option<TaskEvent> {
        self.lock().last().cloned()
    }

    /// Memory that its events take up, in bytes, about.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The number of the answer's pieces so far.
    pub fn pieces(&self) -> u64 {
        let events = self.lock();
        events.iter().filter_map(TaskEvent::token).count() as u64
    }

    /// The answer so far, and the number of its pieces.
    pub fn text(&self) -> (String, u64) {
        let events = self.lock();
        let tokens = events.iter().filter_map(TaskEvent::token);
        let mut text = String::with_capacity(tokens.map(|token| token.t.len()).sum());
        let mut pieces = 0;
        for event in events.iter() {
            if let Some(token) = event.token() {
                text.push_str(&token.t);
                pieces += 1;
            }
        }
        (text, pieces)
    }

    /// Reads from the event after `after`, which is an id that a reader was
    /// given before; 0 reads from the start.
    pub fn cursor(self: &Arc<Self>, after: u64) -> Cursor {
        Cursor {
            log: Arc::clone(self),
            next: usize::try_from(after).unwrap_or(usize::MAX),
        }
    }

    /// Waits until the log is closed.
    pub async fn closed(&self) {
        loop {
            let changed = self.changed.notified();
            if self.is_closed() {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<TaskEvent>> {
        // A push cannot leave the vector half-changed, so a poisoned lock
        // still guards a whole log.
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_closed(events: &[TaskEvent]) -> bool {
    events.last().is_some_and(TaskEvent::is_terminal)
}

/// A place in a log. Ids count events from 1, whether the reader is shown
/// them or not, so an id means the same to every reader.
#[derive(Debug)]
pub struct Cursor {
    log: Arc<EventLog>,
    next: usize,
}

/// The most events one read hands out: bounds what a reader who is far behind
/// makes us render at once.
const BATCH: usize = 256;

/// One event more at the most; it is what a reader who takes nothing makes us
/// keep.
const BATCH_BYTES: usize = 16 * 1024;

/// Where the batch that begins at `from` ends. It is never empty.
fn batch_end(events: &[TaskEvent], from: usize) -> usize {
    let mut bytes = 0;
    let batch = events[from..].iter().take(BATCH).take_while(|event| {
        let fits = bytes < BATCH_BYTES;
        bytes += match event {
            TaskEvent::Token(token) => token.t.len(),
            TaskEvent::Chunk(chunk) => chunk.data.len(),
            TaskEvent::Answer(answer) => answer.body.len(),
            _ => 0,
        };
        fits
    });
    from + batch.count()
}

impl Cursor {
    /// All events that are there and unread, with their ids, up to a bound;
    /// waits for one if there is none. `None` once the log is closed and read
    /// to its end. Cancel-safe: a dropped call loses nothing.
    pub async fn read(&mut self) -> Option<Vec<(u64, TaskEvent)>> {
        loop {
            // Made before the look at the log, so that an append in between
            // is not missed.
            let changed = self.log.changed.notified();
            {
                let events = self.log.lock();
                if self.next < events.len() {
                    let end = batch_end(&events, self.next);
                    let batch = events[self.next..end]
                        .iter()
                        .cloned()
                        .zip(self.next as u64 + 1..)
                        .map(|(event, id)| (id, event))
                        .collect();
                    drop(events);
                    self.next = end;
                    return Some(batch);
                }
                if is_closed(&events) {
                    return None;
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token(i: u64) -> TaskEvent {
        TaskEvent::Token(Token {
            t: format!("t{i}").into(),
            i,
        })
    }

    fn end() -> TaskEvent {
        TaskEvent::Error(Failure::new(ErrorCode::Internal, "over").into())
    }

    async fn read_all(mut cursor: Cursor) -> Vec<(u64, TaskEvent)> {
        let mut all = Vec::new();
        while let Some(batch) = cursor.read().await {
            all.extend(batch);
        }
        all
    }

    #[tokio::test]
    async fn a_closed_log_takes_nothing() {
        let log = EventLog::new();
        log.append(token(0)).unwrap();
        log.append(end()).unwrap();
        assert_eq!(log.append(token(1)), Err(Closed));
        assert_eq!(log.append(end()), Err(Closed));
        assert_eq!(read_all(log.cursor(0)).await.len(), 2);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken_by_every_append() {
        let log = EventLog::new();
        let reader = tokio::spawn(read_all(log.cursor(0)));
        for i in 0..1000 {
            log.append(token(i)).unwrap();
            if i % 7 == 0 {
                tokio::task::yield_now().await;
            }
        }
        log.append(end()).unwrap();
        let all = reader.await.unwrap();
        assert_eq!(all.len(), 1001);
        assert!(all.iter().map(|(id, _)| *id).eq(1..=1001));
    }

    #[test]
    fn a_batch_is_bounded_in_events_and_in_bytes() {
        let short: Vec<_> = (0..300).map(token).collect();
        assert_eq!(batch_end(&short, 0), BATCH);
        assert_eq!(batch_end(&short, 256), 300);
        let long = TaskEvent::Token(Token {
            t: "x".repeat(BATCH_BYTES).into(),
            i: 0,
        });
        assert_eq!(batch_end(&[long.clone(), long], 0), 1);
    }

    #[tokio::test]
    async fn an_id_beyond_the_end_of_a_closed_log_reads_nothing() {
        let log = EventLog::new();
        log.append(end()).unwrap();
        assert!(read_all(log.cursor(u64::MAX)).await.is_empty());
    }

    proptest! {
        // Wherever a reader breaks off, going on from its last id gives
        // exactly the rest.
        #[test]
        fn resuming_anywhere_gives_the_rest(count in 0u64..600, cut in 0u64..700) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let log = EventLog::new();
            for i in 0..count {
                log.append(token(i)).unwrap();
            }
            log.append(end()).unwrap();
            let whole = runtime.block_on(read_all(log.cursor(0)));
            let rest = runtime.block_on(read_all(log.cursor(cut)));
            let skip = usize::try_from(cut).unwrap().min(whole.len());
            prop_assert_eq!(&whole[skip..], &rest[..]);
        }
    }
}
