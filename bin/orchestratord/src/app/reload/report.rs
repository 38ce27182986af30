//! What a reload does, as it is told to clients and to people.

use std::time::SystemTime;

use llama_orch_types::PoolId;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::api::pools::rfc3339;
use crate::app::config::difference::{Difference, PoolChange, SettingChange};
use crate::app::config::{Config, Place, shown_model};
use crate::services::event_log::Failure;

/// Where a reload stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReloadStage {
    /// There was none since the daemon's start.
    #[default]
    None,
    /// A dry run: this would be done.
    Planned,
    Running,
    Done,
    /// Some pool was rolled back, or has failed.
    Failed,
}

/// What a reload does, or would do.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ReloadReport {
    /// Counts the reloads since the daemon's start; a dry run is none.
    pub id: u64,
    pub state: ReloadStage,
    /// The file that was read; none if everything is at its default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config: Option<String>,
    /// All pools, those that do not change included.
    pub pools: Vec<PoolReport>,
    /// Whether another token opens the routes from now on.
    pub token_changed: bool,
    /// Settings of the daemon that are taken over.
    pub applied: Vec<SettingChange>,
    /// Settings that keep their old value until the daemon is restarted.
    pub needs_restart: Vec<SettingChange>,
    /// A configuration that was refused after this reload, and so changed nothing.
    /// Gone with the next one that is taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<RefusedReload>,
}

/// A configuration that could not be taken over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RefusedReload {
    /// When it was read, as RFC 3339 has it, in UTC.
    pub at: String,
    pub error: Failure,
    /// The file with the mistake, where one is to blame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Counts from 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl RefusedReload {
    /// One that has just been read.
    pub(super) fn now(error: Failure, place: Option<Place>) -> Self {
        let file = place.as_ref().and_then(|place| place.file.as_ref());
        let line = place.as_ref().and_then(|place| place.line);
        Self {
            at: rfc3339(SystemTime::now()),
            error,
            file: file.map(|file| file.display().to_string()),
            line: line.map(|line| line as u64),
            key: place.map(|place| place.key).filter(|key| !key.is_empty()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    Added,
    Removed,
    /// It gets a new engine.
    Reloaded,
    /// Its engine goes on.
    Changed,
    Unchanged,
}

/// How far a pool's change is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum PoolProgress {
    Planned,
    /// It is drained, stopped or started.
    Working,
    Done,
    /// The new engine failed, and the old settings are in force again.
    RolledBack,
    Failed,
}

/// What happens to one pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PoolReport {
    pub pool_id: String,
    pub change: ChangeKind,
    pub state: PoolProgress,
    /// The model it serves, or did before it was removed.
    pub model: String,
    pub settings: Vec<SettingChange>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Failure>,
}

impl ReloadReport {
    pub(super) fn of(difference: &Difference, old: &Config, new: &Config) -> Self {
        let mut pools: Vec<&PoolId> = old.pools.keys().chain(new.pools.keys()).collect();
        pools.sort_unstable();
        pools.dedup();
        let report = |id: &PoolId| {
            let (change, settings) = match difference.pools.get(id) {
                None => (ChangeKind::Unchanged, Vec::new()),
                Some(PoolChange::Added(_)) => (ChangeKind::Added, Vec::new()),
                Some(PoolChange::Removed) => (ChangeKind::Removed, Vec::new()),
                Some(PoolChange::Reloaded(_, settings)) => (ChangeKind::Reloaded, settings.clone()),
                Some(PoolChange::Changed(_, settings)) => (ChangeKind::Changed, settings.clone()),
            };
            let pool = new.pools.get(id).or_else(|| old.pools.get(id));
            PoolReport {
                pool_id: id.to_string(),
                change,
                state: PoolProgress::Planned,
                model: pool
                    .map(|pool| shown_model(&pool.model))
                    .unwrap_or_default(),
                settings,
                error: None,
            }
        };
        Self {
            pools: pools.into_iter().map(report).collect(),
            applied: difference.applied.clone(),
            needs_restart: difference.needs_restart.clone(),
            ..Self::default()
        }
    }

    /// Notes how far a pool is.
    pub(super) fn note(&mut self, pool: &PoolId, state: PoolProgress, error: Option<Failure>) {
        let mut pools = self.pools.iter_mut();
        if let Some(report) = pools.find(|report| report.pool_id == pool.as_str()) {
            report.state = state;
            report.error = error;
        }
    }

    /// Whether any pool did not become what the file says.
    pub(super) fn has_failed(&self) -> bool {
        let failed = |pool: &PoolReport| {
            matches!(pool.state, PoolProgress::RolledBack | PoolProgress::Failed)
        };
        self.pools.iter().any(failed)
    }

    /// For people, one line for each pool and each setting.
    pub fn lines(&self) -> Vec<String> {
        let mut lines: Vec<String> = self.pools.iter().map(PoolReport::line).collect();
        lines.extend(
            self.applied
                .iter()
                .map(|change| format!("daemon: {change}")),
        );
        if self.token_changed {
            lines.push("daemon: the token changed".to_owned());
        }
        lines
    }

    /// What the file says and the daemon does not do, one line each.
    pub fn warnings(&self) -> Vec<String> {
        let warning = |change: &SettingChange| format!("{change} needs a restart of the daemon");
        self.needs_restart.iter().map(warning).collect()
    }
}

impl PoolReport {
    fn line(&self) -> String {
        let settings: Vec<String> = self.settings.iter().map(ToString::to_string).collect();
        let settings = settings.join(", ");
        let what = match self.change {
            ChangeKind::Added => format!("added: model {}", self.model),
            ChangeKind::Removed => "removed (drained)".to_owned(),
            ChangeKind::Reloaded => format!("reloaded: {settings}"),
            ChangeKind::Changed => format!("changed without restart: {settings}"),
            ChangeKind::Unchanged => "unchanged".to_owned(),
        };
        let ending = match self.state {
            PoolProgress::RolledBack => "rolled back",
            PoolProgress::Failed => "failed",
            PoolProgress::Planned | PoolProgress::Working | PoolProgress::Done => "",
        };
        let error = self.error.as_ref().map(|error| error.message.as_str());
        match (ending, error) {
            ("", _) => format!("pool {}: {what}", self.pool_id),
            (ending, None) => format!("pool {}: {ending}; {what}", self.pool_id),
            (ending, Some(error)) => format!("pool {}: {ending}; {what}; {error}", self.pool_id),
        }
    }
}
