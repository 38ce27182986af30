//! The figures to reach, and whether they were. Pure.

use std::fmt::Write;

use serde::Serialize;

use crate::report::{Cell, Table};
use crate::stats::Summary;

/// A figure that misses its target by so many times its noise does so by more than
/// chance: rounds are few, and of many figures at several numbers of streams the worst
/// is shown, so that twice would be seen in every run.
const BEYOND_CHANCE: f64 = 3.0;

/// On which side of its target a figure has to lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bound {
    AtLeast,
    AtMost,
}

/// One figure to reach.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    pub name: String,
    pub bound: Bound,
    pub target: f64,
    /// After the figure: "ms", "KiB"; empty for ratios.
    pub unit: &'static str,
    pub decimals: usize,
    /// What was measured, or `None` where a peer was missing.
    pub measured: Option<f64>,
    /// The least and the most of the rounds.
    pub spread: Option<(f64, f64)>,
    /// What is measured where nothing differs.
    pub noise: Option<f64>,
    /// What helps to read it.
    pub note: String,
}

impl Goal {
    pub fn at_least(name: impl Into<String>, target: f64) -> Self {
        Self::new(name.into(), Bound::AtLeast, target)
    }

    pub fn at_most(name: impl Into<String>, target: f64) -> Self {
        Self::new(name.into(), Bound::AtMost, target)
    }

    fn new(name: String, bound: Bound, target: f64) -> Self {
        Self {
            name,
            bound,
            target,
            unit: "",
            decimals: 3,
            measured: None,
            spread: None,
            noise: None,
            note: String::new(),
        }
    }

    #[must_use]
    pub fn in_unit(self, unit: &'static str, decimals: usize) -> Self {
        Self {
            unit,
            decimals,
            ..self
        }
    }

    #[must_use]
    pub fn seen(self, measured: f64) -> Self {
        Self {
            measured: Some(measured),
            ..self
        }
    }

    /// The median of some rounds, with their spread.
    #[must_use]
    pub fn median(self, summary: Option<Summary>) -> Self {
        Self {
            measured: summary.map(|summary| summary.median),
            spread: summary
                .filter(|summary| summary.count > 1)
                .map(|summary| (summary.min, summary.max)),
            ..self
        }
    }

    /// With what the same measurement shows where nothing differs; for a ratio, how far
    /// from 1. A figure is not held to a target that allows less than this, unless it
    /// is off by more than three times of it.
    #[must_use]
    pub fn beside_noise(self, noise: f64) -> Self {
        Self {
            noise: Some(noise),
            ..self
        }
    }

    #[must_use]
    pub fn noted(self, note: impl Into<String>) -> Self {
        Self {
            note: note.into(),
            ..self
        }
    }

    /// `None` where it was not measured, or cannot be told.
    pub fn reached(&self) -> Option<bool> {
        let measured = self.measured?;
        let reached = match self.bound {
            Bound::AtLeast => measured >= self.target,
            Bound::AtMost => measured <= self.target,
        };
        (reached || !self.is_lost_in(measured)).then_some(reached)
    }

    fn is_lost_in(&self, measured: f64) -> bool {
        // Only ratios have a least.
        let (allowed, off) = match self.bound {
            Bound::AtLeast => (1.0 - self.target, 1.0 - measured),
            Bound::AtMost => (self.target, measured),
        };
        self.noise
            .is_some_and(|noise| noise > allowed && off <= BEYOND_CHANCE * noise)
    }

    /// "reached", or how far it is from that.
    pub fn verdict(&self) -> String {
        match (self.reached(), self.measured) {
            (Some(true), _) => "reached".to_owned(),
            (Some(false), Some(measured)) if self.target == 0.0 => {
                let decimals = self.decimals;
                format!("no: {measured:.decimals$} too much")
            }
            (Some(false), Some(measured)) => {
                let of = match self.bound {
                    Bound::AtLeast => "of",
                    Bound::AtMost => "times",
                };
                format!("no: {:.2} {of} the target", measured / self.target)
            }
            (None, Some(_)) => {
                let (noise, decimals) = (self.noise.unwrap_or_default(), self.decimals);
                let shown = format!("{noise:.decimals$} {}", self.unit);
                format!("cannot be told: {} of noise", shown.trim())
            }
            _ => "not measured".to_owned(),
        }
    }

    fn target_shown(&self) -> String {
        let sign = match self.bound {
            Bound::AtLeast => '≥',
            Bound::AtMost => '≤',
        };
        let mut target = format!("{:.1$}", self.target, self.decimals);
        if target.contains('.') {
            target.truncate(target.trim_end_matches('0').trim_end_matches('.').len());
        }
        format!("{sign} {target} {}", self.unit).trim().to_owned()
    }

    fn measured_shown(&self) -> String {
        let Some(measured) = self.measured else {
            return "-".to_owned();
        };
        let decimals = self.decimals;
        let mut shown = format!("{measured:.decimals$} {}", self.unit)
            .trim()
            .to_owned();
        if let Some((min, max)) = self.spread {
            // Writing to a String cannot fail.
            let _ = write!(shown, " ({min:.decimals$}–{max:.decimals$})");
        }
        shown
    }
}

/// Of several operating points the one that is worst to its target: one that misses it
/// before one of which that cannot be told. Those that were not measured count only if
/// there is no other.
pub fn worst(goals: impl IntoIterator<Item = Goal>) -> Option<Goal> {
    let badness = |goal: &Goal| match (goal.bound, goal.measured) {
        (_, None) => f64::NEG_INFINITY,
        (Bound::AtMost, Some(measured)) => measured - goal.target,
        (Bound::AtLeast, Some(measured)) => goal.target - measured,
    };
    goals.into_iter().max_by(|a, b| {
        let missed = |goal: &Goal| goal.reached() == Some(false);
        let by_badness = || badness(a).total_cmp(&badness(b));
        missed(a).cmp(&missed(b)).then_with(by_badness)
    })
}

/// All figures in one table.
pub fn table(goals: &[Goal]) -> Table {
    let row = |goal: &Goal| {
        vec![
            Cell::text(&goal.name),
            Cell::text(goal.target_shown()),
            Cell::shown(goal.measured_shown(), goal.measured),
            Cell::text(goal.verdict()),
            Cell::text(&goal.note),
        ]
    };
    Table {
        name: "summary".to_owned(),
        columns: ["figure", "target", "measured", "", "note"]
            .map(str::to_owned)
            .to_vec(),
        rows: goals.iter().map(row).collect(),
        plotted: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_says_how_far_it_is() {
        let speed = Goal::at_least("speed", 1.0);
        assert_eq!(speed.verdict(), "not measured");
        assert_eq!(speed.clone().seen(1.0).verdict(), "reached");
        assert_eq!(speed.seen(0.5).verdict(), "no: 0.50 of the target");
        let cost = Goal::at_most("cost", 4.0).in_unit("KiB", 2);
        assert_eq!(cost.clone().seen(4.0).verdict(), "reached");
        assert_eq!(
            cost.clone().seen(5.0).verdict(),
            "no: 1.25 times the target"
        );
        assert_eq!(cost.target_shown(), "≤ 4 KiB");
        assert_eq!(Goal::at_least("x", 0.99).target_shown(), "≥ 0.99");
        assert_eq!(
            Goal::at_most("x", 20.0).in_unit("MiB", 0).target_shown(),
            "≤ 20 MiB"
        );
        let lost = Goal::at_most("lost", 0.0).in_unit("", 0).seen(3.0);
        assert_eq!(lost.verdict(), "no: 3 too much");
        let noisy = |seen| cost.clone().seen(seen).beside_noise(6.0);
        assert_eq!(noisy(3.0).verdict(), "reached");
        assert_eq!(noisy(9.0).reached(), None);
        assert_eq!(noisy(9.0).verdict(), "cannot be told: 6.00 KiB of noise");
        assert_eq!(noisy(17.0).reached(), None);
        assert_eq!(noisy(19.0).verdict(), "no: 4.75 times the target");
        let quiet = cost.seen(5.0).beside_noise(3.9);
        assert_eq!(quiet.verdict(), "no: 1.25 times the target");
        let ratio = |seen| Goal::at_least("x", 0.99).seen(seen).beside_noise(0.03);
        assert_eq!(ratio(0.95).verdict(), "cannot be told: 0.030 of noise");
        assert_eq!(ratio(0.90).reached(), Some(false));
        let nothing = Goal::at_least("x", 1.0).seen(f64::NAN);
        assert_eq!(nothing.reached(), Some(false), "no figure reaches nothing");
    }

    #[test]
    fn the_worst_point_is_told() {
        let at = |name: &str, seen| Goal::at_least(name, 0.99).seen(seen);
        let goals = [at("1", 1.0), at("2", 0.9), Goal::at_least("4", 0.99)];
        assert_eq!(worst(goals).unwrap().name, "2");
        let most = |name: &str, seen| Goal::at_most(name, 1.0).seen(seen);
        assert_eq!(worst([most("1", -2.0), most("2", 0.1)]).unwrap().name, "2");
        let unsure = most("3", 5.0).beside_noise(4.0);
        let seen = worst([unsure.clone(), most("4", 1.5), most("5", 0.5)]);
        assert_eq!(seen.unwrap().name, "4");
        assert_eq!(worst([unsure, most("5", 0.5)]).unwrap().name, "3");
        assert!(worst([]).is_none());
    }

    #[test]
    fn the_table_has_a_row_for_each_figure() {
        let summary = Summary::of([1.0, 2.0, 4.0]);
        let goals = [
            Goal::at_most("a", 3.0).median(Some(summary)).noted("why"),
            Goal::at_least("b", 1.0),
        ];
        let shown = table(&goals).shown();
        assert!(shown.contains("2.000 (1.000–4.000)"), "{shown}");
        assert!(
            shown.contains("not measured") && shown.contains("why"),
            "{shown}"
        );
    }
}
