//! What the rounds of a comparison come to. Pure.

use crate::goals::{Goal, worst};
use crate::report::{Cell, Table};
use crate::sides::Side;
use crate::stats::{Summary, added, ratios};

/// How long a steady engine takes to its first token, in milliseconds.
pub(super) const STEADY_MS: u32 = 20;

/// What is behind the sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Real,
    /// Its first token takes as long every time: what a real one's noise covers shows.
    Steady,
}

impl Engine {
    fn name(self) -> String {
        match self {
            Self::Real => "1 to 8 streams".to_owned(),
            Self::Steady => format!("an engine that always takes {STEADY_MS} ms"),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Real => "real engine",
            Self::Steady => "steady engine",
        }
    }

    /// Which columns of its tables mean something.
    fn columns(self) -> &'static [usize] {
        match self {
            Self::Real => &[0, 1, 2, 3, 4, 5, 6, 7, 8],
            Self::Steady => &[0, 2, 3, 4, 6],
        }
    }
}

/// What all rounds of one side came to, in order.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    /// Milliseconds of each stream, by round.
    pub(super) first_tokens: Vec<Vec<f64>>,
    /// By round.
    pub(super) tokens_per_second: Vec<f64>,
    pub(super) gaps: Vec<f64>,
}

/// The bare engine beside itself, each round with the one after it: what is
/// added where nothing is added.
fn noise(base: &Seen) -> Option<Summary> {
    added(base.first_tokens.get(1..)?, &base.first_tokens)
}

/// Which figure a goal is for, so that the worst number of streams is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Figure {
    Speed,
    FirstToken,
    FirstTokenP99,
    SpeedToRouter,
    FirstTokenToRouter,
}

/// A figure of one side at one number of streams.
pub(super) type Point = (Engine, &'static str, Figure, Goal);

pub(super) fn goals_of(
    engine: Engine,
    streams: usize,
    sides: &[Side],
    seen: &[Seen],
) -> Vec<Point> {
    let place = |part: &str| sides.iter().position(|side| side.name.contains(part));
    let Some(own) = place("orchestratord") else {
        return Vec::new();
    };
    let (name, own, base) = (sides[own].name, &seen[own], &seen[0]);
    let at = match streams {
        1 => "at 1 stream".to_owned(),
        streams => format!("at {streams} streams"),
    };
    let named = |what: &str| format!("overhead, {}: {what}, {name}", engine.name());
    let mut goals = Vec::new();
    let mut push = |figure, goal: Goal| goals.push((engine, name, figure, goal.noted(at.clone())));
    if let Some(speed) = ratios(&own.tokens_per_second, &base.tokens_per_second) {
        let goal = Goal::at_least(named("tokens/s to direct"), 0.99);
        push(Figure::Speed, goal.median(Some(speed)));
    }
    if let Some(first) = added(&own.first_tokens, &base.first_tokens) {
        let noise = noise(base).unwrap_or_default();
        let goal = Goal::at_most(named("added to first token, median"), 1.0).in_unit("ms", 2);
        let goal = goal.seen(first.median).beside_noise(noise.median.abs());
        push(Figure::FirstToken, goal);
        let goal = Goal::at_most(named("added to first token, p99"), 3.0).in_unit("ms", 2);
        let goal = goal.seen(first.p99).beside_noise(noise.p99);
        push(Figure::FirstTokenP99, goal);
    }
    let Some(router) = place("router").map(|router| &seen[router]) else {
        return goals;
    };
    if let Some(speed) = ratios(&own.tokens_per_second, &router.tokens_per_second) {
        let goal = Goal::at_least(named("tokens/s to router mode"), 1.0);
        push(Figure::SpeedToRouter, goal.median(Some(speed)));
    }
    if let Some(first) = added(&own.first_tokens, &router.first_tokens) {
        let named = named("first token after router mode's, median");
        let goal = Goal::at_most(named, 0.0).in_unit("ms", 2);
        push(Figure::FirstTokenToRouter, goal.seen(first.median));
    }
    goals
}

/// Of each side's figures the one at the number of streams where it is worst.
pub(super) fn worst_of_all(mut points: Vec<Point>) -> Vec<Goal> {
    let mut all = Vec::new();
    while let Some(&(engine, name, figure, _)) = points.first() {
        let (same, rest) = points
            .into_iter()
            .partition(|point| (point.0, point.1, point.2) == (engine, name, figure));
        let same: Vec<Point> = same;
        all.extend(worst(same.into_iter().map(|point| point.3)));
        points = rest;
    }
    all
}

pub(super) fn table(engine: Engine, streams: usize, sides: &[Side], seen: &[Seen]) -> Table {
    let flat = |seen: &Seen| {
        seen.first_tokens
            .iter()
            .flatten()
            .copied()
            .collect::<Vec<_>>()
    };
    let base = &seen[0];
    let rows = sides
        .iter()
        .zip(seen)
        .enumerate()
        .map(|(place, (side, seen))| {
            let added = if place == 0 {
                noise(base)
            } else {
                added(&seen.first_tokens, &base.first_tokens)
            };
            let added = added.unwrap_or_default();
            let (first, gaps) = (
                Summary::of(flat(seen)),
                Summary::of(seen.gaps.iter().copied()),
            );
            vec![
                Cell::text(side.name),
                Cell::spread(ratios(&seen.tokens_per_second, &base.tokens_per_second)),
                Cell::figure(added.median, 2),
                Cell::figure(added.p99, 2),
                Cell::figure(first.p99 - Summary::of(flat(base)).p99, 2),
                Cell::summary(Summary::some(seen.tokens_per_second.iter().copied()), 1),
                Cell::summary(Some(first), 1),
                Cell::figure(gaps.median, 2),
                Cell::figure(gaps.p99, 2),
            ]
        });
    let columns = [
        "side",
        "tokens/s to direct",
        "added first token ms",
        "added, p99",
        "p99 less direct's",
        "tokens/s",
        "first token ms",
        "gap p50 ms",
        "gap p99 ms",
    ];
    let requests: usize = base.first_tokens.iter().map(Vec::len).sum();
    let kept = engine.columns();
    Table {
        name: format!(
            "overhead, {}, {}, {streams} at a time, {requests} requests to each side",
            engine.kind(),
            sides.last().map_or("", |side| side.name)
        ),
        columns: kept.iter().map(|at| columns[*at].to_owned()).collect(),
        rows: rows
            .map(|row: Vec<Cell>| kept.iter().map(|at| row[*at].clone()).collect())
            .collect(),
        plotted: match engine {
            Engine::Real => vec![5, 6],
            Engine::Steady => vec![4],
        },
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::sides::Api;

    fn side(name: &'static str) -> Side {
        Side {
            name,
            address: SocketAddr::from(([127, 0, 0, 1], 1)),
            api: Api::Chat,
            model: None,
        }
    }

    fn seen(first: f64, speed: f64) -> Seen {
        Seen {
            first_tokens: vec![vec![first], vec![first + 1.0]],
            tokens_per_second: vec![speed, speed],
            gaps: vec![1.0],
        }
    }

    #[test]
    fn the_worst_number_of_streams_is_what_counts() {
        let sides = [
            side("llama-server"),
            side("its router mode"),
            side("orchestratord /v1"),
        ];
        let at = |streams, first, speed| {
            let seen = [seen(10.0, 100.0), seen(12.0, 90.0), seen(first, speed)];
            goals_of(Engine::Real, streams, &sides, &seen)
        };
        let goals = worst_of_all([at(1, 10.5, 100.0), at(2, 14.0, 95.0)].concat());
        assert_eq!(goals.len(), 5);
        let found = |part: &str| goals.iter().find(|goal| goal.name.contains(part)).unwrap();
        let near = |goal: &Goal, right: f64| (goal.measured.unwrap() - right).abs() < 1e-9;
        assert!(near(found("tokens/s to direct"), 0.95));
        assert!(near(found("first token, median"), 4.0));
        assert!(found("first token, p99").note.contains("at 2 streams"));
        assert_eq!(found("tokens/s to router").reached(), Some(true));
        assert!(near(found("after router mode"), 2.0));
    }

    #[test]
    fn an_engine_that_is_always_as_fast_has_figures_of_its_own() {
        let sides = [side("bench-engine"), side("orchestratord /v2")];
        let own = [seen(20.0, 1.0), seen(20.5, 1.0)];
        let steady = own.clone().map(|seen| Seen {
            tokens_per_second: Vec::new(),
            ..seen
        });
        let real = goals_of(Engine::Real, 1, &sides, &own);
        let steady = goals_of(Engine::Steady, 1, &sides, &steady);
        let goals = worst_of_all([real, steady].concat());
        assert_eq!(goals.len(), 5);
        let of_steady = goals
            .iter()
            .filter(|goal| goal.name.contains("always takes"));
        assert_eq!(of_steady.count(), 2);
    }

    #[test]
    fn the_bare_engines_row_shows_the_noise() {
        let sides = [side("llama-server"), side("orchestratord /v2")];
        let table = table(
            Engine::Real,
            1,
            &sides,
            &[seen(10.0, 100.0), seen(12.0, 90.0)],
        );
        assert_eq!(table.rows[0][2].value, Some(1.0));
        assert_eq!(table.rows[1][2].value, Some(2.0));
        assert!(table.name.contains("2 requests"));
    }
}
