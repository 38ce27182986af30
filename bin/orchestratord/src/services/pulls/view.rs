//! A pull as clients see it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::services::event_log::Failure;
use crate::services::watched::{Progress, Standing, Work};

/// The model that a pull brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PulledModel {
    pub digest: String,
    pub path: String,
    pub size_bytes: u64,
}

/// A pull as it is now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PullView {
    pub pull_id: String,
    /// What is pulled: a profile or a reference, without what may be secret.
    pub model: String,
    /// When it was asked for first (RFC 3339).
    pub created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// How many pulls go first, while it is queued.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_position: Option<u64>,
    #[serde(flatten)]
    pub progress: Progress,
    /// What is here now, once it is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<PulledModel>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
    /// Where its progress can be read as server-sent events.
    pub events: String,
}

/// A pull, for its owner and its readers.
#[derive(Debug)]
pub struct Pull {
    pub id: String,
    /// See [`PullView::model`].
    pub model: String,
    pub work: Work<PulledModel>,
}

impl Pull {
    pub fn new(id: String, model: String, created_at: Timestamp) -> Self {
        Self {
            id,
            model,
            work: Work::new(created_at),
        }
    }

    pub fn view(&self, standing: &Standing<PulledModel>, queue_position: Option<u64>) -> PullView {
        PullView {
            pull_id: self.id.clone(),
            model: self.model.clone(),
            created_at: self.work.created_at.to_string(),
            ended_at: standing.ended_at.map(|at| at.to_string()),
            queue_position,
            progress: standing.progress.clone(),
            result: standing.result.clone(),
            error: standing.error.clone(),
            events: format!("/v2/catalog/pulls/{}/events", self.id),
        }
    }
}
