//! The events of an answer that streams, whichever way its bytes are read.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use futures::{Stream, StreamExt};
use worker_adapters_adapter_api::WorkerError;

use crate::client::chain;
use crate::http::AnswerBody;
use crate::sse::{EventSplitter, Malformed, SseEvent, SseLimits};

type Indirect = Pin<Box<dyn Stream<Item = Result<Bytes, reqwest::Error>> + Send>>;

/// Events as they come.
pub(crate) struct Incoming {
    source: Source,
    splitter: EventSplitter,
}

enum Source {
    /// From the socket itself.
    Direct(AnswerBody),
    /// Through a client with connections of its own, and whether it has brought
    /// anything of late.
    Indirect(Indirect, bool),
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming").finish_non_exhaustive()
    }
}

impl Incoming {
    pub(crate) fn direct(body: AnswerBody) -> Self {
        Self::of(Source::Direct(body))
    }

    pub(crate) fn indirect(
        bytes: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static,
    ) -> Self {
        Self::of(Source::Indirect(Box::pin(bytes), true))
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            splitter: EventSplitter::new(SseLimits::default()),
        }
    }

    /// The next event; `None` at the stream's proper end. Nothing is to be asked after
    /// an error.
    pub(crate) fn poll_event(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<SseEvent, WorkerError>>> {
        loop {
            match self.splitter.next_event() {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => {}
                Err(malformed) => return Poll::Ready(Some(Err(no_protocol(malformed)))),
            }
            match ready!(self.source.poll_bytes(context)) {
                Some(Ok(bytes)) => self.splitter.push(bytes),
                Some(Err(reason)) => {
                    return Poll::Ready(Some(Err(WorkerError::Reset { reason })));
                }
                None => return Poll::Ready(None),
            }
        }
    }

    /// Whether nothing came last though there may be something to read.
    pub(crate) fn has_yielded(&self) -> bool {
        match &self.source {
            Source::Direct(body) => body.has_yielded(),
            Source::Indirect(..) => false,
        }
    }

    /// Whether the engine was heard of since this was last asked; if not, what came
    /// is of the same moment as what came before.
    pub(crate) fn take_has_read(&mut self) -> bool {
        match &mut self.source {
            Source::Direct(body) => body.take_has_read(),
            Source::Indirect(_, has_read) => std::mem::take(has_read),
        }
    }
}

impl Source {
    /// The next bytes, or in words why there are none.
    fn poll_bytes(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, String>>> {
        match self {
            Self::Direct(body) => {
                let bytes = ready!(body.poll_data(context));
                Poll::Ready(bytes.map(|bytes| bytes.map_err(|error| chain(&error))))
            }
            Self::Indirect(stream, has_read) => {
                let bytes = ready!(stream.poll_next_unpin(context));
                *has_read = true;
                Poll::Ready(bytes.map(|bytes| bytes.map_err(|error| chain(&error.without_url()))))
            }
        }
    }
}

fn no_protocol(malformed: Malformed) -> WorkerError {
    WorkerError::Protocol {
        what: malformed.to_string(),
    }
}
