//! `/v2/catalog/models`: the models on this machine.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use crate::app::state::AppState;

/// A verified model file.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelView {
    pub digest: String,
    pub path: String,
    pub size_bytes: u64,
    /// Everything it was asked for as: profiles and model references.
    pub references: Vec<String>,
    /// The reference that served it.
    pub source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameter_count: Option<u64>,
    /// The longest context, in tokens, that it was trained for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctx_max: Option<u32>,
    pub verified_at: String,
    pub last_used: String,
}

#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelsView {
    /// Most recently used first.
    pub models: Vec<ModelView>,
}

/// The models on this machine.
#[utoipa::path(
    get, path = "/v2/catalog/models", tag = "catalog",
    responses((status = 200, body = ModelsView), (status = 500, body = ErrorBody))
)]
pub async fn models(State(state): State<Arc<AppState>>) -> Result<Json<ModelsView>, ApiError> {
    Ok(Json(ModelsView {
        models: list(&state).await?,
    }))
}

#[cfg(feature = "provisioning")]
async fn list(state: &AppState) -> Result<Vec<ModelView>, ApiError> {
    use crate::services::event_log::Failure;
    use provision_kit::chain::one_line;

    let records = state.models.list().await;
    let records = records.map_err(|error| Failure::internal(one_line(&error)))?;
    Ok(records.into_iter().map(ModelView::from).collect())
}

/// A build without provisioning keeps no models.
#[cfg(not(feature = "provisioning"))]
#[allow(clippy::unused_async, reason = "the same shape in both builds")]
async fn list(_: &AppState) -> Result<Vec<ModelView>, ApiError> {
    Ok(Vec::new())
}

#[cfg(feature = "provisioning")]
impl From<provisioners_model_provisioner::ModelRecord> for ModelView {
    fn from(record: provisioners_model_provisioner::ModelRecord) -> Self {
        Self {
            digest: record.digest.to_string(),
            path: record.path.display().to_string(),
            size_bytes: record.stamp.size_bytes,
            references: record.references.into_iter().collect(),
            source: record.source,
            architecture: record.facts.architecture,
            quantization: record.facts.quantization,
            parameter_count: record.facts.parameter_count,
            ctx_max: record.facts.ctx_max,
            verified_at: record.verified_at.to_string(),
            last_used: record.last_used.to_string(),
        }
    }
}
