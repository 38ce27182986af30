//! Bytes as people write them; and how fast a download may be: a rate, and the
//! bucket that keeps to it.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Slower than this no model ever arrives.
const SLOWEST: u64 = 1024;

/// Units of bytes, longest first so that `MiB` is not read as `B`.
const UNITS: [(&str, u64); 8] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("kB", 1_000),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("B", 1),
];

/// A number of bytes. Written as a number or with a unit: `12GiB`, `800 MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// A text or number is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no size: write bytes, such as 12GiB")]
pub struct BadSize {
    text: String,
}

/// A number, and a unit if there is one, in bytes; less than 10^18.
fn bytes_in(text: &str) -> Option<u64> {
    let (number, unit) = UNITS
        .iter()
        .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)))
        .unwrap_or((text, 1));
    let number: f64 = number.trim().parse().ok()?;
    let bytes = number * unit as f64;
    // What is no number is refused with what is too large.
    (0.0..1e18).contains(&bytes).then_some(bytes as u64)
}

impl FromStr for ByteSize {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        bytes_in(text.trim()).map(Self).ok_or_else(|| BadSize {
            text: text.chars().take(40).collect(),
        })
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: u64 = 1 << 20;
        if self.0 >= MIB {
            write!(f, "{} MiB", self.0 / MIB)
        } else {
            write!(f, "{} B", self.0)
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes, such as 12GiB")
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(number))
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<ByteSize, E> {
                number.to_string().parse().map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Bytes per second, at least 1 KiB. Written as a number of bytes or with a
/// unit: `10MiB`, `800 kB`, `1.5 MB/s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRate(u64);

/// A text or number is no rate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no rate of at least 1 KiB per second: write bytes per second, such as 10MiB")]
pub struct BadRate {
    text: String,
}

impl ByteRate {
    pub fn new(bytes_per_second: u64) -> Result<Self, BadRate> {
        if bytes_per_second < SLOWEST {
            return Err(BadRate {
                text: bytes_per_second.to_string(),
            });
        }
        Ok(Self(bytes_per_second))
    }

    pub fn bytes_per_second(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteRate {
    type Err = BadRate;

    fn from_str(text: &str) -> Result<Self, BadRate> {
        let bad = || BadRate {
            text: text.chars().take(40).collect(),
        };
        let plain = text.trim();
        let plain = plain.strip_suffix("/s").unwrap_or(plain).trim_end();
        let bytes = bytes_in(plain).ok_or_else(bad)?;
        Self::new(bytes).map_err(|_| bad())
    }
}

impl fmt::Display for ByteRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} B/s", self.0)
    }
}

impl Serialize for ByteRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = ByteRate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("bytes per second, such as 10MiB")
            }

            fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<ByteRate, E> {
                ByteRate::new(number).map_err(E::custom)
            }

            fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<ByteRate, E> {
                ByteRate::new(u64::try_from(number).unwrap_or(0)).map_err(E::custom)
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<ByteRate, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl schemars::JsonSchema for ByteRate {
    fn schema_name() -> Cow<'static, str> {
        "ByteRate".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "bytes per second, at least 1024: a number, or a text such as 10MiB or 800 kB",
            "anyOf": [
                { "type": "integer", "minimum": SLOWEST },
                { "type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([KMG]iB|[kKMG]B|B)?\s*(/s)?\s*$" },
            ],
        })
    }
}

/// A token bucket that holds what a quarter of a second brings, so that a
/// pause earns no burst. Pure: whoever asks says what time it is.
#[derive(Debug)]
struct Bucket {
    rate: f64,
    /// Bytes that may be taken at once; below zero what was taken ahead.
    level: f64,
    filled_at: Option<Instant>,
}

impl Bucket {
    fn new(rate: ByteRate) -> Self {
        Self {
            rate: rate.0 as f64,
            level: rate.0 as f64 / 4.0,
            filled_at: None,
        }
    }

    /// Takes bytes that have arrived; how long to wait before the next ones.
    fn take(&mut self, bytes: u64, now: Instant) -> Duration {
        if let Some(before) = self.filled_at {
            let passed = now.saturating_duration_since(before).as_secs_f64();
            self.level = (self.level + passed * self.rate).min(self.rate / 4.0);
        }
        self.filled_at = Some(now);
        self.level -= bytes as f64;
        Duration::try_from_secs_f64(-self.level / self.rate).unwrap_or(Duration::ZERO)
    }
}

/// Holds all downloads that share it to one rate together; without a rate it
/// holds up nobody.
#[derive(Debug, Clone, Default)]
pub struct RateLimit(Option<Arc<Mutex<Bucket>>>);

/// What a rate is for, the rate, and the limit that is shared.
type Shared = (&'static str, ByteRate, RateLimit);

/// The limits of this process: each pool has provisioners of its own, and all
/// of them use the same line. As many as there are rates in the configuration.
static SHARED: Mutex<Vec<Shared>> = Mutex::new(Vec::new());

impl RateLimit {
    /// The limit that everybody in this process shares who names the same
    /// purpose and rate.
    pub fn shared(purpose: &'static str, rate: Option<ByteRate>) -> Self {
        let Some(rate) = rate else {
            return Self::default();
        };
        // Poison means that another thread panicked; the list itself is whole.
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        let known = shared
            .iter()
            .find(|(of, at, _)| *of == purpose && *at == rate);
        if let Some((_, _, limit)) = known {
            return limit.clone();
        }
        let limit = Self::new(Some(rate));
        shared.push((purpose, rate, limit.clone()));
        limit
    }

    pub fn new(rate: Option<ByteRate>) -> Self {
        Self(rate.map(|rate| Arc::new(Mutex::new(Bucket::new(rate)))))
    }

    /// Waits until the next bytes may be read, after these have been.
    pub async fn pace(&self, bytes: u64) {
        let Some(bucket) = &self.0 else {
            return;
        };
        let wait = {
            // A panic in here leaves numbers, which is what these are.
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(bytes, Instant::now())
        };
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_and_without_a_unit() {
        let size = |text: &str| text.parse::<ByteSize>();
        assert_eq!(size("12GiB"), Ok(ByteSize(12 << 30)));
        assert_eq!(size(" 1.5 kB"), Ok(ByteSize(1500)));
        assert_eq!(size("7"), Ok(ByteSize(7)));
        for wrong in ["", "-1", "many", "1e30", "NaN"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
    use proptest::prelude::*;

    #[test]
    fn rates_as_people_write_them() {
        let rate = |text: &str| {
            text.parse::<ByteRate>()
                .map(ByteRate::bytes_per_second)
                .ok()
        };
        assert_eq!(rate("10MiB"), Some(10 << 20));
        assert_eq!(rate(" 800 kB/s "), Some(800_000));
        assert_eq!(rate("1.5 MB"), Some(1_500_000));
        assert_eq!(rate("2048"), Some(2048));
        for none in [
            "", "MiB", "-1MiB", "0", "100B", "fast", "nan", "inf", "1e300", "10 mib",
        ] {
            assert_eq!(rate(none), None, "{none}");
        }
        let from = |json: &str| serde_json::from_str::<ByteRate>(json).ok();
        assert_eq!(from("4096"), from("\"4KiB\""));
        assert_eq!(from("-5"), None);
        assert_eq!(from("[]"), None);
        let error = serde_json::from_str::<ByteRate>("\"fast\"").unwrap_err();
        assert!(error.to_string().contains("10MiB"), "{error}");
    }

    proptest! {
        #[test]
        fn the_rate_is_kept_whatever_the_pieces(
            rate in 1024u64..100_000_000,
            pieces in prop::collection::vec((1u64..1_000_000, 0u64..2000), 1..60),
        ) {
            let rate = ByteRate::new(rate).unwrap();
            let mut bucket = Bucket::new(rate);
            let start = Instant::now();
            let mut now = start;
            let mut sum = 0;
            for (bytes, idle) in pieces {
                now += Duration::from_millis(idle);
                sum += bytes;
                now += bucket.take(bytes, now);
                // After each wait, no more has come than the rate allows, and a first quarter second's worth.
                let allowed = (now - start).as_secs_f64() * rate.0 as f64 + rate.0 as f64 / 4.0;
                prop_assert!(sum as f64 <= allowed + 1.0 + sum as f64 * 1e-6, "{sum} > {allowed}");
            }
        }

        #[test]
        fn nobody_slower_than_the_rate_is_held_up(rate in 10_000u64..100_000_000, count in 1usize..50) {
            let rate = ByteRate::new(rate).unwrap();
            let mut bucket = Bucket::new(rate);
            let mut now = Instant::now();
            for _ in 0..count {
                now += Duration::from_millis(100);
                prop_assert_eq!(bucket.take(rate.0 / 20, now), Duration::ZERO);
            }
        }
    }

    #[test]
    fn one_rate_for_one_purpose_is_shared() {
        let rate = |text: &str| Some(text.parse().unwrap());
        let same = |one: &RateLimit, other: &RateLimit| match (&one.0, &other.0) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        };
        let limit = RateLimit::shared("tests", rate("5MiB"));
        assert!(same(&limit, &RateLimit::shared("tests", rate("5 MiB"))));
        assert!(!same(&limit, &RateLimit::shared("tests", rate("6MiB"))));
        assert!(!same(&limit, &RateLimit::shared("others", rate("5MiB"))));
        assert!(RateLimit::shared("tests", None).0.is_none());
    }

    #[tokio::test]
    async fn without_a_rate_nothing_waits() {
        let limit = RateLimit::default();
        tokio::time::timeout(Duration::from_secs(5), limit.pace(u64::MAX))
            .await
            .unwrap();
    }
}
