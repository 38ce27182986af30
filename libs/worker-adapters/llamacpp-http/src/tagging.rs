//! Which of several slots a task is in.
//!
//! The engine's stream does not say, but its list of slots shows each task's
//! sampling parameters. One of them, the exponent of the dynamic temperature, is
//! of no effect while that is off, as it is unless a flag turns it on. Each task
//! is given another exponent, and is known by it.

use serde_json::Value;
use worker_adapters_adapter_api::EndSummary;

use crate::wire::{PropsAnswer, SlotAnswer};

const EXPONENT: &str = "dynatemp_exponent";
const RANGE: &str = "dynatemp_range";

/// That tasks can be told apart, and what the exponent is without us.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tagging {
    usual: Value,
}

impl Tagging {
    /// `None` for one slot, which needs no telling apart, and for an engine whose
    /// parameters are not as expected.
    pub(crate) fn of(props: &PropsAnswer) -> Option<Self> {
        let defaults = props.default_params()?;
        let off = defaults.get(RANGE)?.as_f64() == Some(0.0);
        let usual = defaults.get(EXPONENT).cloned()?;
        (props.slots() > 1 && off).then_some(Self { usual })
    }

    pub(crate) fn shows(slot: &SlotAnswer, tag: u32) -> bool {
        // Whole numbers, which the engine's floats hold exactly.
        (slot.params.dynatemp_exponent - f64::from(tag)).abs() < 0.5
    }

    /// Puts back what the task's parameters would be without us.
    pub(crate) fn take_from(&self, summary: &mut EndSummary) {
        if let Some(exponent) = summary.effective.get_mut(EXPONENT) {
            *exponent = self.usual.clone();
        }
    }
}
