//! Whether a second engine fits beside the first. The decision is pure; the
//! machine is looked at around it.

use std::time::Duration;

use provision_kit::process::CommandSpec;
use provisioners_engine_provisioner::{Accelerator, EngineInstallation, LaunchSpec};

use super::keeper::Kept;

/// What must stay free for everybody else.
const RESERVE: u64 = 256 * MIB;

const MIB: u64 = 1024 * 1024;

/// Most that one token of context takes, in bytes: of a model of 7 billion
/// weights without grouped attention, and twice that.
const MOST_PER_TOKEN: u64 = MIB;

/// How long the GPU's own tool may take.
const GPU_LIMIT: Duration = Duration::from_secs(5);

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

/// What the machine has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    /// Memory, in bytes, that can be had without swapping.
    available: Option<u64>,
    gpu: Gpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gpu {
    /// The engine computes on the CPU.
    NotUsed,
    /// So many bytes of its memory are free.
    Free(u64),
    Unknown,
}

/// Whether the engine will put a part of the model on a GPU.
pub(super) fn uses_gpu(installation: &EngineInstallation, spec: &LaunchSpec) -> bool {
    match spec.gpu_layers {
        Some(layers) => layers > 0,
        None => {
            installation.accelerator != Accelerator::Cpu
                || spec.flags.iter().any(|flag| {
                    let name = flag.split('=').next().unwrap_or_default();
                    matches!(name, "-ngl" | "--gpu-layers" | "--n-gpu-layers")
                })
        }
    }
}

/// What the new engine takes, in bytes: what the old one is measured to hold if
/// the model is the same, and never less than its file and its context need.
pub(super) fn need(spec: &LaunchSpec, running: &Running) -> u64 {
    let weights = spec.model.parameter_count.unwrap_or(spec.model.size_bytes);
    let per_token = (32 * 1024 + weights / 1_000_000 * 64).min(MOST_PER_TOKEN);
    let tokens = u64::from(spec.ctx_per_slot()) * u64::from(spec.slots);
    let estimate = spec
        .model
        .size_bytes
        .saturating_add(per_token.saturating_mul(tokens));
    let same = running.model == Some(spec.model.digest);
    let measured = running.resident.filter(|_| same).unwrap_or(0);
    estimate.max(measured)
}

/// Whether that much is there, or why not.
pub(super) fn enough(need: u64, machine: &Machine) -> Result<(), String> {
    let wanted = need.saturating_add(RESERVE);
    let short = |what: &str, free: u64| {
        Err(format!(
            "a second engine needs about {} MiB of {what}, and {} MiB are free",
            wanted / MIB,
            free / MIB
        ))
    };
    match machine.available {
        None => return Err("the machine's free memory is not known".to_owned()),
        Some(available) if available < wanted => return short("memory", available),
        Some(_) => {}
    }
    match machine.gpu {
        Gpu::Free(free) if free < wanted => short("the GPU's memory", free),
        Gpu::Free(_) | Gpu::NotUsed => Ok(()),
        Gpu::Unknown => {
            Err("the engine uses a GPU, and how much of its memory is free is not known".to_owned())
        }
    }
}

impl Machine {
    pub(super) async fn look(uses_gpu: bool) -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let machine = available(&meminfo);
        let gpu = if uses_gpu {
            free_of_gpu().await.map_or(Gpu::Unknown, Gpu::Free)
        } else {
            Gpu::NotUsed
        };
        Self {
            available: match room_in_group() {
                Some(in_group) => machine.map(|machine| machine.min(in_group)),
                None => machine,
            },
            gpu,
        }
    }
}

/// What the limits of our control group and of those around it leave, in
/// bytes; `None` where there is no limit.
fn room_in_group() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = std::path::Path::new("/sys/fs/cgroup").join(own);
    path.ancestors()
        .take_while(|group| group.starts_with("/sys/fs/cgroup"))
        .filter_map(|group| {
            let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
            left_in_group(
                &read("memory.max")?,
                &read("memory.current")?,
                &read("memory.stat")?,
            )
        })
        .min()
}

/// What one group has left: files in the page cache can be given back.
fn left_in_group(max: &str, current: &str, stat: &str) -> Option<u64> {
    // Without a limit it says `max`.
    let max: u64 = max.trim().parse().ok()?;
    let current: u64 = current.trim().parse().ok()?;
    let files: u64 = stat
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(name, _)| matches!(*name, "inactive_file" | "active_file"))
        .filter_map(|(_, bytes)| bytes.trim().parse::<u64>().ok())
        .sum();
    Some(max.saturating_sub(current.saturating_sub(files)))
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// What the NVIDIA driver's tool says; `None` where there is none.
async fn free_of_gpu() -> Option<u64> {
    let query = ["--query-gpu=memory.free", "--format=csv,noheader,nounits"];
    let command = CommandSpec::new("nvidia-smi").args(query);
    let output = provision_kit::process::output(command, GPU_LIMIT)
        .await
        .ok()?;
    free_in(&output.stdout)
}

/// The smallest of all GPUs' free memory counts: a model need not be spread
/// evenly.
fn free_in(csv: &str) -> Option<u64> {
    let mib: Option<Vec<u64>> = csv.lines().map(|line| line.trim().parse().ok()).collect();
    mib?.into_iter().min().map(|mib| mib.saturating_mul(MIB))
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_orch_types::{Digest, ModelMetadata, PoolId};
    use proptest::prelude::*;

    fn spec(size_bytes: u64) -> LaunchSpec {
        let model = ModelMetadata {
            id: "m".to_owned(),
            path: "m.gguf".into(),
            digest: Digest::from_bytes([1; 32]),
            size_bytes,
            architecture: None,
            quantization: None,
            parameter_count: Some(135_000_000),
            ctx_max: Some(2048),
            chat_template: None,
        };
        LaunchSpec::new(PoolId::default_pool(), model)
    }

    fn machine(available: u64, gpu: Gpu) -> Machine {
        Machine {
            available: Some(available),
            gpu,
        }
    }

    #[test]
    fn the_same_model_needs_what_it_is_seen_to_hold() {
        let running = |digest| Running {
            model: Some(Digest::from_bytes([digest; 32])),
            resident: Some(900 * MIB),
        };
        assert_eq!(need(&spec(100 * MIB), &running(1)), 900 * MIB);
        let other = need(&spec(100 * MIB), &running(2));
        assert!(other > 100 * MIB && other < 300 * MIB, "{other}");
    }

    #[test]
    fn without_room_the_reason_is_told() {
        assert_eq!(enough(MIB, &machine(1024 * MIB, Gpu::NotUsed)), Ok(()));
        let why = enough(1024 * MIB, &machine(1024 * MIB, Gpu::NotUsed)).unwrap_err();
        assert!(
            why.contains("1280 MiB of memory") && why.contains("1024 MiB are"),
            "{why}"
        );
        assert!(enough(MIB, &machine(u64::MAX, Gpu::Unknown)).is_err());
        assert!(enough(MIB, &machine(u64::MAX, Gpu::Free(100 * MIB))).is_err());
        assert_eq!(
            enough(MIB, &machine(u64::MAX, Gpu::Free(300 * MIB))),
            Ok(())
        );
        let unknown = Machine {
            available: None,
            gpu: Gpu::NotUsed,
        };
        assert!(enough(MIB, &unknown).is_err());
    }

    #[test]
    fn a_groups_limit_counts_without_what_it_can_give_back() {
        let stat = "anon 5\ninactive_file 300\nactive_file 100\nslab 9\n";
        assert_eq!(left_in_group("1000\n", "900\n", stat), Some(500));
        assert_eq!(left_in_group("1000\n", "2000\n", ""), Some(0));
        assert_eq!(left_in_group("max\n", "900\n", stat), None);
    }

    #[test]
    fn what_the_system_says_is_read() {
        let meminfo = "MemTotal:  8000 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available(meminfo), Some(2 * MIB));
        assert_eq!(available("MemTotal: 1 kB"), None);
        assert_eq!(free_in("24000\n 300\n"), Some(300 * MIB));
        assert_eq!(free_in("[N/A]\n"), None);
        assert_eq!(free_in(""), None);
    }

    proptest! {
        #[test]
        fn more_memory_never_makes_room_vanish(need in any::<u64>(), available in any::<u64>(), more in any::<u64>()) {
            let with = machine(available.saturating_add(more), Gpu::NotUsed);
            if enough(need, &machine(available, Gpu::NotUsed)).is_ok() {
                prop_assert!(enough(need, &with).is_ok());
            }
        }
    }
}
