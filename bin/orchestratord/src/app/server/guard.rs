//! A connection's bytes with a clock on each direction.
//!
//! Reading: a request's head must be complete within a time of its own, and a
//! connection between two requests may be idle for another. While a request is
//! answered nothing is expected, so nothing is timed. Writing: something must
//! be taken within a time whenever something is to be sent; a client that never
//! reads, and one that is gone without a word, is disconnected by that.
//!
//! A connection that is closed before the client has sent all that it meant to
//! is closed gently: what still comes is thrown away for a moment, since bytes
//! left unread would make the kernel take the answer back.
//!
//! The guard also puts hyper's own answers to what is no HTTP into our shape:
//! they pass here, and nothing else knows of them.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::task::AtomicWaker;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep_until};

use super::refusal;
use crate::app::config::Limits;

/// How long a connection is closed gently at the most.
const LINGER: Duration = Duration::from_secs(2);

const HEAD: u64 = 0;
const BUSY: u64 = 1;
const IDLE: u64 = 2;

/// Where a connection stands: waiting for a request's head, busy with a
/// request, or idle after one. Every change gives another number, so that a
/// timer knows whether it is for what is now. One task uses it, hence no locks.
#[derive(Debug, Default)]
pub(super) struct Stage {
    number: AtomicU64,
    /// Whoever waits for bytes while a request is answered. hyper does not ask
    /// again when the answer is complete, so it is woken to start the timer.
    waiting: AtomicWaker,
    /// The client may still be sending what nobody will read.
    unread: AtomicBool,
}

impl Stage {
    fn now(&self) -> u64 {
        self.number.load(Ordering::Relaxed)
    }

    fn change(&self, to: u64) {
        let next = (self.now() >> 2).wrapping_add(1) << 2;
        self.number.store(next | to, Ordering::Relaxed);
    }

    pub(super) fn leave_unread(&self) {
        self.unread.store(true, Ordering::Relaxed);
    }

    /// The connection is busy until what is returned is dropped.
    pub(super) fn begin_request(self: &Arc<Self>) -> Busy {
        self.change(BUSY);
        Busy(Arc::clone(self))
    }
}

/// A request that is being answered.
#[derive(Debug)]
pub(super) struct Busy(Arc<Stage>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.change(IDLE);
        self.0.waiting.wake();
    }
}

#[derive(Debug)]
pub(super) struct Guard {
    stream: TcpStream,
    stage: Arc<Stage>,
    head: Duration,
    idle: Duration,
    reader_stall: Duration,
    /// The time for what is awaited, and the stage that it is for.
    reading: Option<(u64, Pin<Box<Sleep>>)>,
    /// The client takes nothing; it has to by then.
    write_by: Option<Instant>,
    /// For that. It is made for the first wait of a connection, and never put off
    /// before it has fired: an answer waits for its client far more often than a
    /// client stalls.
    writing: Option<Pin<Box<Sleep>>>,
    /// Whether anything has come at all.
    begun: bool,
    /// What is sent instead of hyper's own refusal, and how much of it was.
    refusal: Option<(Vec<u8>, usize)>,
    /// Runs while the connection is being closed gently.
    closing: Option<Pin<Box<Sleep>>>,
}

impl Guard {
    pub(super) fn new(stream: TcpStream, stage: Arc<Stage>, limits: &Limits) -> Self {
        Self {
            stream,
            stage,
            head: limits.header(),
            idle: limits.idle(),
            reader_stall: limits.reader_stall(),
            reading: None,
            write_by: None,
            writing: None,
            begun: false,
            refusal: None,
            closing: None,
        }
    }

    /// Throws away what still comes, until the client closes its end or the
    /// time is over.
    fn poll_linger(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let timer = self
            .closing
            .get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + LINGER)));
        // First, or a client that never stops would keep it from its turn.
        if timer.as_mut().poll(context).is_ready() {
            return Poll::Ready(());
        }
        let mut sink = [0; 8 * 1024];
        loop {
            let mut buffer = ReadBuf::new(&mut sink);
            match ready!(Pin::new(&mut self.stream).poll_read(context, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                Ok(()) | Err(_) => return Poll::Ready(()),
            }
        }
    }

    /// The timer of the current stage; none while a request is answered.
    fn reading_timer(&mut self) -> Option<Pin<&mut Sleep>> {
        let stage = self.stage.now();
        let limit = match stage & 3 {
            BUSY => return None,
            IDLE => self.idle,
            _ => self.head,
        };
        if self.reading.as_ref().is_none_or(|(of, _)| *of != stage) {
            let timer = Box::pin(sleep_until(Instant::now() + limit));
            self.reading = Some((stage, timer));
        }
        self.reading.as_mut().map(|(_, timer)| timer.as_mut())
    }

    fn poll_reading_timer(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        let Some(timer) = self.reading_timer() else {
            self.stage.waiting.register(context.waker());
            return Poll::Pending;
        };
        ready!(timer.poll(context));
        let in_head = self.stage.now() & 3 == HEAD;
        if in_head && self.begun && self.write_by.is_none() {
            // A few hundred bytes into an empty buffer; what does not fit is
            // not worth waiting for.
            let _ = self.stream.try_write(&refusal::slow_head(self.head));
        }
        Poll::Ready(io::Error::new(
            io::ErrorKind::TimedOut,
            "no further request came in time",
        ))
    }

    fn note_read(&mut self) {
        if self.stage.now() & 3 == IDLE {
            self.stage.change(HEAD);
        }
        self.begun = true;
    }

    /// Times a write: whatever goes out starts the time anew.
    fn timed<T>(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.write_by = None;
            // Somebody who still takes an answer is not idle.
            if self.stage.now() & 3 == IDLE
                && let Some((_, timer)) = &mut self.reading
            {
                timer.as_mut().reset(Instant::now() + self.idle);
            }
            return written;
        }
        let limit = self.reader_stall;
        let by = *self.write_by.get_or_insert_with(|| Instant::now() + limit);
        let timer = self
            .writing
            .get_or_insert_with(|| Box::pin(sleep_until(by)));
        ready!(timer.as_mut().poll(context));
        if Instant::now() < by {
            // It was for a wait before this one.
            timer.as_mut().reset(by);
            ready!(timer.as_mut().poll(context));
        }
        let message = format!("the client took nothing for {} s", limit.as_secs());
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)))
    }

    /// Sends our refusal in place of the `whole` bytes of hyper's.
    fn poll_refusal(&mut self, context: &mut Context<'_>, whole: usize) -> Poll<io::Result<usize>> {
        while let Some((bytes, sent)) = &mut self.refusal {
            let rest = &bytes[*sent..];
            let written = Pin::new(&mut self.stream).poll_write(context, rest);
            if let Poll::Ready(Ok(count)) = &written {
                *sent += count;
                if *sent == bytes.len() {
                    self.refusal = None;
                    self.stage.leave_unread();
                }
            }
            ready!(self.timed(context, written))?;
        }
        Poll::Ready(Ok(whole))
    }
}

impl AsyncRead for Guard {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        match &read {
            Poll::Ready(Ok(())) if buffer.filled().len() > before => self.note_read(),
            Poll::Ready(_) => {}
            Poll::Pending => return self.poll_reading_timer(context).map(Err),
        }
        // Bytes that trickle in must not put the timer off.
        if let Poll::Ready(late) = self.poll_reading_timer(context) {
            return Poll::Ready(Err(late));
        }
        read
    }
}

impl AsyncWrite for Guard {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.refusal.is_none() {
            self.refusal = refusal::instead_of(bytes).map(|ours| (ours, 0));
        }
        if self.refusal.is_some() {
            return self.poll_refusal(context, bytes.len());
        }
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.timed(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let first = slices.first().map_or(&[][..], |slice| slice);
        if self.refusal.is_none() {
            self.refusal = refusal::instead_of(first).map(|ours| (ours, 0));
        }
        if self.refusal.is_some() {
            let whole = slices.iter().map(|slice| slice.len()).sum();
            return self.poll_refusal(context, whole);
        }
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.timed(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.closing.is_none() {
            ready!(Pin::new(&mut self.stream).poll_shutdown(context))?;
        }
        if self.stage.unread.load(Ordering::Relaxed) {
            ready!(self.poll_linger(context));
        }
        Poll::Ready(Ok(()))
    }
}
