//! `/api/chat` and `/api/generate`: from a request to its answer.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::BytesMut;
use jiff::Timestamp;
use llama_orch_types::ErrorCode;
use worker_adapters_adapter_api::EngineCall;

use super::answer::{Figures, Piece, Reading, Step};
use super::errors::OllamaError;
use super::keep_alive::KeepAlive;
use super::lines::{Form, Lines};
use super::loading;
use super::models::context_of;
use super::plain_name;
use super::request::{ChatRequest, Common, GenerateRequest, Wanted, parse};
use crate::api::correlation::CorrelationId;
use crate::api::error::ApiError;
use crate::api::openai::request::{Asked, Wishes};
use crate::api::outcome::{self, Called};
use crate::api::submission::{CallOptions, client_of};
use crate::app::state::AppState;
use crate::runtimes::computed;
use crate::services::event_log::{EventRef, Failure};
use crate::services::pool::PoolHandle;
use crate::services::streaming::LogBody;
use crate::services::tasks::TaskRecord;

/// How long a stream's status line waits for the first event: a refusal that comes
/// within it has an HTTP status of its own. Afterwards nothing is sent until there
/// is something to say, since every line is read as a part of the answer.
const GRACE: Duration = Duration::from_secs(1);

const TASK_ID: HeaderName = HeaderName::from_static("x-task-id");

/// Go on with a conversation, as Ollama's clients ask for it. Without messages the
/// model is loaded, or with `keep_alive: 0` unloaded.
#[utoipa::path(
    post, path = "/api/chat", tag = "ollama",
    request_body(content = Object, description = "As Ollama has it; what cannot be mapped is refused"),
    responses(
        (status = 200, description = "Lines of JSON, or with `stream: false` one object", body = String, content_type = "application/x-ndjson"),
        (status = 400, body = OllamaError), (status = 404, body = OllamaError),
        (status = 429, body = OllamaError), (status = 503, body = OllamaError),
    )
)]
pub async fn chat(
    State(state): State<Arc<AppState>>,
    Extension(correlation): Extension<CorrelationId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body?;
    let bytes = body.len();
    let request: ChatRequest = parse(body).await?;
    request.check()?;
    let asking = Asking::begin(&state, Form::Chat, &request.common, correlation, headers).await?;
    let (settings, ctx) = (asking.pool.settings(), asking.ctx);
    let wanted = move || request.wanted(&settings.model, ctx);
    let wanted = computed(bytes, wanted).await?;
    asking.answer(state, wanted).await
}

/// Go on with a text, as Ollama's clients ask for it. Without a prompt the model is
/// loaded, or with `keep_alive: 0` unloaded.
#[utoipa::path(
    post, path = "/api/generate", tag = "ollama",
    request_body(content = Object, description = "As Ollama has it; what cannot be mapped is refused"),
    responses(
        (status = 200, description = "Lines of JSON, or with `stream: false` one object", body = String, content_type = "application/x-ndjson"),
        (status = 400, body = OllamaError), (status = 404, body = OllamaError),
        (status = 429, body = OllamaError), (status = 503, body = OllamaError),
    )
)]
pub async fn generate(
    State(state): State<Arc<AppState>>,
    Extension(correlation): Extension<CorrelationId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = body?;
    let bytes = body.len();
    let request: GenerateRequest = parse(body).await?;
    request.check()?;
    let (form, common) = (Form::Generate, &request.common);
    let asking = Asking::begin(&state, form, common, correlation, headers).await?;
    let (settings, ctx) = (asking.pool.settings(), asking.ctx);
    let wanted = move || request.wanted(&settings.model, ctx);
    let wanted = computed(bytes, wanted).await?;
    asking.answer(state, wanted).await
}

/// A request on its way to its answer.
struct Asking {
    pool: PoolHandle,
    /// The pool's context, in tokens.
    ctx: u32,
    lines: Lines,
    streams: bool,
    keep_alive: KeepAlive,
    wishes: Wishes,
    correlation: CorrelationId,
    headers: HeaderMap,
}

impl Asking {
    async fn begin(
        state: &AppState,
        form: Form,
        common: &Common,
        correlation: CorrelationId,
        headers: HeaderMap,
    ) -> Result<Self, Failure> {
        let pool = state.pool_named(Some(plain_name(&common.model)))?;
        Ok(Self {
            ctx: context_of(state, &pool).await,
            pool,
            lines: Lines {
                form,
                model: common.model.clone(),
            },
            streams: common.streams(),
            keep_alive: common.keep_alive()?,
            wishes: Wishes::read(&headers)?,
            correlation,
            headers,
        })
    }

    async fn answer(self, state: Arc<AppState>, wanted: Wanted) -> Result<Response, ApiError> {
        match wanted {
            Wanted::Call(call) => self.call(state, call).await,
            Wanted::Load => Ok(self.without_words().await?),
        }
    }

    async fn without_words(self) -> Result<Response, Failure> {
        let (done_reason, load) = match self.keep_alive {
            KeepAlive::Configured => ("load", loading::load(&self.pool).await?),
            KeepAlive::Unload => {
                loading::unload(&self.pool).await?;
                ("unload", Duration::ZERO)
            }
        };
        let line = self
            .lines
            .without_words(done_reason, load, Timestamp::now());
        let kind = if self.streams { LINES } else { JSON };
        Ok(([(CONTENT_TYPE, kind)], line).into_response())
    }

    async fn call(self, state: Arc<AppState>, call: EngineCall) -> Result<Response, ApiError> {
        // Bounds its text as that of any other call.
        let (body, most) = (call.body.clone(), state.limits.max_prompt_bytes);
        computed(body.len(), move || Asked::read(&body, most).map(drop)).await?;
        let called = submit(
            state,
            &self.pool,
            call,
            self.wishes,
            self.correlation,
            &self.headers,
        )
        .await?;
        if self.keep_alive == KeepAlive::Unload {
            loading::unload_after(Arc::clone(&called.record), self.pool.clone());
        }
        let told = told_at_admission(&called.record);
        let answered = if self.streams {
            streamed(called, self.lines).await
        } else {
            whole(called, &self.lines).await
        };
        // An error tells of the task as well: by its id it can be found in the log.
        let mut response =
            answered.unwrap_or_else(|failure| ApiError::from(failure).into_response());
        response.headers_mut().extend(told);
        Ok(response)
    }
}

pub(super) const JSON: &str = "application/json; charset=utf-8";
const LINES: &str = "application/x-ndjson";

/// Puts a call into the pool's queue.
pub(super) async fn submit(
    state: Arc<AppState>,
    pool: &PoolHandle,
    call: EngineCall,
    wishes: Wishes,
    correlation: CorrelationId,
    headers: &HeaderMap,
) -> Result<Called, Failure> {
    let options = CallOptions {
        client: client_of(headers, &correlation),
        correlation: correlation.0,
        priority: wishes.priority,
        cancel_on_disconnect: wishes.cancel_on_disconnect,
        start_within: wishes.start_within,
    };
    outcome::call(state, pool.clone(), call, options).await
}

pub(super) fn told_at_admission(record: &TaskRecord) -> [(HeaderName, HeaderValue); 1] {
    // An id is letters and digits.
    let id = HeaderValue::from_str(&record.id.to_string());
    [(TASK_ID, id.unwrap_or(HeaderValue::from_static("")))]
}

/// Waits for the end. The reader is here as long as the client is: the connection's
/// end drops this future.
async fn whole(called: Called, lines: &Lines) -> Result<Response, Failure> {
    let Called { record, reader, .. } = called;
    let (answer, figures) = read_to_end(&record).await?;
    drop(reader);
    let total = record.created.elapsed();
    let body = lines.whole(&answer, &figures, total, Timestamp::now());
    Ok(([(CONTENT_TYPE, JSON)], body).into_response())
}

async fn read_to_end(record: &TaskRecord) -> Result<(Piece<'static>, Figures), Failure> {
    let mut cursor = record.log.cursor(0);
    let (mut reading, mut answer) = (Reading::default(), Piece::default());
    let mut ended = None;
    loop {
        let read = |_, event: EventRef<'_>| {
            if ended.is_some() {
                return;
            }
            match reading.step(event) {
                Step::Nothing => {}
                Step::Piece(piece) => answer.extend(piece),
                Step::Done(held_back, figures) => {
                    answer.extend(held_back);
                    ended = Some(Ok(figures));
                }
                Step::Failed(failure) => ended = Some(Err(*failure)),
            }
        };
        let unread = cursor.each(read).await;
        match ended {
            Some(ended) => return ended.map(|figures| (answer, figures)),
            None if unread => {}
            None => return Err(ended_without_an_end()),
        }
    }
}

fn ended_without_an_end() -> Failure {
    Failure::new(ErrorCode::Internal, "the task ended without an end")
}

async fn streamed(called: Called, lines: Lines) -> Result<Response, Failure> {
    let Called { record, reader, .. } = called;
    outcome::beginning(&record, GRACE).await?;
    let (mut reading, created) = (Reading::default(), record.created);
    let write = move |out: &mut BytesMut, _, event: EventRef<'_>| {
        write_step(out, &lines, reading.step(event), created)
    };
    let stream = LogBody::new(record.log.cursor(0), reader, write, || None);
    let headers = [
        (CONTENT_TYPE, LINES),
        // Asks proxies that know it not to hold tokens back.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(stream)).into_response())
}

/// Breaks with what ends the stream.
fn write_step(
    out: &mut BytesMut,
    lines: &Lines,
    step: Step<'_>,
    created: Instant,
) -> ControlFlow<()> {
    match step {
        Step::Nothing => {}
        Step::Piece(piece) => lines.piece(out, &piece, Timestamp::now()),
        Step::Done(held_back, figures) => {
            let (total, now) = (created.elapsed(), Timestamp::now());
            lines.done(out, &held_back, &figures, total, now);
            return ControlFlow::Break(());
        }
        Step::Failed(failure) => {
            Lines::failed(out, &failure);
            return ControlFlow::Break(());
        }
    }
    ControlFlow::Continue(())
}
