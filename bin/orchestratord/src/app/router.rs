//! The routes, and what every request passes through: the correlation id
//! (outermost, so that every answer has one), then the net for panics, then the
//! token, then the route.

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa::OpenApi;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{Content, OpenApi as OpenApiDescription, Ref, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::config::Limits;
use super::state::AppState;
use crate::api::dialect::Dialect;
use crate::api::error::ApiError;
use crate::api::ollama::errors::OllamaError;
use crate::api::openai::errors::{AnthropicError, OpenAiError};
use crate::api::pools::requests;
use crate::api::streams::{self, StreamCounts};
use crate::api::{
    admin, auth, catalog, correlation, health, memory, meta, metrics, ollama, openai, panics,
    pools, tasks,
};
use crate::runtimes::blocking;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "orchestratord",
        description = "Turns a bare machine into a working LLM endpoint: tasks in, tokens out over SSE."
    ),
    tags(
        (name = "tasks", description = "Submit, read and cancel tasks"),
        (name = "pools", description = "What serves, and how it is"),
        (name = "catalog", description = "Models on this machine and on their way to it"),
        (name = "admin", description = "Change the configuration while it runs"),
        (name = "clients", description = "For clients of OpenAI's and Anthropic's APIs"),
        (name = "ollama", description = "For clients of Ollama's API"),
        (name = "meta", description = "What answers here"),
        (name = "health", description = "For supervisors and monitoring"),
    ),
    components(schemas(OpenAiError, AnthropicError, OllamaError))
)]
struct Description;

fn described_routes(streams: Arc<StreamCounts>) -> OpenApiRouter<Arc<AppState>> {
    let streaming = OpenApiRouter::new()
        .routes(routes!(tasks::events))
        .merge(openai::call_routes().into())
        .routes(routes!(ollama::calls::chat))
        .routes(routes!(ollama::calls::generate))
        .routes(routes!(ollama::embed::embed))
        .routes(routes!(ollama::embed::embeddings))
        .routes(routes!(catalog::pulls::events))
        .route_layer(from_fn_with_state(streams, streams::bounded));
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(health::health))
        .routes(routes!(metrics::metrics))
        .routes(routes!(tasks::submit))
        .routes(routes!(tasks::show))
        .merge(streaming)
        .routes(routes!(tasks::cancel))
        .routes(routes!(pools::list))
        .routes(routes!(pools::show))
        .routes(routes!(pools::health))
        .routes(routes!(requests::start))
        .routes(routes!(requests::stop))
        .routes(routes!(requests::unload))
        .routes(routes!(requests::drain))
        .routes(routes!(requests::resume))
        .routes(routes!(requests::reload))
        .routes(routes!(memory::show))
        .routes(routes!(meta::capabilities))
        .routes(routes!(catalog::models::list))
        .routes(routes!(catalog::models::show, catalog::models::remove))
        .routes(routes!(catalog::verify::verify))
        .routes(routes!(catalog::pulls::begin, catalog::pulls::list))
        .routes(routes!(catalog::pulls::show, catalog::pulls::cancel))
        .routes(routes!(admin::reload, admin::show))
        .routes(routes!(openai::models::list))
        .routes(routes!(openai::models::show))
        .routes(routes!(ollama::routes::root))
        .routes(routes!(ollama::routes::version))
        .routes(routes!(ollama::routes::pull))
        .routes(routes!(ollama::models::tags))
        .routes(routes!(ollama::models::show))
        .routes(routes!(ollama::models::ps))
        .merge(ollama::routes::not_offered().into())
}

/// Adds what holds for many routes: the token, and what may be answered before
/// a handler is reached.
fn complete(mut description: OpenApiDescription) -> OpenApiDescription {
    let token = SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer));
    description
        .components
        .get_or_insert_default()
        .add_security_scheme("token", token);
    openai::describe(&mut description);
    for (path, item) in &mut description.paths.paths {
        if path == "/health" {
            continue;
        }
        let error_schema = Dialect::of(path).error_schema();
        let operations = [&mut item.get, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            let takes_body = operation.request_body.is_some();
            operation.security = Some(vec![
                SecurityRequirement::default(),
                SecurityRequirement::new("token", [""; 0]),
            ]);
            let early = [
                ("401", "A token is configured, and it is missing or wrong"),
                (
                    "403",
                    "No token is configured, and a web page or another host asks",
                ),
            ];
            let of_a_body = [
                ("408", "The body did not come in time"),
                ("413", "The body is too large"),
            ];
            let body_errors = of_a_body.into_iter().filter(|_| takes_body);
            for (status, why) in early.into_iter().chain(body_errors) {
                let content = Content::new(Some(Ref::from_schema_name(error_schema)));
                let answer = ResponseBuilder::new()
                    .description(why)
                    .content("application/json", content);
                let responses = &mut operation.responses.responses;
                responses
                    .entry(status.to_owned())
                    .or_insert_with(|| answer.build().into());
            }
        }
    }
    description
}

/// The description that `/openapi.json` serves, made from the handlers.
pub fn openapi() -> OpenApiDescription {
    complete(
        described_routes(StreamCounts::new(Limits::default()))
            .split_for_parts()
            .1,
    )
}

pub fn router(state: Arc<AppState>) -> Router {
    let streams = StreamCounts::new(state.limits.clone());
    // The description takes megabytes and is asked for hardly ever: it is made when
    // it is.
    let (routes, _) = described_routes(streams).split_for_parts();
    routes
        .route("/openapi.json", get(described))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(state.max_body_bytes))
        .layer(from_fn_with_state(Arc::clone(&state), every_request))
        .with_state(state)
}

/// What every request passes through. One layer, since each makes a copy of all that
/// is within it for every request.
async fn every_request(
    State(state): State<Arc<AppState>>,
    request: Request,
    next: Next,
) -> Response {
    let admitted = async |request| match auth::check(&state, &request) {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };
    let answered = async |request| panics::caught(admitted(request)).await;
    correlation::correlate(&state, request, answered).await
}

/// Made off the serving thread: it takes milliseconds.
async fn described() -> impl IntoResponse {
    // A tree of texts, which JSON always holds.
    let body = blocking(|| serde_json::to_vec(&openapi()).unwrap_or_default()).await;
    ([(CONTENT_TYPE, "application/json")], body)
}

async fn no_route(uri: Uri) -> ApiError {
    let path: String = uri.path().chars().take(200).collect();
    let mut error =
        ApiError::invalid(format!("there is no route `{path}`")).with_status(StatusCode::NOT_FOUND);
    error.failure.hint = Some("GET /openapi.json lists the routes".to_owned());
    error
}

async fn no_method(method: Method, request: Request) -> Result<Response, ApiError> {
    let path: String = request.uri().path().chars().take(200).collect();
    Err(
        ApiError::invalid(format!("`{path}` does not know the method {method}"))
            .with_status(StatusCode::METHOD_NOT_ALLOWED),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_tells_of_the_token_and_of_refused_bodies() {
        let description = serde_json::to_value(openapi()).unwrap();
        let schemes = &description["components"]["securitySchemes"];
        assert_eq!(schemes["token"]["scheme"], "bearer");
        let paths = &description["paths"];
        let submit = &paths["/v2/tasks"]["post"];
        assert_eq!(submit["security"][1]["token"], serde_json::json!([]));
        for status in ["401", "403", "408", "413", "429"] {
            let body = &submit["responses"][status]["content"]["application/json"]["schema"];
            assert_eq!(body["$ref"], "#/components/schemas/ErrorBody", "{status}");
        }
        let show = &paths["/v2/tasks/{id}"]["get"]["responses"];
        assert!(show["401"].is_object() && show["413"].is_null());
        assert!(
            paths["/health"]["get"]["security"].is_null(),
            "it needs no token"
        );
        // Errors have the shape of the API that is asked.
        for (route, shape) in [
            ("/v1/chat/completions", "OpenAiError"),
            ("/rerank", "OpenAiError"),
            ("/v1/messages", "AnthropicError"),
        ] {
            let responses = &paths[route]["post"]["responses"];
            for status in ["400", "401", "403", "404", "408", "413", "429", "503"] {
                let body = &responses[status]["content"]["application/json"]["schema"];
                let reference = format!("#/components/schemas/{shape}");
                assert_eq!(body["$ref"], reference, "{route} {status}");
            }
            assert!(description["components"]["schemas"][shape].is_object());
            let required = &paths[route]["post"]["requestBody"]["required"];
            assert_eq!(*required, true, "{route}");
        }
        let chat = &paths["/v1/chat/completions"]["post"]["responses"]["200"]["content"];
        assert!(chat["text/event-stream"].is_object() && chat["application/json"].is_object());
        let models = &paths["/v1/models"]["get"]["responses"];
        let body = &models["401"]["content"]["application/json"]["schema"]["$ref"];
        assert_eq!(*body, "#/components/schemas/OpenAiError");
        // Bodies that may be left out are not called required.
        for route in ["drain", "stop", "unload", "reload"] {
            let body = &paths[format!("/v2/pools/{{id}}/{route}")]["post"]["requestBody"];
            assert!(body.is_object() && body["required"] != true, "{body}");
        }
    }
}
