//! Looks at the engine's slots while an answer that does not stream is waited for.
//!
//! Nothing comes of such an answer before it is whole, however long it takes, and
//! `/health` is answered by an engine that hangs. Its slots are shown by the loop
//! that does the work, and one that gets on is no hung one.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use worker_adapters_adapter_api::WorkerError;

use crate::client::EngineClient;
use crate::tagging::Tagging;
use crate::wire::{SlotAnswer, SlotProgress};

type Asking = Pin<Box<dyn Future<Output = Result<Vec<SlotAnswer>, WorkerError>> + Send>>;

/// How long one look may take. The engine answers between two batches.
const LOOK_LIMIT: Duration = Duration::from_mins(1);

/// What a look has shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// A slot has got on, and this is how far.
    Progress(SlotProgress),
    /// Nothing has moved, or nothing could be seen this time.
    Nothing,
    /// This engine does not show its slots.
    NotShown,
}

/// The looks of one task.
pub(crate) struct Looks {
    client: Arc<EngineClient>,
    /// Its slot's tag, where it is known by one; otherwise all slots count.
    tag: Option<u32>,
    due: Instant,
    asking: Option<Asking>,
    before: Vec<SlotProgress>,
}

impl Looks {
    pub(crate) fn new(client: Arc<EngineClient>, tag: Option<u32>) -> Self {
        Self {
            due: Instant::now() + client.settings.look_interval,
            client,
            tag,
            asking: None,
            before: Vec::new(),
        }
    }

    /// The next look, when it is due. May be dropped and called again without
    /// losing anything.
    pub(crate) async fn next(&mut self) -> Seen {
        if self.asking.is_none() {
            sleep_until(self.due).await;
        }
        let client = &self.client;
        let asking = self.asking.get_or_insert_with(|| {
            let client = Arc::clone(client);
            Box::pin(async move { client.get_within("/slots", LOOK_LIMIT).await })
        });
        let slots = asking.await;
        self.asking = None;
        self.due = Instant::now() + self.client.settings.look_interval;
        match slots {
            Ok(slots) => self.compare(&slots),
            // What an engine says that was told not to show its slots.
            Err(WorkerError::InvalidParams { .. }) => Seen::NotShown,
            Err(error) => {
                tracing::debug!(%error, "the engine's slots cannot be seen");
                Seen::Nothing
            }
        }
    }

    fn compare(&mut self, slots: &[SlotAnswer]) -> Seen {
        let ours = slots.iter().filter(|slot| {
            slot.is_processing && self.tag.is_none_or(|tag| Tagging::shows(slot, tag))
        });
        let now: Vec<SlotProgress> = ours.map(SlotAnswer::progress).collect();
        let moved = now.iter().find(|slot| !self.before.contains(slot)).copied();
        self.before = now;
        moved.map_or(Seen::Nothing, Seen::Progress)
    }
}
