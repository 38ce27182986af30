//! A reader's place in a log.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};

use super::events::{EventRef, TaskEvent};
use super::log::EventLog;
use super::waiters::Seat;

/// A place in a log. Ids count events from 1, whether the reader is shown
/// them or not, so an id means the same to every reader.
#[derive(Debug)]
pub struct Cursor {
    log: Arc<EventLog>,
    next: usize,
    seat: Seat,
}

impl Cursor {
    pub(super) fn new(log: Arc<EventLog>, next: usize) -> Self {
        Self {
            log,
            next,
            seat: Seat::default(),
        }
    }

    /// Shows the events that are there and unread, with their ids, up to a bound.
    /// Ready with whether there were any: if not, the log is closed and read to its
    /// end. If there are none yet, the task of `context` is woken with the next.
    ///
    /// `show` runs under the log's lock, and must not look at the log in another way.
    pub fn poll_each(
        &mut self,
        context: &mut Context<'_>,
        show: impl FnMut(u64, EventRef<'_>),
    ) -> Poll<bool> {
        let replaced = {
            let mut state = self.log.lock();
            if self.next < state.store.len() {
                self.next = state.store.each(self.next, show);
                return Poll::Ready(true);
            }
            if state.store.is_closed() {
                return Poll::Ready(false);
            }
            state.readers.wait(&mut self.seat, context.waker())
        };
        drop(replaced);
        Poll::Pending
    }

    /// As [`Self::poll_each`]; waits until there is something. Cancel-safe: a dropped
    /// call loses nothing.
    pub async fn each(&mut self, mut show: impl FnMut(u64, EventRef<'_>)) -> bool {
        poll_fn(|context| self.poll_each(context, &mut show)).await
    }

    /// All events that are there and unread, with their ids, up to a bound;
    /// waits for one if there is none. `None` once the log is closed and read
    /// to its end. Cancel-safe: a dropped call loses nothing.
    pub async fn read(&mut self) -> Option<Vec<(u64, TaskEvent)>> {
        let mut batch = Vec::new();
        let more = self
            .each(|id, event| batch.push((id, event.to_event())))
            .await;
        more.then_some(batch)
    }
}

impl Drop for Cursor {
    fn drop(&mut self) {
        if self.seat.is_taken() {
            let left = self.log.lock().readers.leave(&mut self.seat);
            drop(left);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::super::events::{Failure, Token};
    use super::*;
    use llama_orch_types::ErrorCode;
    use proptest::prelude::*;

    /// A task that only counts how often it is woken.
    #[derive(Default)]
    struct Counted(AtomicUsize);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A reader, and what is known of it.
    struct Reader {
        cursor: Cursor,
        task: Arc<Counted>,
        read: u64,
        waits: bool,
        woken: usize,
    }

    impl Reader {
        fn of(log: &Arc<EventLog>) -> Self {
            Self {
                cursor: log.cursor(0),
                task: Arc::default(),
                read: 0,
                waits: false,
                woken: 0,
            }
        }

        fn poll(&mut self) {
            let waker = Waker::from(Arc::clone(&self.task));
            let read = &mut self.read;
            let polled = self
                .cursor
                .poll_each(&mut Context::from_waker(&waker), |id, event| {
                    *read += 1;
                    assert_eq!(id, *read);
                    assert!(event.token().is_none_or(|token| token.i == id - 1));
                });
            self.waits = polled.is_pending();
        }

        /// The task goes on as another one.
        fn moves(&mut self) {
            self.task = Arc::default();
            self.woken = 0;
        }

        fn is_kept_by_the_log(&self) -> bool {
            Arc::strong_count(&self.task) > 1
        }
    }

    fn token(i: u64) -> TaskEvent {
        let t = "t".into();
        TaskEvent::Token(Token { t, i })
    }

    fn over() -> TaskEvent {
        TaskEvent::Error(Box::new(Failure::new(ErrorCode::Internal, "over")))
    }

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Append,
        Comes,
        Polls(usize),
        Moves(usize),
        Leaves(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::Append),
            2 => Just(Step::Comes),
            6 => any::<usize>().prop_map(Step::Polls),
            1 => any::<usize>().prop_map(Step::Moves),
            2 => any::<usize>().prop_map(Step::Leaves),
        ];
        proptest::collection::vec(step, 0..80)
    }

    /// Appends, and checks that those who wait are woken, once, and nobody else.
    fn append(log: &EventLog, readers: &mut [Reader], event: TaskEvent) {
        log.append(event).unwrap();
        for reader in readers {
            reader.woken += usize::from(std::mem::take(&mut reader.waits));
            assert_eq!(reader.task.0.load(Ordering::SeqCst), reader.woken);
            assert!(!reader.is_kept_by_the_log());
        }
    }

    proptest! {
        /// However readers come, read, go on in other tasks and leave: none is
        /// forgotten, and nothing of those who left is kept.
        #[test]
        fn who_waits_is_woken_by_the_next_event(steps in steps()) {
            let (log, mut appended) = (EventLog::new(), 0);
            let mut readers: Vec<Reader> = Vec::new();
            for step in steps {
                let count = readers.len().max(1);
                match step {
                    Step::Append => {
                        append(&log, &mut readers, token(appended));
                        appended += 1;
                    }
                    Step::Comes => readers.push(Reader::of(&log)),
                    Step::Polls(at) => {
                        if let Some(reader) = readers.get_mut(at % count) {
                            reader.poll();
                        }
                    }
                    Step::Moves(at) => {
                        if let Some(reader) = readers.get_mut(at % count).filter(|it| !it.waits) {
                            reader.moves();
                        }
                    }
                    Step::Leaves(at) => {
                        if at % count < readers.len() {
                            let Reader { cursor, task, .. } = readers.swap_remove(at % count);
                            drop(cursor);
                            prop_assert_eq!(Arc::strong_count(&task), 1);
                        }
                    }
                }
            }
            append(&log, &mut readers, over());
            for reader in &mut readers {
                while !matches!(reader.cursor.poll_each(
                    &mut Context::from_waker(Waker::noop()), |_, _| reader.read += 1,
                ), Poll::Ready(false)) {}
                prop_assert_eq!(reader.read, appended + 1);
            }
        }
    }

    #[test]
    fn a_reader_that_is_polled_by_another_task_is_woken_there() {
        let log = EventLog::new();
        let mut reader = Reader::of(&log);
        reader.poll();
        let first = Arc::clone(&reader.task);
        reader.moves();
        reader.poll();
        assert_eq!(Arc::strong_count(&first), 1, "the old waker is let go");
        log.append(token(0)).unwrap();
        assert_eq!(first.0.load(Ordering::SeqCst), 0);
        assert_eq!(reader.task.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn who_waits_for_the_end_is_woken_by_it_alone() {
        let log = EventLog::new();
        let task = Arc::new(Counted::default());
        let waker = Waker::from(Arc::clone(&task));
        let mut context = Context::from_waker(&waker);
        let (mut one, mut other) = (Box::pin(log.closed()), Box::pin(log.closed()));
        assert!(one.as_mut().poll(&mut context).is_pending());
        assert!(other.as_mut().poll(&mut context).is_pending());
        drop(other);
        log.append(token(0)).unwrap();
        assert_eq!(task.0.load(Ordering::SeqCst), 0);
        log.append(over()).unwrap();
        assert_eq!(task.0.load(Ordering::SeqCst), 1);
        assert!(one.as_mut().poll(&mut context).is_ready());
        assert!(
            Box::pin(log.closed())
                .as_mut()
                .poll(&mut context)
                .is_ready()
        );
    }

    /// On several threads: appends and reads meet at any moment, and some readers give
    /// a read up in its middle.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_event_and_no_wake_is_lost_between_threads() {
        const EVENTS: u64 = 2000;
        for _ in 0..20 {
            let log = EventLog::new();
            let readers: Vec<_> = (0..6_u64)
                .map(|nth| {
                    let (mut cursor, log) = (log.cursor(0), Arc::clone(&log));
                    tokio::spawn(async move {
                        let mut seen = 0;
                        loop {
                            let count = |id, _: EventRef<'_>| {
                                seen += 1;
                                assert_eq!(id, seen);
                            };
                            if nth % 2 == 0 {
                                if !cursor.each(count).await {
                                    break;
                                }
                                continue;
                            }
                            tokio::select! {
                                biased;
                                unread = cursor.each(count) => if !unread { break },
                                () = tokio::task::yield_now() => {}
                            }
                        }
                        log.closed().await;
                        seen
                    })
                })
                .collect();
            let ended = tokio::spawn({
                let log = Arc::clone(&log);
                async move { log.closed().await }
            });
            let writer = Arc::clone(&log);
            tokio::task::spawn_blocking(move || {
                for i in 0..EVENTS {
                    writer.append(token(i)).unwrap();
                    if i % 64 == 0 {
                        std::thread::yield_now();
                    }
                }
                writer.append(over()).unwrap();
            });
            let all = async {
                for reader in readers {
                    assert_eq!(reader.await.unwrap(), EVENTS + 1);
                }
                ended.await.unwrap();
            };
            tokio::time::timeout(std::time::Duration::from_secs(30), all)
                .await
                .expect("everybody comes to the end");
        }
    }
}
