//! A stretch of a log: its texts in one buffer, and where each event ends in it.
//!
//! An event that is a piece of a stream costs its text and sixteen bytes, and no
//! allocation of its own. All others are rare, and are kept beside.

use super::events::{Chunk, ChunkRef, EventRef, TaskEvent, Token, TokenRef};

/// What a segment's texts come to at the most, in bytes. Growing copies no more
/// than this, however long the log is.
const TEXT: usize = 16 * 1024;

/// How many events a segment has at the most.
const EVENTS: usize = 512;

/// Texts longer than this are kept beside, so that little is left empty at the end
/// of a segment.
const LARGE: usize = TEXT / 4;

/// The least room for texts that is asked for.
const FIRST_ROOM: usize = 64;

#[derive(Debug, Default)]
pub(super) struct Segment {
    /// How many events the log has before this segment.
    pub(super) first: usize,
    /// Of a chunk: its name, its data, its text.
    text: String,
    index: Vec<Entry>,
    rare: Vec<TaskEvent>,
}

/// One event. It begins where the one before it ends.
#[derive(Debug, Clone, Copy)]
struct Entry {
    end: u32,
    /// Bytes of a chunk's text, which stands last.
    text: u16,
    /// Bytes of a chunk's name, which stands first.
    name: u8,
    kind: Kind,
    /// Of a piece, its `i`; of a rare event, its place among them.
    number: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Token,
    Chunk,
    NamedChunk,
    Rare,
}

impl Segment {
    /// The one that follows: as much room as this one has needed.
    pub(super) fn following(&self) -> Self {
        Self {
            first: self.first + self.index.len(),
            text: String::with_capacity(self.text.len()),
            index: Vec::with_capacity(self.index.len()),
            rare: Vec::new(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Whether an event goes in without growing beyond the bounds.
    pub(super) fn has_room_for(&self, event: &TaskEvent) -> bool {
        let text = match event {
            TaskEvent::Token(token) if is_small_token(token) => token.t.len(),
            TaskEvent::Chunk(chunk) if is_small_chunk(chunk) => length(chunk),
            _ => 0,
        };
        self.index.len() < EVENTS && self.text.len() + text <= TEXT
    }

    /// Copies an event's text, so that nothing of the buffer that it was read
    /// into is held. To be asked for [room](Self::has_room_for) first.
    pub(super) fn push(&mut self, event: TaskEvent) {
        match event {
            TaskEvent::Token(token) if is_small_token(&token) => {
                self.make_room(token.t.len());
                self.text.push_str(&token.t);
                self.enter(Kind::Token, 0, 0, token.i);
            }
            TaskEvent::Chunk(chunk) if is_small_chunk(&chunk) => {
                let Chunk { name, data, token } = &chunk;
                self.make_room(length(&chunk));
                let kind = if let Some(name) = name {
                    self.text.push_str(name);
                    Kind::NamedChunk
                } else {
                    Kind::Chunk
                };
                self.text.push_str(data);
                self.text.push_str(&token.t);
                let name = name.as_ref().map_or(0, |name| name.len());
                self.enter(kind, name as u8, token.t.len() as u16, token.i);
            }
            TaskEvent::Token(_) | TaskEvent::Chunk(_) => self.push_rare(event.view().to_event()),
            _ => self.push_rare(event),
        }
    }

    fn push_rare(&mut self, event: TaskEvent) {
        let place = self.rare.len() as u64;
        if place == 0 {
            // Most logs have two, and the second comes with the end.
            self.rare.reserve_exact(1);
        }
        self.rare.push(event);
        self.enter(Kind::Rare, 0, 0, place);
    }

    fn enter(&mut self, kind: Kind, name: u8, text: u16, number: u64) {
        // Within `TEXT`, which fits.
        let end = self.text.len() as u32;
        self.index.push(Entry {
            end,
            text,
            name,
            kind,
            number,
        });
    }

    /// Doubles as a string does by itself, and no further than the bound.
    fn make_room(&mut self, more: usize) {
        let needed = self.text.len() + more;
        if needed > self.text.capacity() {
            let doubled = (self.text.capacity() * 2).clamp(FIRST_ROOM, TEXT);
            self.text
                .reserve_exact(doubled.max(needed) - self.text.len());
        }
    }

    /// Its events from a place within it on.
    pub(super) fn events_from(&self, place: usize) -> impl Iterator<Item = EventRef<'_>> {
        let mut begin = match place {
            0 => 0,
            place => self.index[place - 1].end as usize,
        };
        self.index[place..].iter().map(move |entry| {
            let event = self.event(begin, entry);
            begin = entry.end as usize;
            event
        })
    }

    fn event(&self, begin: usize, entry: &Entry) -> EventRef<'_> {
        let end = entry.end as usize;
        if entry.kind == Kind::Rare {
            return self.rare[entry.number as usize].view();
        }
        let data = begin + usize::from(entry.name);
        let text = end - usize::from(entry.text);
        let i = entry.number;
        if entry.kind == Kind::Token {
            let t = &self.text[begin..end];
            return EventRef::Token(TokenRef { t, i });
        }
        EventRef::Chunk(ChunkRef {
            name: (entry.kind == Kind::NamedChunk).then(|| &self.text[begin..data]),
            data: &self.text[data..text],
            token: TokenRef {
                t: &self.text[text..end],
                i,
            },
        })
    }

    /// Gives back what it does not use.
    pub(super) fn shrink(&mut self) {
        self.text.shrink_to_fit();
        self.index.shrink_to_fit();
        self.rare.shrink_to_fit();
    }

    /// Memory it takes up, in bytes, about. Parameters and messages are small
    /// beside the answer and are counted at a flat rate.
    pub(super) fn bytes(&self) -> usize {
        const TERMINAL: usize = 4096;
        let beside = self.rare.iter().map(|event| match event {
            TaskEvent::Token(token) => token.t.len(),
            TaskEvent::Chunk(chunk) => length(chunk),
            TaskEvent::Answer(answer) => {
                size_of_val(&**answer) + answer.body.len() + answer.token.t.len()
            }
            TaskEvent::Started(_) | TaskEvent::Metrics(_) => 0,
            TaskEvent::End(_) | TaskEvent::Error(_) => TERMINAL,
        });
        self.text.capacity()
            + self.index.capacity() * size_of::<Entry>()
            + self.rare.capacity() * size_of::<TaskEvent>()
            + beside.sum::<usize>()
    }
}

fn is_small_token(token: &Token) -> bool {
    token.t.len() <= LARGE
}

fn is_small_chunk(chunk: &Chunk) -> bool {
    let name = chunk.name.as_ref().map_or(0, |name| name.len());
    u8::try_from(name).is_ok() && length(chunk) <= LARGE
}

fn length(chunk: &Chunk) -> usize {
    let name = chunk.name.as_ref().map_or(0, |name| name.len());
    name + chunk.data.len() + chunk.token.t.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_event_costs_beside_its_text_is_little() {
        assert_eq!(size_of::<Entry>(), 16);
        assert!(size_of::<TaskEvent>() <= 112, "{}", size_of::<TaskEvent>());
    }

    #[test]
    fn a_segment_is_bounded_and_the_next_begins_as_large() {
        let mut segment = Segment::default();
        let token = |length: usize| {
            let t = "x".repeat(length).into();
            TaskEvent::Token(Token { t, i: 0 })
        };
        while segment.has_room_for(&token(5)) {
            segment.push(token(5));
        }
        assert_eq!((segment.len(), segment.text.len()), (EVENTS, EVENTS * 5));
        assert!(segment.text.capacity() < EVENTS * 10);
        let mut long = segment.following();
        assert_eq!(long.first, EVENTS);
        assert_eq!(long.text.capacity(), EVENTS * 5);
        while long.has_room_for(&token(1000)) {
            long.push(token(1000));
        }
        assert_eq!(long.len(), 16);
        assert!(long.text.capacity() <= TEXT);
        // What is large takes no room of it.
        assert!(long.has_room_for(&token(LARGE + 1)));
        assert!(!long.has_room_for(&token(LARGE)));
    }
}
