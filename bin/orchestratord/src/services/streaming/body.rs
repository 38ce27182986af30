//! A log as it is written to one client.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;

use super::comment;
use super::keep_alive::KeepAlive;
use crate::services::event_log::{Cursor, EventRef};

/// What is kept for the next piece, in bytes. A larger piece takes its memory with
/// it.
const BUFFER: usize = 4 * 1024;

/// What a reader who is behind is given in bytes before others have their turn.
const TURN: usize = 256 * 1024;

/// The body of an answer that follows a log. Whatever is there and unread is written
/// in one piece, straight from the log into one buffer, which is used again once the
/// connection has let go of it.
///
/// - `render` writes an event, and may end the stream with it. It runs under the
///   log's lock.
/// - `status` says what is waited for, while nothing happens.
/// - `reader` is dropped with the stream.
pub(crate) struct LogBody<R, S, P> {
    cursor: Cursor,
    render: R,
    status: S,
    keep_alive: Option<KeepAlive>,
    /// A comment comes first if there is nothing else to write yet.
    greets: bool,
    over: bool,
    /// Bytes since it last waited.
    in_turn: usize,
    out: BytesMut,
    _reader: P,
}

impl<R, S, P> std::fmt::Debug for LogBody<R, S, P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LogBody({:?})", self.cursor)
    }
}

// Nothing in it is pinned.
impl<R, S, P> Unpin for LogBody<R, S, P> {}

impl<R, S, P> LogBody<R, S, P>
where
    R: FnMut(&mut BytesMut, u64, EventRef<'_>) -> ControlFlow<()>,
    S: Fn() -> Option<String>,
{
    pub(crate) fn new(cursor: Cursor, reader: P, render: R, status: S) -> Self {
        Self {
            cursor,
            render,
            status,
            keep_alive: None,
            greets: false,
            over: false,
            in_turn: 0,
            out: BytesMut::new(),
            _reader: reader,
        }
    }

    /// Writes a comment whenever nothing else was written for so long.
    pub(crate) fn kept_alive(mut self, every: Duration) -> Self {
        self.keep_alive = Some(KeepAlive::new(every));
        self
    }

    /// Writes a comment at once if there is nothing else to begin with.
    pub(crate) fn greeting(mut self) -> Self {
        self.greets = true;
        self
    }

    /// Renders what is unread, until there is something to write. Ready with whether
    /// there is; if not, the stream is over.
    fn poll_render(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        // The last piece is written by now, mostly: the same memory again is still in the
        // processor's caches.
        if self.out.is_empty() {
            let _ = self.out.try_reclaim(BUFFER);
        }
        while !self.over {
            let Self {
                cursor,
                render,
                out,
                over,
                ..
            } = self;
            let unread = ready!(cursor.poll_each(context, |id, event| {
                if out.capacity() == 0 {
                    out.reserve(BUFFER);
                }
                *over = *over || render(out, id, event).is_break();
            }));
            self.over |= !unread;
            // A batch of events that this reader is not shown renders to nothing; an
            // empty piece would only cost a write.
            if !self.out.is_empty() {
                return Poll::Ready(true);
            }
        }
        Poll::Ready(false)
    }

    fn written(&mut self) -> Bytes {
        if self.out.len() > BUFFER {
            return std::mem::take(&mut self.out).freeze();
        }
        self.out.split().freeze()
    }
}

impl<R, S, P> Stream for LogBody<R, S, P>
where
    R: FnMut(&mut BytesMut, u64, EventRef<'_>) -> ControlFlow<()>,
    S: Fn() -> Option<String>,
{
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.in_turn > TURN {
            this.in_turn = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let rendered = this.poll_render(context);
        let greets = std::mem::take(&mut this.greets);
        let piece = match rendered {
            Poll::Ready(true) => this.written(),
            _ if greets => comment((this.status)()),
            Poll::Ready(false) => return Poll::Ready(None),
            Poll::Pending => {
                this.in_turn = 0;
                let Some(keep_alive) = &mut this.keep_alive else {
                    return Poll::Pending;
                };
                ready!(keep_alive.poll_silent(context));
                comment((this.status)())
            }
        };
        this.in_turn += piece.len();
        if let Some(keep_alive) = &mut this.keep_alive {
            keep_alive.wrote();
        }
        Poll::Ready(Some(Ok(piece)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::services::event_log::{EventLog, TaskEvent, Token};
    use futures::StreamExt;

    fn write(out: &mut BytesMut, _: u64, event: EventRef<'_>) -> ControlFlow<()> {
        let text = event.token().map_or("", |token| token.t);
        out.extend_from_slice(text.as_bytes());
        match text {
            "last" => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    }

    fn append(log: &EventLog, text: &str) {
        let t = text.into();
        log.append(TaskEvent::Token(Token { t, i: 0 })).unwrap();
    }

    #[tokio::test]
    async fn pieces_that_were_let_go_make_room_for_the_next() {
        let log = EventLog::new();
        let mut body = LogBody::new(log.cursor(0), (), write, || None);
        append(&log, "first");
        let first = body.next().await.unwrap().unwrap().as_ptr().addr();
        for _ in 0..10 * BUFFER / 8 {
            append(&log, "12345678");
            let piece = body.next().await.unwrap().unwrap();
            assert!(piece.as_ptr().addr().abs_diff(first) < BUFFER);
        }
        // What is kept is not written over.
        append(&log, "kept");
        let kept = body.next().await.unwrap().unwrap();
        for _ in 0..BUFFER {
            append(&log, "12345678");
            body.next().await.unwrap().unwrap();
        }
        assert_eq!(kept, "kept");
        // A large piece takes its memory with it.
        append(&log, &"x".repeat(BUFFER + 1));
        assert_eq!(body.next().await.unwrap().unwrap().len(), BUFFER + 1);
        assert_eq!(body.out.capacity(), 0);
    }

    #[tokio::test]
    async fn a_late_reader_lets_others_have_their_turn() {
        let log = EventLog::new();
        let text = "x".repeat(1000);
        for _ in 0..3 * TURN / text.len() {
            append(&log, &text);
        }
        append(&log, "last");
        let mut body = LogBody::new(log.cursor(0), (), write, || None);
        let (mut bytes, mut turns) = (0, 1);
        let reading = std::future::poll_fn(|context| {
            loop {
                match body.poll_next_unpin(context) {
                    Poll::Ready(Some(piece)) => bytes += piece.unwrap().len(),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {
                        turns += 1;
                        return Poll::Pending;
                    }
                }
            }
        });
        // It wakes itself: nothing more is appended.
        reading.await;
        assert_eq!(bytes, 3 * TURN / text.len() * text.len() + "last".len());
        assert!((3..=4).contains(&turns), "{turns}");
    }

    #[tokio::test]
    async fn an_event_that_ends_the_stream_is_its_last() {
        let log = EventLog::new();
        for text in ["a", "last", "more"] {
            append(&log, text);
        }
        let mut body = LogBody::new(log.cursor(0), (), write, || None).greeting();
        assert_eq!(body.next().await.unwrap().unwrap(), "alast");
        assert_eq!(body.next().await, None);
        assert_eq!(body.next().await, None);
    }
}
