//! `/health`: is the daemon alive, and how far is it? Needs no token.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::tasks::Preparation;
use crate::app::state::AppState;
use crate::services::pool::Phase;

/// How the whole daemon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every pool is ready.
    Ok,
    /// Some pool is being made ready.
    Preparing,
    /// Some pool has failed or is stopped.
    Degraded,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Health {
    pub status: Status,
    pub pools: BTreeMap<String, PoolBrief>,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct PoolBrief {
    pub state: Phase,
    pub preparation: Preparation,
}

/// Always 200 while the daemon lives; the body tells about the pools.
#[utoipa::path(get, path = "/health", tag = "health", responses((status = 200, body = Health)))]
pub async fn health(State(state): State<Arc<AppState>>) -> Json<Health> {
    let pools = state.pools.get();
    let pools: BTreeMap<_, _> = pools
        .iter()
        .map(|(id, pool)| {
            let brief = PoolBrief {
                state: pool.snapshot().phase,
                preparation: Preparation::of(pool),
            };
            (id.to_string(), brief)
        })
        .collect();
    let status = status_of(pools.values().map(|pool| pool.state));
    Json(Health { status, pools })
}

fn status_of(phases: impl Iterator<Item = Phase>) -> Status {
    phases.fold(Status::Ok, |status, phase| match (status, phase) {
        (Status::Degraded, _) | (_, Phase::Failed | Phase::Stopped) => Status::Degraded,
        (Status::Ok, Phase::Ready) => Status::Ok,
        _ => Status::Preparing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_pool_decides() {
        assert_eq!(
            status_of([Phase::Ready, Phase::Ready].into_iter()),
            Status::Ok
        );
        assert_eq!(
            status_of([Phase::Ready, Phase::Starting].into_iter()),
            Status::Preparing
        );
        assert_eq!(
            status_of([Phase::Failed, Phase::Starting, Phase::Ready].into_iter()),
            Status::Degraded
        );
    }
}
