//! How much memory the machine has: in all, free, and taken by one engine.
//! Only the reading is done here; what follows from it is decided elsewhere.

use std::path::Path;
use std::time::Duration;

use provision_kit::process::CommandSpec;
use provisioners_engine_provisioner::machine::find_on_path;

use crate::app::config::MemoryConfig;
use crate::services::residency::{Budget, Limit};

const MIB: u64 = 1024 * 1024;

/// How long the GPU's own tool may take.
const GPU_LIMIT: Duration = Duration::from_secs(5);

/// What is left to everything else on the machine, at the least.
const RAM_RESERVE: u64 = 512 * MIB;
const VRAM_RESERVE: u64 = 256 * MIB;

/// What the machine has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Machine {
    /// Memory, in bytes, that can be had without swapping.
    pub(super) available: Option<u64>,
    pub(super) gpu: Gpu,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gpu {
    /// The engine computes on the CPU.
    NotUsed,
    /// So many bytes of its memory are free.
    Free(u64),
    Unknown,
}

impl Machine {
    pub(super) async fn look(uses_gpu: bool) -> Self {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let machine = in_meminfo(&meminfo, "MemAvailable:");
        let gpu = if uses_gpu {
            free_of_gpu().await.map_or(Gpu::Unknown, Gpu::Free)
        } else {
            Gpu::NotUsed
        };
        Self {
            available: match in_groups(left_in_group) {
                Some(in_group) => machine.map(|machine| machine.min(in_group)),
                None => machine,
            },
            gpu,
        }
    }
}

/// What all engines may take together: what was set by hand, else what there
/// is, less a reserve.
pub(crate) async fn budget(config: MemoryConfig) -> Budget {
    let by_hand = |bytes| Limit {
        bytes,
        by_hand: true,
    };
    let of_machine = |bytes| Limit {
        bytes,
        by_hand: false,
    };
    let ram = match config.ram {
        Some(size) => Some(by_hand(size.0)),
        None => total().map(|total| of_machine(less(total, RAM_RESERVE))),
    };
    let vram = match config.vram {
        Some(size) => Some(by_hand(size.0)),
        None => total_of_gpus()
            .await
            .map(|total| of_machine(less(total, VRAM_RESERVE))),
    };
    Budget { ram, vram }
}

/// A tenth is kept, or the reserve if that is more.
fn less(total: u64, reserve: u64) -> u64 {
    total.saturating_sub((total / 10).max(reserve))
}

/// All memory that we may ever use, in bytes.
fn total() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let machine = in_meminfo(&meminfo, "MemTotal:")?;
    let limit = in_groups(|max, _, _| max.trim().parse().ok());
    Some(limit.map_or(machine, |limit: u64| limit.min(machine)))
}

fn in_meminfo(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// The smallest figure, in bytes, that the limits of our control group and of
/// those around it give; `None` where there is no limit. `figure` is given the
/// limit, what is used, and the statistics.
fn in_groups(figure: impl Fn(&str, &str, &str) -> Option<u64>) -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let path = Path::new("/sys/fs/cgroup").join(own);
    path.ancestors()
        .take_while(|group| group.starts_with("/sys/fs/cgroup"))
        .filter_map(|group| {
            let read = |name: &str| std::fs::read_to_string(group.join(name)).ok();
            figure(
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

/// What the NVIDIA driver's tool says; `None` where there is none, for which no process is begun:
/// it would hold up the engine's.
async fn ask_gpu(tool: &str, query: &str) -> Option<String> {
    let tool = find_on_path(tool)?;
    let command = CommandSpec::new(tool).args([query, "--format=csv,noheader,nounits"]);
    let output = provision_kit::process::output(command, GPU_LIMIT).await;
    output.ok().map(|output| output.stdout)
}

const TOOL: &str = "nvidia-smi";

/// The smallest of all GPUs' free memory counts: a model need not be spread
/// evenly.
async fn free_of_gpu() -> Option<u64> {
    let csv = ask_gpu(TOOL, "--query-gpu=memory.free").await?;
    figures(&csv)?.into_iter().min()
}

async fn total_of_gpus() -> Option<u64> {
    let csv = ask_gpu(TOOL, "--query-gpu=memory.total").await?;
    Some(figures(&csv)?.into_iter().sum())
}

/// What processes hold of the GPUs' memory, in bytes.
pub(super) async fn gpu_memory_of(pids: &[u32]) -> Option<u64> {
    let csv = ask_gpu(TOOL, "--query-compute-apps=pid,used_memory").await?;
    Some(held_by(pids, &csv))
}

/// One figure on each line, in MiB; at least one.
fn figures(csv: &str) -> Option<Vec<u64>> {
    let mib: Option<Vec<u64>> = csv.lines().map(|line| line.trim().parse().ok()).collect();
    let bytes = mib?.into_iter().map(|mib| mib.saturating_mul(MIB));
    Some(bytes.collect::<Vec<u64>>()).filter(|figures| !figures.is_empty())
}

/// Lines of a process and what it holds, in MiB; a process has one for each GPU.
fn held_by(pids: &[u32], csv: &str) -> u64 {
    csv.lines()
        .filter_map(|line| line.split_once(','))
        .filter(|(pid, _)| pid.trim().parse().is_ok_and(|pid| pids.contains(&pid)))
        .filter_map(|(_, mib)| mib.trim().parse::<u64>().ok())
        .map(|mib| mib.saturating_mul(MIB))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(in_meminfo(meminfo, "MemAvailable:"), Some(2 * MIB));
        assert_eq!(in_meminfo(meminfo, "MemTotal:"), Some(8_192_000));
        assert_eq!(in_meminfo("MemTotal: 1 kB", "MemAvailable:"), None);
        assert_eq!(
            figures("24000\n 300\n"),
            Some(vec![24_000 * MIB, 300 * MIB])
        );
        assert_eq!(figures("[N/A]\n"), None);
        assert_eq!(figures(""), None);
        let apps = "41, 1000\n42, 300\n43, [N/A]\n42, 20\n\n";
        assert_eq!(held_by(&[42, 43], apps), 320 * MIB);
    }

    #[test]
    fn a_tenth_is_left_to_others_and_half_a_gibibyte_at_least() {
        assert_eq!(less(100 << 30, RAM_RESERVE), 90 << 30);
        assert_eq!(less(2 << 30, RAM_RESERVE), 3 << 29);
        assert_eq!(less(1 << 20, RAM_RESERVE), 0);
    }

    #[tokio::test]
    async fn what_is_set_by_hand_is_the_budget_and_the_rest_is_the_machines() {
        let config = MemoryConfig {
            ram: Some("3GiB".parse().unwrap()),
            ..MemoryConfig::default()
        };
        let ram = budget(config).await.ram.unwrap();
        assert_eq!((ram.bytes, ram.by_hand), (3 << 30, true));
        let ram = budget(MemoryConfig::default()).await.ram.unwrap();
        assert!(ram.bytes > 0 && ram.bytes < total().unwrap() && !ram.by_hand);
    }

    #[tokio::test]
    async fn a_gpus_tool_is_asked_and_one_that_is_not_there_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let tool = dir.path().join("nvidia-smi");
        let script = "case \"$1\" in
            --query-compute-apps=pid,used_memory) echo '7, 512' ;;
            --query-gpu=memory.total) printf '8000\\n8000\\n' ;;
            *) exit 1 ;;
        esac";
        // Read by a shell, so that no file is written that is run at once.
        std::fs::write(&tool, script).unwrap();
        let ask = async |query: &str| {
            let command = CommandSpec::new("sh").args([tool.to_str().unwrap(), query]);
            let output = provision_kit::process::output(command, GPU_LIMIT).await;
            output.unwrap().stdout
        };
        let apps = ask("--query-compute-apps=pid,used_memory").await;
        assert_eq!(held_by(&[7], &apps), 512 * MIB);
        let total = ask("--query-gpu=memory.total").await;
        assert_eq!(figures(&total).unwrap().iter().sum::<u64>(), 16_000 * MIB);
        let absent = dir.path().join("no-such-tool");
        assert_eq!(
            ask_gpu(absent.to_str().unwrap(), "--query-gpu=memory.total").await,
            None
        );
    }
}
