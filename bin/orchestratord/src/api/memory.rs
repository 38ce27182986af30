//! `/v2/memory`: the budget, who has of it, and who waits.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;

use crate::app::state::AppState;
use crate::services::residency::MemoryView;

/// How memory is given out to the pools' engines.
#[utoipa::path(get, path = "/v2/memory", tag = "pools", responses((status = 200, body = MemoryView)))]
pub async fn show(State(state): State<Arc<AppState>>) -> Json<MemoryView> {
    Json(state.residency.view())
}
