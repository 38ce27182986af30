//! Medians, percentiles and spreads, and who takes which turn. Pure.

use serde::Serialize;

/// What many measurements of one thing come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Summary {
    pub count: usize,
    pub min: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
}

impl Summary {
    /// All zero for no measurements.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_unstable_by(f64::total_cmp);
        let (Some(min), Some(max)) = (values.first(), values.last()) else {
            return Self::default();
        };
        Self {
            count: values.len(),
            min: *min,
            median: quantile(&values, 0.5),
            p99: quantile(&values, 0.99),
            max: *max,
        }
    }

    /// `None` for no measurements.
    pub fn some(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let summary = Self::of(values);
        (summary.count > 0).then_some(summary)
    }
}

/// Of sorted values, at least one; between two of them by their distance.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let place = share * (sorted.len() - 1) as f64;
    let (low, high) = (
        sorted[place.floor() as usize],
        sorted[place.ceil() as usize],
    );
    low + (high - low) * place.fract()
}

/// The order in which `sides` take their turns in a round: each round begins
/// with another one, so that none is always measured right after the same.
pub fn turns(sides: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..sides).map(move |turn| (turn + round) % sides)
}

/// Each round's own figure to the base's of the same round.
pub fn ratios(own: &[f64], base: &[f64]) -> Option<Summary> {
    Summary::some(own.iter().zip(base).map(|(own, base)| own / base))
}

/// What is added in each round, measurement by measurement, in order of their
/// size: which of several streams is first served is chance.
pub fn added(own: &[Vec<f64>], base: &[Vec<f64>]) -> Option<Summary> {
    let sorted = |values: &Vec<f64>| {
        let mut values = values.clone();
        values.sort_unstable_by(f64::total_cmp);
        values
    };
    Summary::some(own.iter().zip(base).flat_map(|(own, base)| {
        let pairs = sorted(own).into_iter().zip(sorted(base));
        pairs.map(|(own, base)| own - base).collect::<Vec<_>>()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(seen: f64, right: f64) -> bool {
        (seen - right).abs() < 1e-9
    }

    #[test]
    fn a_median_lies_in_the_middle() {
        let summary = Summary::of([3.0, 1.0, 2.0, 10.0]);
        let seen = [summary.min, summary.median, summary.max];
        assert!(
            seen.iter()
                .zip([1.0, 2.5, 10.0])
                .all(|(seen, right)| near(*seen, right))
        );
        assert!(summary.p99 > 9.0 && summary.p99 < 10.0);
        assert!(near(Summary::of([7.0]).p99, 7.0));
        assert_eq!(Summary::of([]), Summary::default());
        assert_eq!(Summary::some([]), None);
    }

    #[test]
    fn everyone_has_every_turn() {
        let rounds: Vec<Vec<usize>> = (0..3).map(|round| turns(3, round).collect()).collect();
        assert_eq!(rounds, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
        assert_eq!(turns(0, 1).count(), 0);
    }

    #[test]
    fn what_is_compared_is_of_one_round() {
        // The machine was half as fast in the second round: the ratio is not moved.
        let seen = ratios(&[10.0, 5.0], &[20.0, 10.0]).unwrap();
        assert!(near(seen.min, 0.5) && near(seen.max, 0.5));
        assert_eq!(ratios(&[], &[1.0]), None);
        let seen = added(&[vec![12.0, 2.0], vec![5.0]], &[vec![1.0, 10.0], vec![4.0]]).unwrap();
        assert_eq!(seen.count, 3);
        assert!(near(seen.median, 1.0) && near(seen.max, 2.0));
    }
}
