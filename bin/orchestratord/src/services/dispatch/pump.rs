//! From the engine's stream to the task's log.

use std::future::Future;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures::StreamExt;
use worker_adapters_adapter_api::{
    CallChunk, CancelReport, EndSummary, FinishReason, TokenEvent, TokenStream,
};

use super::trouble::Trouble;
use super::{TaskRun, receipt};
use crate::services::event_log::{Answer, Chunk, End, Failure, Metrics, Started, TaskEvent, Token};
use crate::services::tasks::TaskRecord;

/// How many events go to the log before the readers have their turn.
const AT_ONCE: u32 = 128;

/// How the taking of events ended.
pub(super) enum Pumped {
    Ended,
    Cancelled(Option<CancelReport>),
    Failed(Trouble),
    NotTaken(Trouble),
    /// Asked to give the task back.
    GivenBack,
}

/// Why no more events are taken.
enum Stopped {
    /// The slot has to be seen free.
    Cancelled,
    By(Pumped),
}

impl TaskRun {
    /// Takes the engine's events to the log as they come: all that are there at a
    /// time, then the readers have their turn.
    pub(super) async fn pump(&mut self, mut stream: TokenStream) -> Pumped {
        let (cancel, give_back) = (self.cancel.clone(), self.give_back.clone());
        // Made once: a token is no reason to make them anew.
        let mut cancelled = std::pin::pin!(cancel.cancelled());
        let mut given_back = std::pin::pin!(give_back.cancelled());
        let stopped = std::future::poll_fn(|context| {
            if cancelled.as_mut().poll(context).is_ready() {
                return Poll::Ready(Stopped::Cancelled);
            }
            if given_back.as_mut().poll(context).is_ready() {
                return Poll::Ready(Stopped::By(Pumped::GivenBack));
            }
            self.poll_events(&mut stream, context)
        });
        match stopped.await {
            Stopped::By(pumped) => pumped,
            Stopped::Cancelled => Pumped::Cancelled(self.free_slot(stream).await),
        }
    }

    /// Appends what is there, at most [`AT_ONCE`] events.
    fn poll_events(
        &mut self,
        stream: &mut TokenStream,
        context: &mut Context<'_>,
    ) -> Poll<Stopped> {
        let mut now = None;
        for _ in 0..AT_ONCE {
            let event = ready!(stream.poll_next_unpin(context));
            let kept = match event {
                Some(Ok(TokenEvent::End(summary))) => {
                    return Poll::Ready(Stopped::By(self.end(&summary)));
                }
                // What is there together came together.
                Some(Ok(event)) => self.append(event, *now.get_or_insert_with(Instant::now)),
                Some(Err(error)) => {
                    return Poll::Ready(Stopped::By(Pumped::Failed((&error).into())));
                }
                None => {
                    let failure = Failure::internal("the engine's stream ended without an end");
                    return Poll::Ready(Stopped::By(Pumped::Failed(failure.into())));
                }
            };
            if !kept {
                // Somebody closed the log: whoever did also cancels us.
                return Poll::Ready(Stopped::Cancelled);
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }

    /// Appends an event that is not the last; says whether the log took it.
    fn append(&mut self, event: TokenEvent, now: Instant) -> bool {
        let event = match event {
            TokenEvent::Started => {
                let record = &self.submission.record;
                if record.started.set(now).is_err() {
                    // It has begun on an engine before, and that was said.
                    return !record.log.is_closed();
                }
                self.meters.queue_wait.record(record.created.elapsed());
                TaskEvent::Started(started(record))
            }
            TokenEvent::Token {
                text,
                index,
                tokens_in,
                tokens_out,
            } => {
                self.note_answering();
                if tokens_in > 0 {
                    // The first engine's count is the prompt's own. Some tell it only
                    // at the end.
                    let _ = self.submission.record.tokens_in.set(tokens_in);
                }
                let index = self.submission.carried.pieces + index;
                if index == 0 {
                    self.note_first_token();
                }
                self.seen.saw(tokens_out, now);
                TaskEvent::Token(Token { t: text, i: index })
            }
            TokenEvent::Chunk(chunk) => {
                self.note_answering();
                self.seen.saw(chunk.tokens_out, now);
                TaskEvent::Chunk(self.chunk(chunk))
            }
            TokenEvent::Answer(answer) => {
                self.note_answering();
                // Handed out: no other engine may answer once more.
                self.seen.saw(0, now);
                TaskEvent::Answer(Box::new(Answer {
                    body: answer.body,
                    token: Token {
                        t: answer.text.into(),
                        i: 0,
                    },
                }))
            }
            TokenEvent::Metrics(figures) => {
                let (record, carried) = (&self.submission.record, &self.submission.carried);
                TaskEvent::Metrics(Metrics {
                    tokens_in: *record.tokens_in.get_or_init(|| figures.tokens_in),
                    tokens_out: carried.tokens_out + figures.tokens_out,
                    elapsed_ms: millis(record.started.get().map(Instant::elapsed)),
                })
            }
            TokenEvent::End(_) => unreachable!("the pump handles the end"),
        };
        self.submission.record.log.append(event).is_ok()
    }

    /// One event of a call's answer. Only those with text count as pieces.
    fn chunk(&mut self, chunk: CallChunk) -> Chunk {
        let index = self.pieces;
        if !chunk.text.is_empty() {
            if index == 0 {
                self.note_first_token();
            }
            self.pieces += 1;
        }
        Chunk {
            name: chunk.name,
            data: chunk.data,
            token: Token {
                t: chunk.text,
                i: index,
            },
        }
    }

    /// Something of the answer is handed out. From now on it is one replica's.
    fn note_answering(&self) {
        let record = &self.submission.record;
        if record.is_answering() {
            return;
        }
        record.set_answering();
        if let Some(replica) = self.host.replica_of(&self.context.pool_id, record.id) {
            // It begins once.
            let _ = record.replica.set(replica);
        }
    }

    fn note_first_token(&self) {
        let since = self.submission.record.created.elapsed();
        self.meters.first_token.record(since);
    }

    fn end(&self, summary: &EndSummary) -> Pumped {
        let (record, carried) = (&self.submission.record, &self.submission.carried);
        let end = End {
            tokens_in: Some(*record.tokens_in.get_or_init(|| summary.tokens_in)),
            tokens_out: carried.tokens_out + summary.tokens_out,
            decode_time_ms: carried.decode.as_secs_f64() * 1000.0 + summary.decode_time_ms,
            finish_reason: summary.finish_reason,
            resumed: carried.resets,
            receipt: Some(receipt(&self.context, record, Some(summary))),
        };
        self.close_complete(end)
    }

    /// Ends a task that lost its engine after its last token.
    pub(super) fn end_complete(&self) -> Pumped {
        let (record, carried) = (&self.submission.record, &self.submission.carried);
        self.close_complete(End {
            tokens_in: record.tokens_in.get().copied(),
            tokens_out: carried.tokens_out,
            decode_time_ms: carried.decode.as_secs_f64() * 1000.0,
            finish_reason: FinishReason::Length,
            resumed: carried.resets,
            receipt: Some(receipt(&self.context, record, None)),
        })
    }

    fn close_complete(&self, end: End) -> Pumped {
        let tokens_in = end.tokens_in.unwrap_or_default();
        self.meters.tokens_in.increment(tokens_in);
        self.meters.tokens_out.increment(end.tokens_out);
        let log = &self.submission.record.log;
        match log.append(TaskEvent::End(Box::new(end))) {
            Ok(()) => Pumped::Ended,
            Err(_) => Pumped::Cancelled(None),
        }
    }
}

fn millis(time: Option<Duration>) -> u64 {
    time.unwrap_or_default().as_millis() as u64
}

fn started(record: &TaskRecord) -> Started {
    // A task runs only after it was admitted.
    let admitted = record.admitted.get();
    Started {
        queue_position: admitted.map_or(0, |admitted| admitted.queue_position as u32),
        predicted_start_ms: admitted
            .map_or(0, |admitted| admitted.predicted_start.as_millis() as u64),
        waited_ms: record.created.elapsed().as_millis() as u64,
    }
}
