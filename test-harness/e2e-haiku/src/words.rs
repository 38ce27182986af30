//! A minute's number in English words, and back.

use std::time::SystemTime;

const SMALL: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];

/// Twenty to ninety. A minute goes to fifty-nine, but a text may hold more,
/// and sixty-one must not be taken for a one.
const TENS: [&str; 8] = [
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
];

/// The minute of an hour: 0 to 59.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Minute(u8);

impl Minute {
    /// `None` from 60 on.
    pub fn new(number: u8) -> Option<Self> {
        (number < 60).then_some(Self(number))
    }

    /// The minute that the clock shows.
    pub fn now() -> Self {
        let since = SystemTime::UNIX_EPOCH.elapsed();
        let seconds = since.expect("the clock is after 1970").as_secs();
        Self((seconds / 60 % 60) as u8)
    }

    /// All sixty, in order.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..60).map(Self)
    }

    pub fn number(self) -> u8 {
        self.0
    }

    /// For example `zero`, `eleven`, `forty`, `forty-two`.
    pub fn words(self) -> String {
        let number = usize::from(self.0);
        match (number / 10, number % 10) {
            (0 | 1, _) => SMALL[number].to_owned(),
            (tens, 0) => TENS[tens - 2].to_owned(),
            (tens, ones) => format!("{}-{}", TENS[tens - 2], SMALL[ones]),
        }
    }

    /// The minute that a text names, if the text is nothing but its words.
    pub fn from_words(text: &str) -> Option<Self> {
        let text = text.trim();
        let [number] = numbers(text)[..] else {
            return None;
        };
        let minute = Self::new(number)?;
        let plain = |text: &str| {
            text.to_lowercase()
                .replace(is_hyphen, "-")
                .replace(' ', "-")
        };
        (plain(text) == minute.words()).then_some(minute)
    }

    /// How often a text names this minute in whole words. Forty-two is no
    /// forty, and no two either.
    pub fn occurrences(self, text: &str) -> usize {
        numbers(text)
            .into_iter()
            .filter(|number| *number == self.0)
            .count()
    }
}

fn is_hyphen(character: char) -> bool {
    // Hyphen-minus, hyphen, non-breaking hyphen.
    matches!(character, '-' | '\u{2010}' | '\u{2011}')
}

/// The numbers from 0 to 99 that a text names in words, in order. Tens and
/// ones with one hyphen or one space between them are one number.
fn numbers(text: &str) -> Vec<u8> {
    let text = text.to_lowercase();
    let words = words(&text);
    let mut found = Vec::new();
    let mut index = 0;
    while let Some((start, word)) = words.get(index) {
        index += 1;
        if let Some(number) = position(&SMALL, word) {
            found.push(number);
            continue;
        }
        let Some(tens) = position(&TENS, word) else {
            continue;
        };
        let tens = (tens + 2) * 10;
        let ones = words.get(index).and_then(|(next, word)| {
            let between = &text[start + words[index - 1].1.len()..*next];
            let joined = between == " " || {
                let mut characters = between.chars();
                characters.next().is_some_and(is_hyphen) && characters.next().is_none()
            };
            position(&SMALL[..10], word).filter(|ones| joined && *ones > 0)
        });
        if let Some(ones) = ones {
            index += 1;
            found.push(tens + ones);
        } else {
            found.push(tens);
        }
    }
    found
}

/// Runs of letters and digits, each with the byte at which it starts.
fn words(text: &str) -> Vec<(usize, &str)> {
    let mut found = Vec::new();
    let mut start = None;
    for (at, character) in text.char_indices().chain([(text.len(), ' ')]) {
        match (character.is_alphanumeric(), start) {
            (true, None) => start = Some(at),
            (false, Some(from)) => {
                found.push((from, &text[from..at]));
                start = None;
            }
            _ => {}
        }
    }
    found
}

fn position(names: &[&str], word: &str) -> Option<u8> {
    // The tables are far shorter than 256.
    names
        .iter()
        .position(|name| *name == word)
        .map(|index| index as u8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn minute(number: u8) -> Minute {
        Minute::new(number).unwrap()
    }

    #[test]
    fn all_sixty_minutes_parse_back() {
        let mut seen = std::collections::BTreeSet::new();
        for minute in Minute::all() {
            let words = minute.words();
            assert_eq!(Minute::from_words(&words), Some(minute), "{words}");
            assert_eq!(
                Minute::from_words(&words.to_uppercase()),
                Some(minute),
                "{words}"
            );
            assert_eq!(
                Minute::from_words(&words.replace('-', " ")),
                Some(minute),
                "{words}"
            );
            seen.insert(words);
        }
        assert_eq!(seen.len(), 60);
        assert_eq!(minute(42).words(), "forty-two");
        assert_eq!(minute(0).words(), "zero");
    }

    #[test]
    fn what_is_no_minute_does_not_parse() {
        for text in [
            "",
            "sixty",
            "sixty-one",
            "forty-",
            "forty-eleven",
            "two forty",
            "stone",
            "fortytwo",
            "42",
        ] {
            assert_eq!(Minute::from_words(text), None, "{text}");
        }
        assert_eq!(Minute::new(60), None);
    }

    #[test]
    fn no_minute_is_found_in_another() {
        for asked in Minute::all() {
            for written in Minute::all() {
                let text = format!("Minute {}—the kettle.", written.words());
                assert_eq!(
                    asked.occurrences(&text),
                    usize::from(asked == written),
                    "{asked:?} in {text}"
                );
            }
        }
    }

    #[test]
    fn only_whole_words_count() {
        for (number, text, times) in [
            (40, "forty-two", 0),
            (2, "forty-two", 0),
            (42, "Forty-Two, forty two; forty\u{2011}two", 3),
            (42, "forty\ntwo", 0),
            (40, "forty, two", 1),
            (2, "forty, two", 1),
            (1, "a stone alone, none", 0),
            (1, "sixty-one", 0),
            (1, "no one, ONE", 2),
            (7, "seventeen seventy", 0),
            (40, "forty–and on", 1),
            (10, "ten10 10ten", 0),
        ] {
            assert_eq!(
                minute(number).occurrences(text),
                times,
                "{number} in {text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_can_be_searched(text: String, number in 0u8..60) {
            let _ = minute(number).occurrences(&text);
            let _ = Minute::from_words(&text);
        }

        #[test]
        fn each_of_two_is_found_once(first in 0u8..60, second in 0u8..60) {
            prop_assume!(first != second);
            let text = format!("{}. {}!", minute(first).words(), minute(second).words());
            prop_assert_eq!(minute(first).occurrences(&text), 1);
            prop_assert_eq!(minute(second).occurrences(&text), 1);
        }
    }
}
