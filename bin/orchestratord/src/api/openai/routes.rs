//! The routes that are passed to the engine. They differ in little, so they are a
//! table: routes and description are made from it.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::routing::{MethodRouter, post};
use utoipa::openapi::path::{OperationBuilder, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{Object, Schema, SchemaType, Type};
use utoipa::openapi::{Content, HttpMethod, OpenApi, Ref, RefOr, Required, ResponseBuilder};
use worker_adapters_adapter_api::CallApi;

use super::answers;
use crate::api::correlation::CorrelationId;
use crate::api::dialect::Dialect;
use crate::app::state::AppState;

/// One route, and what it is for.
struct Route {
    path: &'static str,
    api: CallApi,
    summary: &'static str,
}

const fn route(path: &'static str, api: CallApi, summary: &'static str) -> Route {
    Route { path, api, summary }
}

const ROUTES: &[Route] = &[
    route(
        "/v1/chat/completions",
        CallApi::ChatCompletions,
        "Go on with a conversation, as OpenAI's clients ask for it.",
    ),
    route(
        "/v1/completions",
        CallApi::Completions,
        "Go on with a text, as OpenAI's clients ask for it.",
    ),
    route(
        "/v1/responses",
        CallApi::Responses,
        "OpenAI's later API for conversations; nothing is stored.",
    ),
    route(
        "/v1/embeddings",
        CallApi::Embeddings,
        "Vectors of texts, from a pool that `serves: embeddings`.",
    ),
    route(
        "/v1/messages",
        CallApi::Messages,
        "Go on with a conversation, as Anthropic's clients ask for it.",
    ),
    route(
        "/v1/messages/count_tokens",
        CallApi::CountTokens,
        "Count a conversation's tokens, as Anthropic's clients ask for it.",
    ),
    route(
        "/v1/rerank",
        CallApi::Rerank,
        "Order documents by a query, from a pool that `serves: rerank`.",
    ),
    route(
        "/v1/reranking",
        CallApi::Rerank,
        "Another name of `/v1/rerank`.",
    ),
    route("/rerank", CallApi::Rerank, "Another name of `/v1/rerank`."),
    route(
        "/reranking",
        CallApi::Rerank,
        "Another name of `/v1/rerank`.",
    ),
    route(
        "/v1/tokenize",
        CallApi::Tokenize,
        "A text's tokens, as llama-server's `/tokenize`.",
    ),
    route(
        "/tokenize",
        CallApi::Tokenize,
        "Another name of `/v1/tokenize`.",
    ),
    route(
        "/v1/detokenize",
        CallApi::Detokenize,
        "The text of tokens, as llama-server's `/detokenize`.",
    ),
    route(
        "/detokenize",
        CallApi::Detokenize,
        "Another name of `/v1/detokenize`.",
    ),
];

/// Whether a path is one of these routes without `/v1`.
pub fn is_short(path: &str) -> bool {
    let mut short = ROUTES.iter().filter(|route| !route.path.starts_with("/v1"));
    short.any(|route| route.path == path)
}

/// All routes that are passed to the engine.
pub fn call_routes() -> Router<Arc<AppState>> {
    ROUTES.iter().fold(Router::new(), |router, route| {
        router.route(route.path, handler(route.api))
    })
}

fn handler(api: CallApi) -> MethodRouter<Arc<AppState>> {
    post(
        move |State(state): State<Arc<AppState>>,
              Extension(correlation): Extension<CorrelationId>,
              headers: HeaderMap,
              body: Result<Bytes, BytesRejection>| {
            answers::call(api, state, correlation, headers, body)
        },
    )
}

/// Adds these routes to the API's description.
pub fn describe(description: &mut OpenApi) {
    for route in ROUTES {
        description.paths.paths.insert(
            route.path.to_owned(),
            PathItem::new(HttpMethod::Post, operation(route).build()),
        );
    }
}

fn operation(route: &Route) -> OperationBuilder {
    let header = |name: &str, about: &str, kind: Type| {
        let schema = Object::with_type(SchemaType::Type(kind));
        ParameterBuilder::new()
            .name(name)
            .parameter_in(ParameterIn::Header)
            .required(Required::False)
            .description(Some(about))
            .schema(Some(Schema::Object(schema)))
            .build()
    };
    let any_object = || {
        let object = Schema::Object(Object::with_type(SchemaType::Type(Type::Object)));
        Content::new(Some(RefOr::T(object)))
    };
    let body = RequestBodyBuilder::new()
        .description(Some(
            "Passed to the engine as it is. Read of it are `model`, `stream` and `stream_options.include_usage`.",
        ))
        .content("application/json", any_object())
        .required(Some(Required::True));
    let name: String = route
        .path
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
        .collect();
    let mut operation = OperationBuilder::new()
        .operation_id(Some(format!("call{name}")))
        .tag("clients")
        .summary(Some(route.summary))
        .parameter(header(
            "X-Priority",
            "`interactive` (the default) or `batch`",
            Type::String,
        ))
        .parameter(header(
            "X-Deadline-Ms",
            "The engine must take it within so many milliseconds",
            Type::Integer,
        ))
        .parameter(header(
            "X-Cancel-On-Disconnect",
            "`false` lets it run on when the client goes away",
            Type::Boolean,
        ))
        .request_body(Some(body.build()));
    let mut answer = ResponseBuilder::new()
        .description("The engine's answer. `X-Task-Id` names the task, `X-Queue-Position` and `X-Predicted-Start-Ms` say what was promised")
        .content("application/json", any_object());
    if route.api.generates() {
        let text = Schema::Object(Object::with_type(SchemaType::Type(Type::String)));
        answer = answer.content("text/event-stream", Content::new(Some(RefOr::T(text))));
    }
    operation = operation.response("200", answer.build());
    let schema = Dialect::of(route.path).error_schema();
    for (status, about) in [
        ("400", "The engine or this server refuses the request"),
        ("404", "No pool is called as `model` says"),
        (
            "429",
            "The queue is full, or the client has as many answers open as it may; `Retry-After` and `retry-after-ms` say when to come back",
        ),
        ("499", "Somebody cancelled the task"),
        ("502", "The engine broke off"),
        ("503", "The pool cannot serve, or not in time"),
        ("504", "The engine gave no token in time"),
    ] {
        let content = Content::new(Some(Ref::from_schema_name(schema)));
        let error = ResponseBuilder::new()
            .description(about)
            .content("application/json", content);
        operation = operation.response(status, error.build());
    }
    operation
}
