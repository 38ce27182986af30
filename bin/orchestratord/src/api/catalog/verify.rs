//! `POST /v2/catalog/models/{name}/verify`: reads a whole model again.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::view::VerifiedView;
use crate::api::error::{ApiError, ErrorBody};
use crate::api::pools::requests::parse;
use crate::app::state::AppState;

/// What to do about a model that is spoilt. No body stands for all defaults.
#[derive(Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyRequest {
    /// Fetch again what is wrong with it.
    pub repair: bool,
}

/// Read all of a model again and compare. A spoilt one is marked and not used
/// again before it is mended. The answer comes when all is read; whoever sends
/// `Accept: text/event-stream` is sent `progress` meanwhile, and then `done` or
/// `error`. A client that goes away ends the work.
#[utoipa::path(
    post, path = "/v2/catalog/models/{name}/verify", tag = "catalog",
    params(("name" = String, Path, description = "As for GET")), request_body = Option<VerifyRequest>,
    responses(
        (status = 200, body = VerifiedView),
        (status = 400, body = ErrorBody),
        (status = 404, body = ErrorBody),
        (status = 429, description = "As many models are being read as may", body = ErrorBody),
        (status = 503, description = "It is spoilt and could not be mended", body = ErrorBody),
    )
)]
pub async fn verify(
    State(state): State<Arc<AppState>>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let Path(name) = path?;
    let request: VerifyRequest = parse(&body?)?;
    work::verify(&state, &name, request.repair, super::wants_events(&headers)).await
}

#[cfg(feature = "provisioning")]
mod work {
    use std::sync::Arc;
    use std::time::Duration;

    use axum::Json;
    use axum::body::Body;
    use axum::response::{IntoResponse, Response};
    use jiff::Timestamp;
    use llama_orch_types::ErrorCode;
    use provision_kit::progress::{Reporter, Silent};
    use tokio_util::task::AbortOnDropHandle;

    use super::{ApiError, AppState, VerifiedView};
    use crate::api::streams::EVENT_STREAM;
    use crate::runtimes::apart;
    use crate::services::event_log::Failure;
    use crate::services::streaming::KEEP_ALIVE;
    use crate::services::watched::meter::Meter;
    use crate::services::watched::stream::Watchable;
    use crate::services::watched::{Standing, Work, measured, stream};

    /// When a client that found no place shall come back.
    const COME_BACK: Duration = Duration::from_secs(5);

    /// A model that is being read.
    #[derive(Debug)]
    struct Verification {
        work: Arc<Work<VerifiedView>>,
        /// Ends the work with its last reader.
        _job: AbortOnDropHandle<()>,
    }

    impl Watchable for Verification {
        type Result = VerifiedView;
        type End = Option<VerifiedView>;

        fn work(&self) -> &Work<VerifiedView> {
            &self.work
        }

        fn end(&self, standing: &Standing<VerifiedView>) -> Option<VerifiedView> {
            standing.result.clone()
        }
    }

    pub(super) async fn verify(
        state: &AppState,
        name: &str,
        repair: bool,
        watched: bool,
    ) -> Result<Response, ApiError> {
        let entry = state.models.entry(name).await;
        let entry = entry.map_err(|error| Failure::from_models(&error))?;
        let Ok(place) = Arc::clone(&state.verifying).try_acquire_owned() else {
            return Err(no_place().into());
        };
        let work = Arc::new(Work::new(Timestamp::now()));
        let meter = Meter::new(Arc::new(Silent));
        let models = state.models.beside(meter.clone() as Arc<dyn Reporter>);
        let of_job = Arc::clone(&work);
        let name = entry.record.path.display().to_string();
        let job = async move {
            let _place = place;
            of_job.begin();
            let reading = Box::pin(async move { models.verify(&name, repair).await });
            let verified = measured(&of_job, &meter, apart(reading)).await;
            let verified = verified.map(VerifiedView::from);
            of_job.end(verified.map_err(|error| Failure::from_models(&error)));
        };
        let verification = Arc::new(Verification {
            work,
            _job: AbortOnDropHandle::new(tokio::spawn(job)),
        });
        if watched {
            let events = stream::events(verification, 0, KEEP_ALIVE);
            return Ok((EVENT_STREAM, Body::from_stream(events)).into_response());
        }
        let mut standing = verification.work.watch();
        let over = standing.wait_for(|standing| standing.progress.state.is_over());
        // The sender lives in `verification`.
        let over = over.await.map_err(|_| broke_off())?.clone();
        match (over.result, over.error) {
            (Some(verified), _) => Ok(Json(verified).into_response()),
            (None, error) => Err(error.unwrap_or_else(broke_off).into()),
        }
    }

    fn broke_off() -> Failure {
        Failure::internal("the verification broke off")
    }

    fn no_place() -> Failure {
        let mut failure = Failure::new(
            ErrorCode::AdmissionReject,
            "two models are being read already, as many as may",
        )
        .retry_after(COME_BACK);
        failure.policy_label = Some("verifications".to_owned());
        failure
    }
}

/// A build without provisioning keeps no models.
#[cfg(not(feature = "provisioning"))]
mod work {
    use axum::response::Response;

    use super::{ApiError, AppState};
    use crate::services::event_log::Failure;

    #[allow(clippy::unused_async, reason = "the same shape in both builds")]
    pub(super) async fn verify(
        _: &AppState,
        _: &str,
        _: bool,
        _: bool,
    ) -> Result<Response, ApiError> {
        Err(Failure::no_models_in_this_build().into())
    }
}
