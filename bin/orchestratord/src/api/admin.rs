//! `/v2/admin`: what an operator does to the daemon as a whole.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::{ApiError, ErrorBody};
use super::pools::requests::parse;
use crate::app::reload::ReloadReport;
use crate::app::state::AppState;

/// Asks for the configuration to be read again. No body stands for all
/// defaults.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdminReload {
    /// Only say what would be done.
    pub dry_run: bool,
}

/// Read the configuration again and do what changed. A dry run answers 200
/// with what would be done; else the answer is 202, and GET says how far it
/// is. A wrong configuration changes nothing.
#[utoipa::path(
    post, path = "/v2/admin/reload", tag = "admin",
    request_body = Option<AdminReload>,
    responses(
        (status = 200, description = "What would be done", body = ReloadReport),
        (status = 202, description = "What is being done", body = ReloadReport),
        (status = 400, description = "The request or the configuration is wrong", body = ErrorBody),
        (status = 409, description = "Another reload goes on", body = ErrorBody),
    )
)]
pub async fn reload(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<(StatusCode, Json<ReloadReport>), ApiError> {
    let request: AdminReload = parse(&body?)?;
    let report = state.reloads.reload(request.dry_run).await?;
    let status = if request.dry_run {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    Ok((status, Json(report)))
}

/// The last reload, as far as it is.
#[utoipa::path(get, path = "/v2/admin/reload", tag = "admin", responses((status = 200, body = ReloadReport)))]
pub async fn show(State(state): State<Arc<AppState>>) -> Json<ReloadReport> {
    Json(state.reloads.last())
}
