//! What a log holds: segments of bounded size, and counts of what is in them.
//! Pure: no lock, and nobody waits here.

use super::events::{EventRef, TaskEvent};
use super::segment::Segment;

/// The most events one read hands out: bounds what a reader who is far behind
/// makes us render at once.
pub(super) const BATCH: usize = 256;

/// One event more at the most; it is what a reader who takes nothing makes us
/// keep.
pub(super) const BATCH_BYTES: usize = 16 * 1024;

#[derive(Debug, Default)]
pub(super) struct Store {
    /// Segments that take no more.
    full: Vec<Segment>,
    tail: Segment,
    pieces: u64,
    /// Bytes of all pieces of text.
    text: usize,
    /// Memory that the full segments take up, in bytes.
    full_bytes: usize,
    closed: bool,
}

impl Store {
    /// Adds an event, unless the log is closed; says whether it did. A terminal
    /// one closes it.
    pub(super) fn push(&mut self, event: TaskEvent) -> bool {
        if self.closed {
            return false;
        }
        if let Some(token) = event.token() {
            self.pieces += 1;
            self.text += token.t.len();
        }
        let terminal = event.is_terminal();
        if !self.tail.has_room_for(&event) {
            let following = self.tail.following();
            let mut full = std::mem::replace(&mut self.tail, following);
            full.shrink();
            self.full_bytes += full.bytes();
            self.full.push(full);
        }
        self.tail.push(event);
        if terminal {
            self.closed = true;
            self.tail.shrink();
            self.full.shrink_to_fit();
        }
        true
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed
    }

    /// The number of its events.
    pub(super) fn len(&self) -> usize {
        self.tail.first + self.tail.len()
    }

    pub(super) fn pieces(&self) -> u64 {
        self.pieces
    }

    pub(super) fn bytes(&self) -> usize {
        let list = self.full.capacity() * size_of::<Segment>();
        list + self.full_bytes + self.tail.bytes()
    }

    /// The answer so far.
    pub(super) fn text(&self) -> String {
        let mut text = String::with_capacity(self.text);
        for segment in self.full.iter().chain([&self.tail]) {
            let tokens = segment.events_from(0).filter_map(EventRef::token);
            tokens.for_each(|token| text.push_str(token.t));
        }
        text
    }

    pub(super) fn last(&self) -> Option<EventRef<'_>> {
        let last = self.len().checked_sub(1)?;
        let segment = self.segment_of(last);
        segment.events_from(last - segment.first).next()
    }

    /// Shows a batch of the events after the first `from`, with their ids, and says
    /// how many events were shown by then. The batch is bounded, and empty only if
    /// there are no more.
    pub(super) fn each(&self, from: usize, mut show: impl FnMut(u64, EventRef<'_>)) -> usize {
        let until = self.len().min(from.saturating_add(BATCH));
        let (mut next, mut bytes) = (from, 0);
        while next < until && bytes < BATCH_BYTES {
            let segment = self.segment_of(next);
            for event in segment.events_from(next - segment.first) {
                if next == until || bytes >= BATCH_BYTES {
                    break;
                }
                next += 1;
                bytes += event.weight();
                show(next as u64, event);
            }
        }
        next
    }

    /// Where an event is that there is.
    fn segment_of(&self, place: usize) -> &Segment {
        if place >= self.tail.first {
            // Where readers are that keep up.
            return &self.tail;
        }
        let after = self.full.partition_point(|segment| segment.first <= place);
        // The first begins at 0.
        &self.full[after - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::{Answer, Chunk, Failure, Metrics, Token};
    use super::*;
    use bytes::Bytes;
    use llama_orch_types::ErrorCode;
    use proptest::prelude::*;

    fn texts() -> impl Strategy<Value = String> {
        prop_oneof![
            20 => ".{0,6}",
            2 => "[aü]{200,400}",
            1 => (3000_usize..20_000).prop_map(|length| "é".repeat(length)),
        ]
    }

    fn events() -> impl Strategy<Value = TaskEvent> {
        let token = || (texts(), any::<u64>()).prop_map(|(t, i)| Token { t: t.into(), i });
        let name = proptest::option::of(prop_oneof![Just(String::new()), ".{1,9}", "x{250,260}"]);
        let chunk = (name, texts(), token()).prop_map(|(name, data, token)| {
            TaskEvent::Chunk(Chunk {
                name: name.map(Into::into),
                data: data.into(),
                token,
            })
        });
        let answer = (texts(), token()).prop_map(|(body, token)| {
            let body = Bytes::from(body);
            TaskEvent::Answer(Box::new(Answer { body, token }))
        });
        let metrics = any::<u64>().prop_map(|elapsed_ms| {
            TaskEvent::Metrics(Metrics {
                tokens_in: 1,
                tokens_out: 2,
                elapsed_ms,
            })
        });
        prop_oneof![
            8 => token().prop_map(TaskEvent::Token),
            8 => chunk,
            1 => answer,
            1 => metrics,
        ]
    }

    fn over() -> TaskEvent {
        TaskEvent::Error(Box::new(Failure::new(ErrorCode::Internal, "over")))
    }

    fn shown_from(store: &Store, mut from: usize) -> Vec<(u64, TaskEvent)> {
        let mut shown = Vec::new();
        while from < store.len() {
            let (mut count, mut bytes) = (0, 0);
            let end = store.each(from, |id, event| {
                assert!(count < BATCH && bytes < BATCH_BYTES, "a batch is bounded");
                (count, bytes) = (count + 1, bytes + event.weight());
                shown.push((id, event.to_event()));
            });
            assert_eq!(end, from + count);
            assert!(count > 0, "a batch is never empty");
            from = end;
        }
        shown
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever is put in comes out, from wherever it is read, and the counts are
        /// those of a plain list.
        #[test]
        fn a_store_is_a_list(
            events in proptest::collection::vec(events(), 0..40),
            times in 1_usize..40,
            cut in 0_usize..2000,
        ) {
            let (mut store, mut list) = (Store::default(), Vec::new());
            for event in events.iter().cycle().take(events.len() * times) {
                assert!(store.push(event.clone()));
                list.push(event.clone());
            }
            prop_assert_eq!(store.last().map(EventRef::to_event), list.last().cloned());
            let before = store.bytes();
            prop_assert!(store.push(over()) && store.is_closed());
            prop_assert!(!store.push(over()));
            list.push(over());
            let all: Vec<_> = (1..).zip(list.iter().cloned()).collect();
            let shown = shown_from(&store, cut);
            prop_assert_eq!(&all[cut.min(all.len())..], &shown[..]);
            let tokens: Vec<_> = list.iter().filter_map(TaskEvent::token).collect();
            prop_assert_eq!(store.pieces(), tokens.len() as u64);
            prop_assert_eq!(store.text(), tokens.iter().map(|token| token.t).collect::<String>());
            let text: usize = tokens.iter().map(|token| token.t.len()).sum();
            prop_assert!(store.bytes() >= text);
            prop_assert!(store.bytes() <= before + 8 * 1024, "closing gives back");
        }
    }

    #[test]
    fn a_long_log_of_tokens_is_dense() {
        let mut store = Store::default();
        let count = 100_000_u64;
        for i in 0..count {
            let t = " word".into();
            store.push(TaskEvent::Token(Token { t, i }));
        }
        let per_token = store.bytes() as f64 / count as f64;
        assert!(per_token < 24.0, "{per_token}");
        assert!(store.full.iter().all(|segment| segment.bytes() < 12_000));
    }
}
