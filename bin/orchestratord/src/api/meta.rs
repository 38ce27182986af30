//! `/v2/meta/capabilities`: what answers here, down to the digests.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::pools::PoolView;
use crate::app::state::AppState;

/// What this daemon is and what its pools run.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Capabilities {
    pub api_version: String,
    pub version: String,
    /// Cargo features of this build.
    pub features: Vec<String>,
    /// `REQUIRE_REAL_LLAMA` is set: nothing but a real engine may answer.
    pub require_real_llama: bool,
    pub uptime_ms: u64,
    pub pools: Vec<PoolView>,
}

/// The cargo features of this build.
pub fn features() -> Vec<String> {
    let all = [
        ("provisioning", cfg!(feature = "provisioning")),
        ("env-shim", cfg!(feature = "env-shim")),
        ("mock-adapter", cfg!(feature = "mock-adapter")),
    ];
    all.into_iter()
        .filter(|(_, on)| *on)
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// What answers here: engine builds, model digests, provisioning modes.
#[utoipa::path(get, path = "/v2/meta/capabilities", tag = "meta", responses((status = 200, body = Capabilities)))]
pub async fn capabilities(State(state): State<Arc<AppState>>) -> Json<Capabilities> {
    Json(Capabilities {
        api_version: "v2".to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        features: features(),
        require_real_llama: state.real_only,
        uptime_ms: state.started.elapsed().as_millis() as u64,
        pools: state.pools.get().values().map(PoolView::brief).collect(),
    })
}
