//! A task's log, rendered as server-sent events.
//!
//! Whatever a reader has not seen yet is written in one piece, so a reader who
//! keeps up gets every token at once and one who is behind catches up in few
//! writes. Comments keep an idle connection open.

mod body;
mod keep_alive;

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures::Stream;
use serde::Serialize;

pub(crate) use self::body::LogBody;
use super::event_log::{Cursor, EventRef, TokenRef};
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
    status: impl Fn() -> Option<String> + Send + 'static,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let render = move |out: &mut BytesMut, id, event: EventRef<'_>| {
        render_event(out, id, event, view);
        ControlFlow::Continue(())
    };
    LogBody::new(cursor, presence, render, status).kept_alive(view.keep_alive)
}

/// A comment that keeps the connection open. Clients pass over it; people see
/// what is waited for.
pub(crate) fn comment(status: Option<String>) -> Bytes {
    let text = status.unwrap_or_else(|| "keep-alive".to_owned());
    let line = text.split(['\r', '\n']).collect::<Vec<_>>().join(" ");
    Bytes::from(format!(": {line}\n\n"))
}

fn render_event(out: &mut BytesMut, id: u64, event: EventRef<'_>, view: View) {
    let fallback = view.fallback;
    match event {
        // What native readers are shown of a call's answer is its text.
        EventRef::Token(_) | EventRef::Chunk(_) | EventRef::Answer(_) => {
            if let Some(token) = event.token() {
                token_frame(out, id, token, fallback);
            }
        }
        EventRef::Started(data) => frame(out, id, "started", data, fallback),
        EventRef::Metrics(data) => {
            if view.verbose {
                frame(out, id, "metrics", data, fallback);
            }
        }
        EventRef::End(data) => frame(out, id, "end", data, fallback),
        EventRef::Error(data) => frame(out, id, "error", data, fallback),
    }
}

/// As [`frame`] writes it. Nearly all events are tokens, so this is by hand.
fn token_frame(out: &mut BytesMut, id: u64, token: TokenRef<'_>, fallback: bool) {
    let mut digits = itoa::Buffer::new();
    out.extend_from_slice(b"id: ");
    out.extend_from_slice(digits.format(id).as_bytes());
    out.extend_from_slice(b"\nevent: token\ndata: {\"t\":");
    write_json(out, token.t);
    out.extend_from_slice(b",\"i\":");
    out.extend_from_slice(digits.format(token.i).as_bytes());
    out.extend_from_slice(if fallback {
        b",\"fallback\":true}\n\n"
    } else {
        b"}\n\n"
    });
}

/// One event. JSON holds no raw line break, so its data is always one line.
pub(super) fn frame<T: Serialize>(
    out: &mut BytesMut,
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

    out.extend_from_slice(b"id: ");
    out.extend_from_slice(itoa::Buffer::new().format(id).as_bytes());
    for part in ["\nevent: ", name, "\ndata: "] {
        out.extend_from_slice(part.as_bytes());
    }
    if fallback {
        write_json(out, &Marked { data, fallback });
    } else {
        write_json(out, data);
    }
    out.extend_from_slice(b"\n\n");
}

fn write_json<T: Serialize + ?Sized>(out: &mut BytesMut, data: &T) {
    // Writing to memory cannot fail, and these types hold no map with keys
    // other than strings, which is all that JSON could refuse.
    let written = serde_json::to_writer(out.writer(), data);
    debug_assert!(written.is_ok(), "an event that JSON cannot hold");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::event_log::{End, EventLog, Metrics, Started, TaskEvent, Token};
    use futures::StreamExt;
    use proptest::prelude::*;
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

    proptest! {
        #[test]
        fn a_token_written_by_hand_is_as_written_by_serde(
            t in ".*", i in any::<u64>(), id in any::<u64>(), fallback in any::<bool>(),
        ) {
            let token = Token { t: t.into(), i };
            let (mut by_hand, mut by_serde) = (BytesMut::new(), BytesMut::new());
            let event = TaskEvent::Token(token.clone());
            render_event(&mut by_hand, id, event.view(), View { fallback, ..VIEW });
            frame(&mut by_serde, id, "token", &token, fallback);
            prop_assert_eq!(by_hand, by_serde);
        }
    }
}
