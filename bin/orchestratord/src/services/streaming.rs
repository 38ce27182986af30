//! A task's log, rendered as server-sent events.
//!
//! Whatever a reader has not seen yet is written in one piece, so a reader who
//! keeps up gets every token at once and one who is behind catches up in few
//! writes. Comments keep an idle connection open.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};

use super::event_log::{Cursor, TaskEvent};
use super::tasks::TaskRecord;

/// The usual [`View::keep_alive`]: well below the minute after which many
/// proxies close an idle connection.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What one reader wants to see.
#[derive(Debug, Clone, Copy)]
pub struct View {
    /// Read on from after this id; 0 reads from the start.
    pub after: u64,
    /// Whether `metrics` events are shown.
    pub verbose: bool,
    /// Whether the engine is a scripted one, so that every event must say so.
    pub fallback: bool,
    /// How long nothing may be written before a comment is.
    pub keep_alive: Duration,
}

/// A reader's presence. When the last reader of a task that asked for it goes
/// away before the end, `on_abandoned` is called.
pub struct Presence<F: FnOnce()> {
    record: Arc<TaskRecord>,
    on_abandoned: Option<F>,
}

impl<F: FnOnce()> std::fmt::Debug for Presence<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Presence({})", self.record.id)
    }
}

impl<F: FnOnce()> Presence<F> {
    pub fn new(record: Arc<TaskRecord>, on_abandoned: F) -> Self {
        record.reader_came();
        Self {
            record,
            on_abandoned: Some(on_abandoned),
        }
    }
}

impl<F: FnOnce()> Drop for Presence<F> {
    fn drop(&mut self) {
        if self.record.reader_left()
            && let Some(on_abandoned) = self.on_abandoned.take()
        {
            on_abandoned();
        }
    }
}

/// The body of an event stream: ends after the terminal event. While nothing
/// happens, a comment says what is waited for, by `status`. Dropping the stream
/// drops `presence`.
pub fn render_sse_for_task<P: Send + 'static>(
    cursor: Cursor,
    view: View,
    presence: P,
    status: impl Fn() -> Option<String> + Clone + Send + 'static,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    futures::stream::unfold((cursor, presence), move |(mut cursor, presence)| {
        let status = status.clone();
        async move {
            let silent_until = Instant::now() + view.keep_alive;
            loop {
                let chunk = match timeout_at(silent_until, cursor.read()).await {
                    Err(_) => comment(status()),
                    Ok(None) => return None,
                    Ok(Some(batch)) => render_batch(&batch, view),
                };
                // A batch of events that this reader is not shown renders to
                // nothing; an empty chunk would only cost a write.
                if !chunk.is_empty() {
                    return Some((Ok(chunk), (cursor, presence)));
                }
                if Instant::now() >= silent_until {
                    return Some((Ok(comment(status())), (cursor, presence)));
                }
            }
        }
    })
}

/// A comment that keeps the connection open. Clients pass over it; people see
/// what is waited for.
pub(crate) fn comment(status: Option<String>) -> Bytes {
    let text = status.unwrap_or_else(|| "keep-alive".to_owned());
    let line = text.split(['\r', '\n']).collect::<Vec<_>>().join(" ");
    Bytes::from(format!(": {line}\n\n"))
}

fn render_batch(batch: &[(u64, TaskEvent)], view: View) -> Bytes {
    let mut out = Vec::with_capacity(batch.len() * 64);
    for (id, event) in batch {
        render_event(&mut out, *id, event, view);
    }
    Bytes::from(out)
}

fn render_event(out: &mut Vec<u8>, id: u64, event: &TaskEvent, view: View) {
    match event {
        TaskEvent::Metrics(_) if !view.verbose => {}
        TaskEvent::Started(data) => frame(out, id, event.name(), data, view.fallback),
        TaskEvent::Token(_) | TaskEvent::Chunk(_) | TaskEvent::Answer(_) => {
            if let Some(data) = event.token() {
                frame(out, id, event.name(), data, view.fallback);
            }
        }
        TaskEvent::Metrics(data) => frame(out, id, event.name(), data, view.fallback),
        TaskEvent::End(data) => frame(out, id, event.name(), data, view.fallback),
        TaskEvent::Error(data) => frame(out, id, event.name(), data, view.fallback),
    }
}

/// One event. JSON holds no raw line break, so its data is always one line.
pub(super) fn frame<T: Serialize>(
    out: &mut Vec<u8>,
    id: u64,
    name: &str,
    data: &T,
    fallback: bool,
) {
    #[derive(Serialize)]
    struct Marked<'a, T> {
        #[serde(flatten)]
        data: &'a T,
        fallback: bool,
    }

    out.extend_from_slice(format!("id: {id}\nevent: {name}\ndata: ").as_bytes());
    // Writing to a Vec cannot fail, and these types hold no map with keys
    // other than strings, which is all that JSON could refuse.
    let written = if fallback {
        serde_json::to_writer(&mut *out, &Marked { data, fallback })
    } else {
        serde_json::to_writer(&mut *out, data)
    };
    debug_assert!(written.is_ok(), "an event that JSON cannot hold");
    out.extend_from_slice(b"\n\n");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::event_log::{End, EventLog, Metrics, Started, Token};
    use futures::StreamExt;
    use worker_adapters_adapter_api::FinishReason;

    const VIEW: View = View {
        after: 0,
        verbose: false,
        fallback: false,
        keep_alive: KEEP_ALIVE,
    };

    fn events() -> Vec<TaskEvent> {
        vec![
            TaskEvent::Started(Started {
                queue_position: 0,
                predicted_start_ms: 5,
                waited_ms: 6,
            }),
            TaskEvent::Token(Token {
                t: "line\nbreak \"ü\"".into(),
                i: 0,
            }),
            TaskEvent::Metrics(Metrics {
                tokens_in: 3,
                tokens_out: 1,
                elapsed_ms: 9,
            }),
            TaskEvent::End(Box::new(End {
                tokens_in: Some(3),
                tokens_out: 1,
                decode_time_ms: 1.5,
                finish_reason: FinishReason::Stop,
                resumed: 0,
                receipt: None,
            })),
        ]
    }

    async fn render(view: View) -> String {
        let log = EventLog::new();
        for event in events() {
            log.append(event).unwrap();
        }
        let chunks: Vec<_> = render_sse_for_task(log.cursor(view.after), view, (), || None)
            .collect()
            .await;
        chunks
            .into_iter()
            .map(|chunk| String::from_utf8(chunk.unwrap().to_vec()).unwrap())
            .collect()
    }

    #[tokio::test]
    async fn a_transcript_as_people_see_it() {
        insta::assert_snapshot!(render(VIEW).await, @r#"
        id: 1
        event: started
        data: {"queue_position":0,"predicted_start_ms":5,"waited_ms":6}

        id: 2
        event: token
        data: {"t":"line\nbreak \"ü\"","i":0}

        id: 4
        event: end
        data: {"tokens_in":3,"tokens_out":1,"decode_time_ms":1.5,"finish_reason":"stop"}
        "#);
    }

    #[tokio::test]
    async fn verbose_readers_see_metrics_and_late_ones_the_rest() {
        let verbose = render(View {
            verbose: true,
            after: 2,
            ..VIEW
        })
        .await;
        assert!(verbose.starts_with("id: 3\nevent: metrics\n"), "{verbose}");
        assert!(!verbose.contains("event: token"));
    }

    #[tokio::test]
    async fn a_fallback_marks_every_event() {
        let marked = render(View {
            fallback: true,
            verbose: true,
            ..VIEW
        })
        .await;
        assert_eq!(marked.matches("\"fallback\":true").count(), 4);
    }

    #[tokio::test]
    async fn an_idle_stream_is_kept_alive() {
        let log = EventLog::new();
        let hasty = View {
            keep_alive: Duration::from_millis(1),
            ..VIEW
        };
        let mut stream = Box::pin(render_sse_for_task(log.cursor(0), hasty, (), || {
            Some("building\nevent: x".to_owned())
        }));
        assert_eq!(
            stream.next().await.unwrap().unwrap(),
            ": building event: x\n\n"
        );
    }
}
