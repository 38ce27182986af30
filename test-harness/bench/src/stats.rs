//! Medians, percentiles and spreads. Pure.

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_lies_in_the_middle() {
        let summary = Summary::of([3.0, 1.0, 2.0, 10.0]);
        let seen = [summary.min, summary.median, summary.max];
        assert!(
            seen.iter()
                .zip([1.0, 2.5, 10.0])
                .all(|(seen, right)| (seen - right).abs() < 1e-9)
        );
        assert!(summary.p99 > 9.0 && summary.p99 < 10.0);
        assert!((Summary::of([7.0]).p99 - 7.0).abs() < 1e-9);
        assert_eq!(Summary::of([]), Summary::default());
    }
}
