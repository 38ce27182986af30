//! Whether a second engine fits beside the first. Pure: the machine is looked
//! at elsewhere.

use super::keeper::Kept;
use super::machine::{Gpu, Machine};
use crate::services::residency::Needs;

/// What must stay free for everybody else.
const RESERVE: u64 = 256 * MIB;

const MIB: u64 = 1024 * 1024;

/// The engine that runs.
#[derive(Debug, Clone, Copy)]
pub(super) struct Running {
    /// The digest of its model.
    model: Option<llama_orch_types::Digest>,
    /// What it is measured to hold, in bytes.
    resident: Option<u64>,
}

impl Running {
    /// Blocks for the moment that reading the process table takes.
    pub(super) fn of(kept: &Kept) -> Self {
        let model = kept.engine.context().model.as_ref();
        Self {
            model: model.map(|model| model.digest),
            resident: kept.engine.resident_bytes(),
        }
    }
}

/// What the new engine takes: what was estimated, and of main memory what the old
/// one is measured to hold if that is more and the model is the same.
pub(super) fn need(estimated: Needs, model: llama_orch_types::Digest, running: &Running) -> Needs {
    let same = running.model == Some(model);
    let measured = running.resident.filter(|_| same).unwrap_or(0);
    estimated.at_least(Needs::of_ram(measured))
}

/// Whether that much is there, or why not.
pub(super) fn enough(need: Needs, machine: &Machine) -> Result<(), String> {
    let fits = |what: &str, need: u64, free: u64| {
        let wanted = need.saturating_add(RESERVE);
        if free >= wanted {
            return Ok(());
        }
        Err(format!(
            "a second engine needs about {} MiB of {what}, and {} MiB are free",
            wanted / MIB,
            free / MIB
        ))
    };
    let Some(available) = machine.available else {
        return Err("the machine's free memory is not known".to_owned());
    };
    fits("memory", need.ram, available)?;
    match machine.gpu {
        Gpu::Free(free) => fits("the GPU's memory", need.vram, free),
        Gpu::NotUsed => Ok(()),
        Gpu::Unknown => {
            Err("the engine uses a GPU, and how much of its memory is free is not known".to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_orch_types::Digest;
    use proptest::prelude::*;

    fn machine(available: u64, gpu: Gpu) -> Machine {
        Machine {
            available: Some(available),
            gpu,
        }
    }

    fn needs(bytes: u64) -> Needs {
        Needs {
            ram: bytes,
            vram: bytes,
        }
    }

    #[test]
    fn the_same_model_needs_what_it_is_seen_to_hold() {
        let digest = |byte| Digest::from_bytes([byte; 32]);
        let running = |byte| Running {
            model: Some(digest(byte)),
            resident: Some(900 * MIB),
        };
        let estimated = needs(100 * MIB);
        let need = |byte| need(estimated, digest(1), &running(byte));
        assert_eq!((need(1).ram, need(1).vram), (900 * MIB, 100 * MIB));
        assert_eq!(need(2), estimated);
    }

    #[test]
    fn without_room_the_reason_is_told() {
        let enough = |bytes, machine| enough(needs(bytes), &machine);
        assert_eq!(enough(MIB, machine(1024 * MIB, Gpu::NotUsed)), Ok(()));
        let why = enough(1024 * MIB, machine(1024 * MIB, Gpu::NotUsed)).unwrap_err();
        assert!(
            why.contains("1280 MiB of memory") && why.contains("1024 MiB are"),
            "{why}"
        );
        assert!(enough(MIB, machine(u64::MAX, Gpu::Unknown)).is_err());
        assert!(enough(MIB, machine(u64::MAX, Gpu::Free(100 * MIB))).is_err());
        assert_eq!(enough(MIB, machine(u64::MAX, Gpu::Free(300 * MIB))), Ok(()));
        let unknown = Machine {
            available: None,
            gpu: Gpu::NotUsed,
        };
        assert!(enough(MIB, unknown).is_err());
    }

    proptest! {
        #[test]
        fn more_memory_never_makes_room_vanish(need in any::<u64>(), available in any::<u64>(), more in any::<u64>()) {
            let with = machine(available.saturating_add(more), Gpu::NotUsed);
            if enough(needs(need), &machine(available, Gpu::NotUsed)).is_ok() {
                prop_assert!(enough(needs(need), &with).is_ok());
            }
        }
    }
}
