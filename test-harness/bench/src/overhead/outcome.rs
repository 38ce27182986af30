//! What the rounds of a comparison come to. Pure.

use crate::goals::{Goal, worst};
use crate::report::{Cell, Table};
use crate::sides::Side;
use crate::stats::{Summary, added, ratios};

/// How long a steady engine takes for each token, in milliseconds.
pub(super) const STEADY_MS: u32 = 20;

/// Standard deviations in the median of absolute differences, of a normal distribution.
const DEVIATION_OF_MEDIAN_SIZE: f64 = 1.4826;

/// The standard error of a median beside that of a mean, of a normal distribution.
const ERROR_OF_MEDIAN: f64 = 1.2533;

/// What is behind the sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Real,
    /// Each token takes as long every time: what a real one's noise covers shows.
    Steady,
}

impl Engine {
    fn name(self) -> String {
        match self {
            Self::Real => "1 to 8 streams".to_owned(),
            Self::Steady => format!("an engine that takes {STEADY_MS} ms a token"),
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::Real => "real engine",
            Self::Steady => "steady engine",
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

/// The standard error of a median over all rounds, from what one round of the bare
/// engine differs from the next. Their typical size stands for the deviation, so that
/// one late batch does not.
fn noise_of_median(differences: impl Iterator<Item = f64>) -> f64 {
    let differences = Summary::of(differences.map(f64::abs));
    let deviation = DEVIATION_OF_MEDIAN_SIZE * differences.median;
    ERROR_OF_MEDIAN * deviation / ((differences.count + 1) as f64).sqrt()
}

fn speed_noise(base: &Seen) -> f64 {
    let speeds = base.tokens_per_second.windows(2);
    noise_of_median(speeds.map(|pair| pair[1] / pair[0] - 1.0))
}

fn first_token_noise(base: &Seen) -> f64 {
    let rounds = base.first_tokens.windows(2);
    let medians = rounds.filter_map(|pair| added(&pair[1..], &pair[..1]));
    noise_of_median(medians.map(|added| added.median))
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
        let goal = Goal::at_least(named("tokens/s to direct"), 0.99).median(Some(speed));
        push(Figure::Speed, goal.beside_noise(speed_noise(base)));
    }
    if let Some(first) = added(&own.first_tokens, &base.first_tokens) {
        let goal = Goal::at_most(named("added to first token, median"), 1.0).in_unit("ms", 2);
        let goal = goal
            .seen(first.median)
            .beside_noise(first_token_noise(base));
        push(Figure::FirstToken, goal);
        let goal = Goal::at_most(named("added to first token, p99"), 3.0).in_unit("ms", 2);
        let noise = noise(base).unwrap_or_default();
        let goal = goal.seen(first.p99).beside_noise(noise.p99);
        push(Figure::FirstTokenP99, goal);
    }
    let Some(router) = place("router").map(|router| &seen[router]) else {
        return goals;
    };
    if let Some(speed) = ratios(&own.tokens_per_second, &router.tokens_per_second) {
        let goal = Goal::at_least(named("tokens/s to router mode"), 1.0).median(Some(speed));
        push(Figure::SpeedToRouter, goal.beside_noise(speed_noise(base)));
    }
    if let Some(first) = added(&own.first_tokens, &router.first_tokens) {
        let named = named("first token after router mode's, median");
        let goal = Goal::at_most(named, 0.0)
            .in_unit("ms", 2)
            .seen(first.median);
        push(
            Figure::FirstTokenToRouter,
            goal.beside_noise(first_token_noise(base)),
        );
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
    Table {
        name: format!(
            "overhead, {}, {}, {streams} at a time, {requests} requests to each side",
            engine.kind(),
            sides.last().map_or("", |side| side.name)
        ),
        columns: columns.map(str::to_owned).to_vec(),
        rows: rows.collect(),
        plotted: vec![5, 6],
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
        let own = [seen(20.0, 50.0), seen(20.5, 49.9)];
        let of = |engine| goals_of(engine, 1, &sides, &own);
        let goals = worst_of_all([of(Engine::Real), of(Engine::Steady)].concat());
        assert_eq!(goals.len(), 6);
        let of_steady = goals
            .iter()
            .filter(|goal| goal.name.contains("20 ms a token"));
        assert_eq!(of_steady.count(), 3);
    }

    #[test]
    fn rounds_that_differ_among_themselves_tell_less() {
        let base = |speeds: [f64; 4], firsts: [f64; 4]| Seen {
            first_tokens: firsts.map(|first| vec![first]).to_vec(),
            tokens_per_second: speeds.to_vec(),
            gaps: Vec::new(),
        };
        let quiet = base([50.0; 4], [20.0; 4]);
        let wild = base([50.0, 40.0, 50.0, 60.0], [20.0, 28.0, 20.0, 12.0]);
        let none = [speed_noise(&quiet), first_token_noise(&quiet)];
        assert!(none.iter().all(|noise| noise.abs() < 1e-9));
        let near = |noise: f64, right: f64| (noise - right).abs() < 1e-9;
        // Four rounds that are 8 ms, and a fifth of the speed, apart.
        assert!(near(first_token_noise(&wild), 7.432_570_32));
        assert!(near(speed_noise(&wild), 0.185_814_258));
        let sides = [side("llama-server"), side("orchestratord /v1")];
        let own = base([46.0; 4], [24.0; 4]);
        let verdicts = |base: &Seen| {
            let goals = goals_of(Engine::Real, 1, &sides, &[base.clone(), own.clone()]);
            [goals[0].3.reached(), goals[1].3.reached()]
        };
        assert_eq!(verdicts(&quiet), [Some(false), Some(false)]);
        assert_eq!(verdicts(&wild)[1], None);
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
