//! `/v2/catalog/models`: the models on this machine.
//!
//! A model is named by its digest, whole or shortened, by anything it was asked
//! for as, by a profile or by its file's name. In a path a `/` is written `%2F`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};

use super::conflict;
use super::view::{ModelView, ModelsView, RemovedView};
use crate::api::error::{ApiError, ErrorBody};
use crate::app::state::AppState;

/// The models on this machine.
#[utoipa::path(
    get, path = "/v2/catalog/models", tag = "catalog",
    responses((status = 200, body = ModelsView), (status = 503, body = ErrorBody))
)]
pub async fn list(State(state): State<Arc<AppState>>) -> Result<Json<ModelsView>, ApiError> {
    let models = work::list(&state).await?;
    Ok(Json(ModelsView { models }))
}

/// Look at a model.
#[utoipa::path(
    get, path = "/v2/catalog/models/{name}", tag = "catalog",
    params(("name" = String, Path, description = "Digest or its first digits, reference, profile or file name; `/` is written `%2F`")),
    responses(
        (status = 200, body = ModelView),
        (status = 400, description = "Several models may be meant", body = ErrorBody),
        (status = 404, body = ErrorBody),
    )
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<ModelView>, ApiError> {
    let Path(name) = path?;
    Ok(Json(work::show(&state, &name).await?))
}

/// Remove a model from the store, with all that is known about it. A file that
/// lies elsewhere is only forgotten. 409 while a pool or another program uses it;
/// pools that are only configured with it fetch it again when they are loaded.
#[utoipa::path(
    delete, path = "/v2/catalog/models/{name}", tag = "catalog",
    params(("name" = String, Path, description = "As for GET")),
    responses(
        (status = 200, body = RemovedView),
        (status = 400, description = "Several models may be meant", body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 409, description = "It is in use", body = ErrorBody),
    )
)]
pub async fn remove(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Json<RemovedView>, ApiError> {
    let Path(name) = path?;
    let removed = work::remove(&state, &name).await.map_err(conflict)?;
    Ok(Json(removed))
}

#[cfg(feature = "provisioning")]
mod work {
    use llama_orch_types::{EngineKind, ErrorCode};
    use provisioners_model_provisioner::{ModelEntry, ModelError};

    use super::{AppState, ModelView, RemovedView};
    use crate::services::event_log::Failure;

    fn failure(error: &ModelError) -> Failure {
        Failure::from_models(error)
    }

    pub(super) async fn list(state: &AppState) -> Result<Vec<ModelView>, Failure> {
        let entries = state.models.entries().await;
        let entries = entries.map_err(|error| failure(&error))?;
        let view = |entry| view(state, entry);
        Ok(entries.into_iter().map(view).collect())
    }

    pub(super) async fn show(state: &AppState, name: &str) -> Result<ModelView, Failure> {
        let entry = state.models.entry(name).await;
        Ok(view(state, entry.map_err(|error| failure(&error))?))
    }

    pub(super) async fn remove(state: &AppState, name: &str) -> Result<RemovedView, Failure> {
        let entry = state.models.entry(name).await;
        let entry = entry.map_err(|error| failure(&error))?;
        let serving = serving(state, &entry);
        if !serving.is_empty() {
            return Err(in_use(&entry, &serving));
        }
        // By what cannot be mistaken, since others may have come meanwhile.
        let exactly = entry.record.path.display().to_string();
        match state.models.remove(&exactly).await {
            Ok(removed) => Ok(RemovedView {
                fetched_again_by: if entry.stored {
                    used_by(state, &entry)
                } else {
                    Vec::new()
                },
                ..RemovedView::from(removed)
            }),
            // A pool that is on its way, or that was served by it and may be again.
            Err(ModelError::InUse { .. }) => Err(in_use(&entry, &used_by(state, &entry))),
            Err(error) => Err(failure(&error)),
        }
    }

    fn in_use(entry: &ModelEntry, pools: &[String]) -> Failure {
        let name = entry.profiles.first().unwrap_or(&entry.record.source);
        let (who, hint) = match pools {
            [] => (
                "another program of this machine, or an engine that still ends, uses it".to_owned(),
                "try again when it is done".to_owned(),
            ),
            [pool] => (
                format!("pool {pool} uses it"),
                format!("take pool {pool} out of the configuration, or give it another model"),
            ),
            pools => (
                format!("the pools {} use it", pools.join(", ")),
                "take them out of the configuration, or give them another model".to_owned(),
            ),
        };
        let message = format!("the model {name} is not removed: {who}");
        let mut failure = Failure::new(ErrorCode::AdmissionReject, message)
            .with_hint(hint)
            .retriable();
        failure.pool_id = pools.first().cloned();
        failure
    }

    pub(super) fn view(state: &AppState, entry: ModelEntry) -> ModelView {
        let used_by = used_by(state, &entry);
        ModelView::new(entry, used_by)
    }

    /// Pools whose engine has the model now.
    fn serving(state: &AppState, entry: &ModelEntry) -> Vec<String> {
        let pools = state.pools.get();
        let has_it = pools.iter().filter(|(_, pool)| {
            let context = pool.snapshot().context.clone();
            let model = context.as_ref().and_then(|context| context.model.as_ref());
            model.is_some_and(|model| model.path == entry.record.path)
        });
        has_it.map(|(id, _)| id.to_string()).collect()
    }

    /// Those, and pools that are configured to.
    fn used_by(state: &AppState, entry: &ModelEntry) -> Vec<String> {
        let mut ids = serving(state, entry);
        for (id, pool) in state.pools.get().iter() {
            let id = id.to_string();
            let settings = pool.settings();
            // What runs elsewhere has its model there.
            if settings.engine != EngineKind::Openai
                && !ids.contains(&id)
                && state
                    .models
                    .is_called(&entry.record, &settings.config.model)
            {
                ids.push(id);
            }
        }
        ids.sort();
        ids
    }
}

/// A build without provisioning keeps no models.
#[cfg(not(feature = "provisioning"))]
#[allow(clippy::unused_async, reason = "the same shape in both builds")]
mod work {
    use super::{AppState, ModelView, RemovedView};
    use crate::services::event_log::Failure;

    pub(super) async fn list(_: &AppState) -> Result<Vec<ModelView>, Failure> {
        Ok(Vec::new())
    }

    pub(super) async fn show(_: &AppState, _: &str) -> Result<ModelView, Failure> {
        Err(Failure::no_models_in_this_build())
    }

    pub(super) async fn remove(_: &AppState, _: &str) -> Result<RemovedView, Failure> {
        Err(Failure::no_models_in_this_build())
    }
}
