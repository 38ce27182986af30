//! Who is to be woken. Kept under the lock of what they wait for, so that nobody
//! can miss a change: whoever finds nothing sits down before the lock is let go.
//!
//! Wakers are handed out, and those that are replaced are handed back: waking and
//! dropping one runs code of somebody else, which must not happen under the lock.

use std::task::Waker;

/// The place of one who waits. It is taken with the first wait and kept until it is
/// given up, and so costs nothing from then on.
#[derive(Debug, Default)]
pub(super) struct Seat(Option<usize>);

/// Everyone who waits for the same.
#[derive(Debug, Default)]
pub(super) struct Waiters {
    places: Vec<Place>,
    /// The first free place, if that is not the end of the list.
    free: usize,
    taken: usize,
    waiting: usize,
}

#[derive(Debug)]
enum Place {
    /// And the next free one.
    Free(usize),
    /// Somebody's, who does not wait now.
    Taken,
    Waiting(Waker),
}

impl Waiters {
    /// Sits down, to be woken once. What is handed back is to be dropped after the
    /// lock.
    #[must_use = "it is to be dropped after the lock"]
    pub(super) fn wait(&mut self, seat: &mut Seat, waker: &Waker) -> Option<Waker> {
        let place = match seat.0 {
            Some(place) => place,
            None => *seat.0.insert(self.take_place()),
        };
        if matches!(&self.places[place], Place::Waiting(old) if old.will_wake(waker)) {
            return None;
        }
        let before = std::mem::replace(&mut self.places[place], Place::Waiting(waker.clone()));
        match before {
            Place::Waiting(old) => Some(old),
            Place::Taken | Place::Free(_) => {
                self.waiting += 1;
                None
            }
        }
    }

    fn take_place(&mut self) -> usize {
        let place = self.free;
        self.taken += 1;
        if let Some(Place::Free(next)) = self.places.get(place) {
            self.free = *next;
            self.places[place] = Place::Taken;
        } else {
            if place == 0 {
                // Most logs have one reader.
                self.places.reserve_exact(1);
            }
            self.places.push(Place::Taken);
            self.free = self.places.len();
        }
        place
    }

    /// Gives a seat up.
    #[must_use = "it is to be dropped after the lock"]
    pub(super) fn leave(&mut self, seat: &mut Seat) -> Option<Waker> {
        let place = seat.0.take()?;
        let before = std::mem::replace(&mut self.places[place], Place::Free(self.free));
        self.free = place;
        self.taken -= 1;
        let waker = match before {
            Place::Waiting(waker) => {
                self.waiting -= 1;
                Some(waker)
            }
            Place::Taken | Place::Free(_) => None,
        };
        if self.taken == 0 {
            *self = Self::default();
        }
        waker
    }

    /// The next one to wake, from a place on that begins at 0.
    pub(super) fn next(&mut self, place: &mut usize) -> Option<Waker> {
        while self.waiting > 0 && *place < self.places.len() {
            let here = *place;
            *place += 1;
            if matches!(self.places[here], Place::Waiting(_))
                && let Place::Waiting(waker) =
                    std::mem::replace(&mut self.places[here], Place::Taken)
            {
                self.waiting -= 1;
                return Some(waker);
            }
        }
        None
    }

    pub(super) fn is_anyone_waiting(&self) -> bool {
        self.waiting > 0
    }
}

impl Seat {
    pub(super) fn is_taken(&self) -> bool {
        self.0.is_some()
    }
}
