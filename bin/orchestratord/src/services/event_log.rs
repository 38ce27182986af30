//! One task, one event log, many cursors.
//!
//! The engine's stream is appended once. Every reader is a [`Cursor`] over the
//! log: a slow one never holds the engine, a late one misses nothing. A log is
//! closed by its terminal event, and a closed log takes no more events. That
//! is what makes "no token after cancel" true: whoever cancels closes the log
//! first, and what the engine still sends has nowhere to go.
//!
//! A log owns its texts: they are copied into few buffers ([`store`], [`segment`]),
//! and lent to readers under the one lock that also guards who waits ([`waiters`]).

mod cursor;
mod events;
mod log;
mod segment;
mod store;
mod waiters;

pub use self::cursor::Cursor;
pub use self::events::{
    Answer, Chunk, ChunkRef, End, EngineSays, EventRef, Failure, Metrics, Receipt, Started,
    TaskEvent, Token, TokenRef,
};
pub use self::log::{Closed, Closing, EventLog};

#[cfg(test)]
mod tests {
    use super::store::{BATCH, BATCH_BYTES, Store};
    use super::*;
    use llama_orch_types::ErrorCode;
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
        let mut short = Store::default();
        for i in 0..300 {
            short.push(token(i));
        }
        assert_eq!(short.each(0, |_, _| ()), BATCH);
        assert_eq!(short.each(256, |_, _| ()), 300);
        let mut long = Store::default();
        for i in 0..2 {
            let t = "x".repeat(BATCH_BYTES).into();
            long.push(TaskEvent::Token(Token { t, i }));
        }
        assert_eq!(long.each(0, |_, _| ()), 1);
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
