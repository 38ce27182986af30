//! `/health`: is the daemon alive, and how far is it? Needs no token.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::pools::loads_on_demand;
use super::tasks::Preparation;
use crate::app::state::AppState;
use crate::services::pool::Phase;

/// How the whole daemon does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Every pool is ready, or loads its engine when it is asked for.
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
    let mut standings = Vec::new();
    let pools: BTreeMap<_, _> = pools
        .iter()
        .map(|(id, pool)| {
            let snapshot = pool.snapshot();
            let on_demand = loads_on_demand(&snapshot);
            let brief = PoolBrief {
                state: snapshot.phase,
                preparation: Preparation::of(pool),
            };
            standings.push((snapshot.phase, on_demand));
            (id.to_string(), brief)
        })
        .collect();
    let status = status_of(standings.into_iter());
    Json(Health { status, pools })
}

/// By where each pool stands, and whether it loads its engine on demand from there.
fn status_of(pools: impl Iterator<Item = (Phase, bool)>) -> Status {
    pools.fold(Status::Ok, |status, pool| match (status, pool) {
        (Status::Degraded, _) | (_, (Phase::Failed | Phase::Stopped, _)) => Status::Degraded,
        (Status::Ok, (Phase::Ready, _) | (_, true)) => Status::Ok,
        _ => Status::Preparing,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_pool_decides() {
        let status = |pools: &[(Phase, bool)]| status_of(pools.iter().copied());
        let plain = |phase| (phase, false);
        let ready = plain(Phase::Ready);
        assert_eq!(status(&[ready, ready]), Status::Ok);
        let starting = plain(Phase::Starting);
        assert_eq!(status(&[ready, starting]), Status::Preparing);
        let failed = plain(Phase::Failed);
        assert_eq!(status(&[failed, starting, ready]), Status::Degraded);
    }

    #[test]
    fn a_pool_that_loads_on_demand_is_well() {
        for phase in [Phase::Unloaded, Phase::Draining, Phase::Stopping] {
            assert_eq!(status_of([(phase, true)].into_iter()), Status::Ok);
        }
        let drained = [(Phase::Draining, false)];
        assert_eq!(status_of(drained.into_iter()), Status::Preparing);
    }
}
