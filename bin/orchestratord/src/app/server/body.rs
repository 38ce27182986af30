//! Bodies with a clock: a request's must keep coming, and a response's end is
//! what the connection waits for before its next request.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use hyper::body::{Body as HttpBody, Frame, Incoming, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::guard::Stage;

/// A request's body that did not come in time.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub enum BodyTimeout {
    #[error("nothing more of the body came for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the body was not complete after {} s", .0.as_secs())]
    TooSlow(Duration),
}

/// Why a body cannot be read on.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyError {
    #[error("the body broke off")]
    Broken(#[source] hyper::Error),
    #[error("the body did not come in time")]
    Timeout(#[source] BodyTimeout),
}

/// A request's body. The time runs while somebody reads it.
#[derive(Debug)]
pub(super) struct TimedBody {
    inner: Incoming,
    stage: Arc<Stage>,
    stall: Duration,
    whole: Duration,
    /// When the body must be complete.
    complete_by: Option<Instant>,
    /// Runs while nothing comes.
    waiting: Option<Pin<Box<Sleep>>>,
    /// It was read to its end.
    ended: bool,
}

impl TimedBody {
    pub(super) fn new(
        inner: Incoming,
        stage: Arc<Stage>,
        stall: Duration,
        whole: Duration,
    ) -> Self {
        Self {
            inner,
            stage,
            stall,
            whole,
            complete_by: None,
            waiting: None,
            ended: false,
        }
    }
}

impl HttpBody for TimedBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let now = Instant::now();
        let whole = self.whole;
        let complete_by = *self.complete_by.get_or_insert(now + whole);
        if let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(context) {
            self.waiting = None;
            self.ended |= frame.is_none();
            if now >= complete_by && frame.is_some() {
                return Poll::Ready(Some(Err(BodyError::Timeout(BodyTimeout::TooSlow(whole)))));
            }
            return Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Broken)));
        }
        let stalled_at = now + self.stall;
        let waiting = self
            .waiting
            .get_or_insert_with(|| Box::pin(sleep_until(stalled_at.min(complete_by))));
        ready!(waiting.as_mut().poll(context));
        let timeout = if Instant::now() >= complete_by {
            BodyTimeout::TooSlow(whole)
        } else {
            BodyTimeout::Stalled(self.stall)
        };
        Poll::Ready(Some(Err(BodyError::Timeout(timeout))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for TimedBody {
    fn drop(&mut self) {
        if !self.ended && !self.inner.is_end_stream() {
            self.stage.leave_unread();
        }
    }
}

/// A response's body that holds something for as long as it lives: that its
/// connection is busy, or that one more stream is open.
#[derive(Debug)]
pub(crate) struct Holding<T> {
    inner: Body,
    _held: T,
}

impl<T> Holding<T> {
    pub(crate) fn new(inner: Body, held: T) -> Self {
        Self { inner, _held: held }
    }
}

impl<T: Unpin> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.inner).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
