//! `/v1/models`: what can be asked for by name.

use std::sync::Arc;
use std::time::SystemTime;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::errors::OpenAiError;
use crate::api::error::ApiError;
use crate::app::state::AppState;
use crate::services::pool::{Phase, PoolHandle};

/// All models, in the shape that the clients of `OpenAI` and of Anthropic read.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: String,
    pub data: Vec<ModelEntry>,
    /// False: all are told at once.
    pub has_more: bool,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
}

/// One configured pool, as a model that can be asked for.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelEntry {
    /// The pool's id.
    pub id: String,
    /// `model`.
    pub object: String,
    /// `model`, which is Anthropic's word for the same.
    #[serde(rename = "type")]
    pub kind: String,
    /// The id again, for Anthropic's clients.
    pub display_name: String,
    /// When this server started, in seconds since the Unix epoch: a pool was not
    /// there before.
    pub created: u64,
    /// The same, as RFC 3339 has it.
    pub created_at: String,
    /// The kind of engine that serves it.
    pub owned_by: String,
    /// Further names.
    pub aliases: Vec<String>,
    pub state: Phase,
    /// What the pool serves, as the configuration names it.
    pub model: String,
    /// Context length of one slot, in tokens; absent while it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ctx: Option<u32>,
    /// Facts about the model's file; absent while no engine has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<ModelMeta>,
}

/// Facts about a model's file, called as llama-server calls them.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelMeta {
    /// Bytes.
    pub size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_params: Option<u64>,
    /// The longest context that it was trained for, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub n_ctx_train: Option<u32>,
    /// The quantisation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ftype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    pub sha256: String,
}

impl ModelEntry {
    fn of(pool: &PoolHandle, started_at: SystemTime) -> Self {
        let snapshot = pool.snapshot();
        let settings = &snapshot.settings;
        let context = snapshot.context.as_ref();
        let meta = context.and_then(|context| context.model.as_ref());
        // Fails only where the clock is thousands of years off.
        let created = Timestamp::try_from(started_at).unwrap_or_default();
        let id = settings.id.to_string();
        Self {
            display_name: id.clone(),
            id,
            object: "model".to_owned(),
            kind: "model".to_owned(),
            created: u64::try_from(created.as_second()).unwrap_or_default(),
            created_at: format!("{created:.0}"),
            owned_by: settings.engine.to_string(),
            aliases: settings.config.aliases.clone(),
            state: snapshot.phase,
            model: settings.model.clone(),
            ctx: context.map(|context| context.ctx).or(settings.config.ctx),
            meta: meta.map(|model| ModelMeta {
                size: model.size_bytes,
                n_params: model.parameter_count,
                n_ctx_train: model.ctx_max,
                ftype: model.quantization.clone(),
                architecture: model.architecture.clone(),
                sha256: model.digest.to_string(),
            }),
        }
    }
}

/// List the models that can be asked for: all configured pools, whatever their
/// state.
#[utoipa::path(
    get, path = "/v1/models", tag = "clients",
    operation_id = "list_models",
    responses((status = 200, body = ModelList))
)]
pub async fn list(State(state): State<Arc<AppState>>) -> Json<ModelList> {
    let pools = state.pools.get();
    let data: Vec<ModelEntry> = pools
        .values()
        .map(|pool| ModelEntry::of(pool, state.started_at))
        .collect();
    Json(ModelList {
        object: "list".to_owned(),
        has_more: false,
        first_id: data.first().map(|model| model.id.clone()),
        last_id: data.last().map(|model| model.id.clone()),
        data,
    })
}

/// Look at one model, by any name that a request may call it.
#[utoipa::path(
    get, path = "/v1/models/{id}", tag = "clients",
    operation_id = "show_model",
    params(("id" = String, Path, description = "A pool's id, an alias, or a model; slashes as `%2F`")),
    responses((status = 200, body = ModelEntry), (status = 404, body = OpenAiError))
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelEntry>, ApiError> {
    let Path(id) = path?;
    let pool = state.pool_named(Some(&id))?;
    Ok(Json(ModelEntry::of(&pool, state.started_at)))
}
