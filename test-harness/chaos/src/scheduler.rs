//! Which fault is next. Pure: the seed decides.
//!
//! The faults come in rounds. A round holds each fault as often as its weight
//! says, shuffled; so each comes up at least once in every round, and after
//! `n` rounds at least `n` times.

use crate::rng::Rng;

#[derive(Debug)]
pub struct Scheduler {
    weights: Vec<u32>,
    rng: Rng,
    round: Vec<usize>,
}

/// One choice: a fault by its index, and the source of its parameters.
#[derive(Debug, Clone)]
pub struct Pick {
    pub fault: usize,
    pub rng: Rng,
}

impl Scheduler {
    /// `weights` says how often each fault comes up in a round: at least once.
    pub fn new(weights: Vec<u32>, seed: u64) -> Self {
        Self {
            weights,
            rng: Rng::new(seed),
            round: Vec::new(),
        }
    }

    /// The next fault; `None` if there are no faults at all.
    pub fn pick(&mut self) -> Option<Pick> {
        if self.round.is_empty() {
            self.round = self
                .weights
                .iter()
                .enumerate()
                .flat_map(|(fault, weight)| (0..(*weight).max(1)).map(move |_| fault))
                .collect();
            self.rng.shuffle(&mut self.round);
        }
        let fault = self.round.pop()?;
        Some(Pick {
            fault,
            rng: self.rng.fork(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn picks(weights: &[u32], seed: u64, count: usize) -> Vec<usize> {
        let mut scheduler = Scheduler::new(weights.to_vec(), seed);
        (0..count)
            .map_while(|_| scheduler.pick().map(|pick| pick.fault))
            .collect()
    }

    #[test]
    fn the_seed_decides() {
        let weights = [1; 20];
        assert_eq!(picks(&weights, 4, 60), picks(&weights, 4, 60));
        assert_ne!(picks(&weights, 4, 60), picks(&weights, 5, 60));
        assert!(picks(&[], 1, 3).is_empty());
    }

    #[test]
    fn the_parameters_differ_from_pick_to_pick() {
        let mut scheduler = Scheduler::new(vec![1], 1);
        let first = scheduler.pick().unwrap().rng.number();
        assert_ne!(first, scheduler.pick().unwrap().rng.number());
    }

    proptest! {
        #[test]
        fn every_fault_comes_up_in_every_round(
            weights in proptest::collection::vec(0u32..4, 1..30),
            seed: u64,
            rounds in 1usize..5,
        ) {
            let round: u32 = weights.iter().map(|weight| (*weight).max(1)).sum();
            let picks = picks(&weights, seed, round as usize * rounds);
            for (fault, weight) in weights.iter().enumerate() {
                let times = picks.iter().filter(|pick| **pick == fault).count();
                prop_assert_eq!(times, (*weight).max(1) as usize * rounds);
            }
        }
    }
}
