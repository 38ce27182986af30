//! The operating points of the relay, and how long each part is measured.

use serde::Serialize;

/// How thorough a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// For figures that are published.
    Full,
    /// For a look.
    Quick,
    /// For a test of the benchmark itself, in a debug build.
    Smoke,
}

impl Size {
    /// One of three, by the size.
    pub fn pick<T>(self, full: T, quick: T, smoke: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
            Self::Smoke => smoke,
        }
    }
}

/// How many streams, how fast each, and how many tokens of each.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Point {
    pub name: &'static str,
    pub streams: u32,
    /// For each stream; 0 is flat out.
    pub tokens_per_second: u32,
    pub tokens: u32,
}

impl Point {
    const fn new(name: &'static str, streams: u32, tokens_per_second: u32, tokens: u32) -> Self {
        Self {
            name,
            streams,
            tokens_per_second,
            tokens,
        }
    }

    pub fn flat_out(&self) -> bool {
        self.tokens_per_second == 0
    }

    /// Of all streams together.
    pub fn all_tokens(&self) -> u64 {
        u64::from(self.streams) * u64::from(self.tokens)
    }
}

/// At a rate: 2 seconds. Flat out: a second at 150,000 tokens/s, so that the
/// setting up of streams is a small part. A thousand streams are for what is lost.
const POINTS: [Point; 6] = [
    Point::new("100/s × 128", 128, 100, 200),
    Point::new("1,000/s × 16", 16, 1000, 2000),
    Point::new("flat out × 1", 1, 0, 100_000),
    Point::new("flat out × 16", 16, 0, 10_000),
    Point::new("flat out × 128", 128, 0, 1250),
    Point::new("flat out × 1,000", 1000, 0, 160),
];

/// The least that a rate needs for a window after its warm-up, in seconds.
const SHORTEST_RATE_SECONDS: u32 = 1;

/// All points, shorter where less is asked for.
pub fn points(size: Size) -> Vec<Point> {
    let part = size.pick(1, 5, 50);
    let shorter = |point: Point| {
        let tokens = (point.tokens / part).max(point.tokens_per_second * SHORTEST_RATE_SECONDS);
        Point {
            tokens: tokens.max(10),
            ..point
        }
    };
    POINTS.into_iter().map(shorter).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorter_points_stay_whole() {
        for size in [Size::Full, Size::Quick, Size::Smoke] {
            let points = points(size);
            assert_eq!(points.len(), 6);
            for point in points {
                assert!(point.tokens >= 10 && point.tokens >= point.tokens_per_second);
                assert_eq!(point.flat_out(), point.name.starts_with("flat out"));
            }
        }
        let tokens = |size| points(size).iter().map(Point::all_tokens).sum::<u64>();
        assert!(tokens(Size::Quick) < tokens(Size::Full) / 3);
        assert!(tokens(Size::Smoke) < tokens(Size::Quick));
    }
}
