//! A piece of work, rendered as server-sent events in the framing of the task
//! streams: `progress` now and then, one `done` or `error` at the end, and
//! comments while nothing happens.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::Stream;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::{PROGRESS_EVERY, Standing, Work};
use crate::services::streaming::{comment, frame};

/// Something with work that can be watched.
pub trait Watchable: Send + Sync + 'static {
    type Result: Clone + Send + Sync + 'static;
    /// Data of `event: done`.
    type End: Serialize;

    fn work(&self) -> &Work<Self::Result>;

    fn end(&self, standing: &Standing<Self::Result>) -> Self::End;
}

/// One reader.
struct Reader<W: Watchable> {
    // Kept, so that the work lives as long as somebody reads.
    watched: Arc<W>,
    standing: watch::Receiver<Standing<W::Result>>,
    /// The id of the last event that the reader has.
    seen: u64,
    /// When it may be told of progress again.
    not_before: Instant,
    keep_alive: Duration,
    over: bool,
}

/// The body of an event stream. `after` is the last id that the reader has
/// seen.
pub fn events<W: Watchable>(
    watched: Arc<W>,
    after: u64,
    keep_alive: Duration,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let reader = Reader {
        standing: watched.work().watch(),
        watched,
        seen: after,
        not_before: Instant::now(),
        keep_alive,
        over: false,
    };
    futures::stream::unfold(reader, |mut reader| async move {
        let chunk = reader.next().await?;
        Some((Ok(chunk), reader))
    })
}

impl<W: Watchable> Reader<W> {
    async fn next(&mut self) -> Option<Bytes> {
        let silent_until = Instant::now() + self.keep_alive;
        loop {
            if self.over {
                return None;
            }
            let standing = self.standing.borrow_and_update().clone();
            let is_new = standing.event > self.seen;
            if standing.progress.state.is_over() {
                self.over = true;
                return is_new.then(|| self.last_event(&standing));
            }
            if standing.abandoned {
                return None;
            }
            if is_new && Instant::now() >= self.not_before {
                self.seen = standing.event;
                self.not_before = Instant::now() + PROGRESS_EVERY;
                let mut out = BytesMut::new();
                frame(
                    &mut out,
                    standing.event,
                    "progress",
                    &standing.progress,
                    false,
                );
                return Some(out.freeze());
            }
            let wake = if is_new {
                self.not_before
            } else {
                silent_until
            };
            tokio::select! {
                changed = self.standing.changed() => changed.ok()?,
                () = sleep_until(wake.min(silent_until)) => {
                    if Instant::now() >= silent_until {
                        return Some(comment(None));
                    }
                }
            }
        }
    }

    fn last_event(&self, standing: &Standing<W::Result>) -> Bytes {
        let mut out = BytesMut::new();
        if let Some(failure) = &standing.error {
            frame(&mut out, standing.event, "error", failure, false);
        } else {
            let data = self.watched.end(standing);
            frame(&mut out, standing.event, "done", &data, false);
        }
        out.freeze()
    }
}

#[cfg(test)]
mod tests {
    use super::super::meter::Reading;
    use super::super::pace::Pace;
    use super::*;
    use crate::services::event_log::Failure;
    use futures::StreamExt;
    use jiff::Timestamp;

    fn reading(done: u64) -> Reading {
        Reading {
            done,
            total: Some(100),
            note: None,
        }
    }

    impl Watchable for Work<u8> {
        type Result = u8;
        type End = Option<u8>;

        fn work(&self) -> &Work<u8> {
            self
        }

        fn end(&self, standing: &Standing<u8>) -> Option<u8> {
            standing.result
        }
    }

    fn reader(
        work: &Arc<Work<u8>>,
        after: u64,
    ) -> std::pin::Pin<Box<impl Stream<Item = Result<Bytes, Infallible>>>> {
        Box::pin(events(Arc::clone(work), after, Duration::from_secs(10)))
    }

    async fn text(stream: &mut (impl Stream<Item = Result<Bytes, Infallible>> + Unpin)) -> String {
        let chunk = stream.next().await.unwrap().unwrap();
        String::from_utf8(chunk.to_vec()).unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn progress_comes_four_times_a_second_at_most_and_then_one_end() {
        let work = Arc::new(Work::new(Timestamp::now()));
        let mut stream = reader(&work, 0);
        work.begin();
        assert!(text(&mut stream).await.contains("event: progress\n"));
        let begun = Instant::now();
        work.advance(reading(1), &Pace::default());
        work.advance(reading(2), &Pace::default());
        let next = text(&mut stream).await;
        assert!(next.contains("\"bytes\":2"), "{next}");
        assert_eq!(begun.elapsed(), PROGRESS_EVERY);
        // The end does not wait.
        work.advance(reading(3), &Pace::default());
        work.end(Ok(9));
        let last = text(&mut stream).await;
        assert!(last.contains("event: done\ndata: 9\n\n"), "{last}");
        assert_eq!(begun.elapsed(), PROGRESS_EVERY);
        assert!(stream.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_seen_the_end_gets_nothing_and_who_comes_late_gets_the_end() {
        let work = Arc::new(Work::new(Timestamp::now()));
        work.end(Err(Failure::internal("broken")));
        let end = text(&mut reader(&work, 0)).await;
        assert!(
            end.contains("event: error\n") && end.contains("broken"),
            "{end}"
        );
        let id = work.standing().event;
        assert!(end.starts_with(&format!("id: {id}\n")));
        assert!(reader(&work, id).next().await.is_none());
        assert!(reader(&work, id - 1).next().await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_kept_alive_and_an_abandoned_stream_ends() {
        let work = Arc::new(Work::<u8>::new(Timestamp::now()));
        let mut stream = reader(&work, work.standing().event);
        assert_eq!(text(&mut stream).await, ": keep-alive\n\n");
        work.abandon();
        assert!(stream.next().await.is_none());
    }
}
