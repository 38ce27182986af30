//! Which pools are in memory: one budget, and one who gives it out.
//!
//! Whoever starts an engine first gets a [`Lease`] from [`Residency`], and keeps
//! it as long as the engine's process lives; so memory is never promised twice.
//! Where there is no room the claim waits its turn, and pools without tasks are
//! unloaded for it. [`plan`] decides, without clock or IO; [`actor`] owns the
//! state, and carries out what was decided.

mod actor;
pub mod plan;
mod pools;
mod resident;
#[cfg(test)]
mod tests;
mod view;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use llama_orch_types::PoolId;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc, oneshot, watch};
use utoipa::ToSchema;

use self::plan::{Never, Wait};
pub use self::resident::{Resident, Seen, Unloading};
pub use self::view::{LeaseView, MemoryView, PoolMemory, WaiterView};

/// Claims that may wait for the actor before their senders have to.
const COMMAND_QUEUE: usize = 64;

/// Memory in bytes: what an engine needs, or was promised, or uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub struct Needs {
    /// Main memory, in bytes.
    pub ram: u64,
    /// The GPUs' memory, in bytes.
    pub vram: u64,
}

impl Needs {
    pub fn of_ram(ram: u64) -> Self {
        Self { ram, vram: 0 }
    }

    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ram: self.ram.saturating_add(other.ram),
            vram: self.vram.saturating_add(other.vram),
        }
    }

    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            ram: self.ram.saturating_sub(other.ram),
            vram: self.vram.saturating_sub(other.vram),
        }
    }

    #[must_use]
    pub fn at_least(self, other: Self) -> Self {
        Self {
            ram: self.ram.max(other.ram),
            vram: self.vram.max(other.vram),
        }
    }
}

/// How much there is of one kind of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Limit {
    pub bytes: u64,
    /// It was set by hand, and is not the machine's.
    pub by_hand: bool,
}

/// What all engines may take together. What is not known is not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Budget {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Limit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vram: Option<Limit>,
}

impl Budget {
    fn holds(&self, used: Needs) -> bool {
        self.short(used) == Needs::default()
    }

    /// By how much that is more than there is.
    fn short(&self, used: Needs) -> Needs {
        let over = |used: u64, limit: Option<Limit>| {
            limit.map_or(0, |limit| used.saturating_sub(limit.bytes))
        };
        Needs {
            ram: over(used.ram, self.ram),
            vram: over(used.vram, self.vram),
        }
    }

    /// As much of it as there is at all.
    fn cut(&self, needs: Needs) -> Needs {
        let cut =
            |needs: u64, limit: Option<Limit>| limit.map_or(needs, |limit| needs.min(limit.bytes));
        Needs {
            ram: cut(needs.ram, self.ram),
            vram: cut(needs.vram, self.vram),
        }
    }

    /// What an engine that needs so much is promised. One that seems to need
    /// more than the machine has is let try alone, since an estimate may be
    /// wrong: it is promised everything. A limit set by hand is kept.
    fn promise(&self, needs: Needs) -> Result<Needs, Never> {
        let by_hand = [
            ("memory", needs.ram, self.ram),
            ("the GPU's memory", needs.vram, self.vram),
        ];
        for (what, needs, limit) in by_hand {
            if let Some(limit) = limit
                && limit.by_hand
                && needs > limit.bytes
            {
                let budget = limit.bytes;
                return Err(Never::TooLarge {
                    what,
                    needs,
                    budget,
                });
            }
        }
        Ok(self.cut(needs))
    }
}

/// Pools of which only so many may be loaded at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    pub pools: BTreeSet<PoolId>,
    pub at_most: usize,
}

/// By what rules memory is given out.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    pub groups: Vec<Group>,
    /// `None`: by each pool's own load.
    pub min_dwell: Option<Duration>,
}

/// Somebody wants to start an engine.
#[derive(Debug)]
pub struct Claim {
    pub resident: Arc<dyn Resident>,
    pub estimated: Needs,
    /// Names all that the need depends on: what was measured under the same key
    /// before is believed more than the estimate.
    pub key: String,
}

/// Why there is no lease.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0}")]
    Never(Never),
    #[error("the daemon ends")]
    Over,
}

/// The way to the one who gives out memory. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Residency {
    commands: mpsc::Sender<actor::Command>,
    /// Something changed that no command tells of.
    poke: Arc<Notify>,
    view: watch::Receiver<MemoryView>,
}

/// Memory that was promised to one engine. Given back when it is dropped.
#[derive(Debug)]
pub struct Lease {
    /// What the engine is measured to use. The actor sees it close.
    measured: Option<watch::Sender<Needs>>,
    promised: Needs,
    poke: Arc<Notify>,
}

impl Lease {
    /// What it was promised to begin with.
    pub fn promised(&self) -> Needs {
        self.promised
    }

    /// Corrects the promise by what the engine is seen to use.
    pub fn measured(&self, used: Needs) {
        if let Some(measured) = &self.measured {
            measured.send_if_modified(|known| {
                let more = known.at_least(used);
                std::mem::replace(known, more) != more
            });
            self.poke.notify_one();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        drop(self.measured.take());
        self.poke.notify_one();
    }
}

/// Tells the actor that somebody may have left the line.
struct LeavesLine(Arc<Notify>);

impl Drop for LeavesLine {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

impl Residency {
    /// Starts the actor. It ends when all handles are gone. Nothing is given out
    /// before the budget is known.
    pub fn start(rules: Rules, budget: impl Future<Output = Budget> + Send + 'static) -> Self {
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let poke = Arc::new(Notify::new());
        let view = actor::spawn(rules, budget, receiver, Arc::clone(&poke));
        Self {
            commands,
            poke,
            view,
        }
    }

    /// Waits its turn for memory, however long that takes; `tell` is told what
    /// is waited for whenever that changes. Dropping the future leaves the line.
    pub async fn acquire(
        &self,
        claim: Claim,
        tell: &(dyn Fn(&Wait) + Send + Sync),
    ) -> Result<Lease, Refused> {
        let (waits, mut told) = watch::channel(None);
        // Dropped after the answer's receiver, which says that nobody waits.
        let _leaves = LeavesLine(Arc::clone(&self.poke));
        let mut answer = self.line_up(claim, false, waits).await?;
        loop {
            tokio::select! {
                biased;
                lease = &mut answer => return lease.map_err(|_| Refused::Over)?,
                changed = told.changed() => {
                    let wait = told.borrow_and_update().clone();
                    match (changed, wait) {
                        (Ok(()), Some(wait)) => tell(&wait),
                        (Ok(()), None) => {}
                        // It was answered, or never will be.
                        (Err(_), _) => return answer.await.map_err(|_| Refused::Over)?,
                    }
                }
            }
        }
    }

    /// Memory that is free now, and that nobody waits for.
    pub async fn try_acquire(&self, claim: Claim) -> Result<Lease, Refused> {
        let (waits, _) = watch::channel(None);
        let answer = self.line_up(claim, true, waits).await?;
        answer.await.map_err(|_| Refused::Over)?
    }

    async fn line_up(
        &self,
        claim: Claim,
        at_once: bool,
        waits: watch::Sender<Option<Wait>>,
    ) -> Result<oneshot::Receiver<Result<Lease, Refused>>, Refused> {
        let (reply, answer) = oneshot::channel();
        let command = actor::Command {
            claim,
            at_once,
            waits,
            reply,
        };
        let sent = self.commands.send(command).await;
        sent.map_err(|_| Refused::Over)?;
        Ok(answer)
    }

    /// As last published.
    pub fn view(&self) -> MemoryView {
        self.view.borrow().clone()
    }
}
