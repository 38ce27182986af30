//! `/api/embed`, and the older `/api/embeddings`.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use llama_orch_types::ErrorCode;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use worker_adapters_adapter_api::{CallApi, EngineCall};

use super::calls::{JSON, submit, told_at_admission};
use super::errors::OllamaError;
use super::keep_alive::KeepAlive;
use super::lines::nanos;
use super::models::context_of;
use super::options::{self, invalid};
use super::request::{check_model, parse};
use super::{loading, plain_name};
use crate::api::correlation::CorrelationId;
use crate::api::error::ApiError;
use crate::api::openai::request::{Asked, Wishes};
use crate::api::outcome;
use crate::app::state::AppState;
use crate::runtimes::computed;
use crate::services::event_log::{Failure, TaskEvent};
use crate::services::pool::PoolHandle;
use crate::services::tasks::TaskRecord;

/// Body of `POST /api/embed`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EmbedRequest {
    model: String,
    input: Value,
    /// How many numbers of each vector are wanted.
    dimensions: Option<usize>,
    // Known so that it is not refused. A text that is too long is refused, never cut.
    #[serde(rename = "truncate")]
    _truncate: Option<bool>,
    options: Option<Map<String, Value>>,
    keep_alive: Option<Value>,
}

/// Body of `POST /api/embeddings`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct EmbeddingsRequest {
    model: String,
    prompt: Option<String>,
    options: Option<Map<String, Value>>,
    keep_alive: Option<Value>,
}

#[derive(Debug, Serialize)]
struct EmbedAnswer {
    model: String,
    embeddings: Vec<Vec<f64>>,
    total_duration: u64,
    load_duration: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_eval_count: Option<u64>,
}

/// The engine's answer, as far as it is read.
#[derive(Debug, Deserialize)]
struct Vectors {
    data: Vec<Vector>,
    #[serde(default)]
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Vector {
    #[serde(default)]
    index: usize,
    embedding: Vec<f64>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    prompt_tokens: u64,
}

/// Vectors of texts, from a pool that `serves: embeddings`, each of length 1. With no
/// text the model is loaded.
#[utoipa::path(
    post, path = "/api/embed", tag = "ollama",
    request_body(content = Object, description = "As Ollama has it; what cannot be mapped is refused"),
    responses(
        (status = 200, description = "The vectors", body = Object),
        (status = 400, body = OllamaError), (status = 404, body = OllamaError),
        (status = 429, body = OllamaError), (status = 503, body = OllamaError),
    )
)]
pub async fn embed(
    State(state): State<Arc<AppState>>,
    Extension(correlation): Extension<CorrelationId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: EmbedRequest = parse(body?).await?;
    let dimensions = request.dimensions;
    let asking = Embedding {
        texts: texts(request.input)?,
        model: request.model,
        options: request.options,
        keep_alive: KeepAlive::read(request.keep_alive.as_ref())?,
    };
    let model = asking.model.clone();
    let (record, vectors) = asking.run(state, correlation, headers).await?;
    let cut = |vector| shortened(vector, dimensions);
    let numbers = vectors.all.iter().map(Vec::len).sum();
    let answer = EmbedAnswer {
        model,
        prompt_eval_count: vectors.tokens,
        embeddings: vectors.all.into_iter().map(cut).collect(),
        total_duration: nanos(vectors.took),
        load_duration: nanos(vectors.load),
    };
    Ok(answered(record.as_deref(), numbers, answer).await)
}

/// The vector of one text; `/api/embed` takes several.
#[utoipa::path(
    post, path = "/api/embeddings", tag = "ollama",
    request_body(content = Object, description = "As Ollama has it; what cannot be mapped is refused"),
    responses(
        (status = 200, description = "The vector", body = Object),
        (status = 400, body = OllamaError), (status = 404, body = OllamaError),
        (status = 429, body = OllamaError), (status = 503, body = OllamaError),
    )
)]
pub async fn embeddings(
    State(state): State<Arc<AppState>>,
    Extension(correlation): Extension<CorrelationId>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: EmbeddingsRequest = parse(body?).await?;
    let prompt = request.prompt.filter(|prompt| !prompt.is_empty());
    let asking = Embedding {
        texts: prompt.into_iter().collect(),
        model: request.model,
        options: request.options,
        keep_alive: KeepAlive::read(request.keep_alive.as_ref())?,
    };
    let (record, vectors) = asking.run(state, correlation, headers).await?;
    let first = vectors.all.into_iter().next().unwrap_or_default();
    let (numbers, body) = (first.len(), json!({"embedding": first}));
    Ok(answered(record.as_deref(), numbers, body).await)
}

/// `numbers` is how many the body holds: the vectors of many texts are megabytes.
async fn answered(
    record: Option<&TaskRecord>,
    numbers: usize,
    body: impl Serialize + Send + 'static,
) -> Response {
    // About as long as a number is written.
    const NUMBER: usize = 20;
    // Texts and numbers, which JSON always holds.
    let written = move || serde_json::to_vec(&body).unwrap_or_default();
    let body = computed(numbers * NUMBER, written).await;
    let mut response = ([(CONTENT_TYPE, JSON)], body).into_response();
    let told = record.map(told_at_admission).into_iter().flatten();
    response.headers_mut().extend(told);
    response
}

fn texts(input: Value) -> Result<Vec<String>, Failure> {
    let wrong = || invalid("`input` must be a text or a list of texts");
    match input {
        Value::Null => Err(invalid("`input` is missing")),
        Value::String(text) if text.is_empty() => Ok(Vec::new()),
        Value::String(text) => Ok(vec![text]),
        Value::Array(all) => all
            .into_iter()
            .map(|text| match text {
                Value::String(text) => Ok(text),
                _ => Err(wrong()),
            })
            .collect(),
        _ => Err(wrong()),
    }
}

/// The first numbers of a vector, scaled to length 1 again.
fn shortened(mut vector: Vec<f64>, dimensions: Option<usize>) -> Vec<f64> {
    let Some(dimensions) = dimensions.filter(|&wanted| 0 < wanted && wanted < vector.len()) else {
        return vector;
    };
    vector.truncate(dimensions);
    let length = vector
        .iter()
        .map(|number| number * number)
        .sum::<f64>()
        .sqrt();
    if length > 0.0 {
        for number in &mut vector {
            *number /= length;
        }
    }
    vector
}

struct Embedding {
    model: String,
    texts: Vec<String>,
    options: Option<Map<String, Value>>,
    keep_alive: KeepAlive,
}

#[derive(Debug, Default)]
struct Embedded {
    all: Vec<Vec<f64>>,
    tokens: Option<u64>,
    took: Duration,
    load: Duration,
}

impl Embedding {
    async fn run(
        self,
        state: Arc<AppState>,
        correlation: CorrelationId,
        headers: HeaderMap,
    ) -> Result<(Option<Arc<TaskRecord>>, Embedded), Failure> {
        check_model(&self.model)?;
        let pool = state.pool_named(Some(plain_name(&self.model)))?;
        let wishes = Wishes::read(&headers)?;
        let count = self.texts.len();
        if count == 0 {
            return Ok((None, self.without_texts(&pool).await?));
        }
        let ctx = context_of(&state, &pool).await;
        let bytes = self.texts.iter().map(String::len).sum();
        let (model, texts, options) = (pool.settings().model.clone(), self.texts, self.options);
        let most = state.limits.max_prompt_bytes;
        let call = computed(bytes, move || {
            let call = call(&model, &texts, options, ctx)?;
            Asked::read(&call.body, most)?;
            Ok::<_, Failure>(call)
        });
        let call = call.await?;
        let called = submit(state, &pool, call, wishes, correlation, &headers).await?;
        if self.keep_alive == KeepAlive::Unload {
            loading::unload_after(Arc::clone(&called.record), pool);
        }
        let answer = outcome::answer(&called.record).await?;
        let body = answer.body.clone();
        let (all, tokens) = computed(body.len(), move || read(&body, count)).await?;
        let record = called.record;
        let embedded = Embedded {
            all,
            tokens,
            took: record.created.elapsed(),
            load: waited(&record).await,
        };
        Ok((Some(record), embedded))
    }

    async fn without_texts(self, pool: &PoolHandle) -> Result<Embedded, Failure> {
        let load = match self.keep_alive {
            KeepAlive::Configured => loading::load(pool).await?,
            KeepAlive::Unload => {
                loading::unload(pool).await?;
                Duration::ZERO
            }
        };
        Ok(Embedded {
            took: load,
            load,
            ..Embedded::default()
        })
    }
}

/// Until the engine had taken the task.
async fn waited(record: &TaskRecord) -> Duration {
    let first = record.log.cursor(0).read().await.unwrap_or_default();
    let started = first.iter().find_map(|(_, event)| match event {
        TaskEvent::Started(started) => Some(started.waited_ms),
        _ => None,
    });
    Duration::from_millis(started.unwrap_or_default())
}

fn call(
    model: &str,
    texts: &[String],
    options: Option<Map<String, Value>>,
    ctx: u32,
) -> Result<EngineCall, Failure> {
    // Checked as for any request; nothing in them makes another vector.
    options::apply(options.unwrap_or_default(), ctx, &mut Map::new())?;
    Ok(EngineCall {
        api: CallApi::Embeddings,
        body: Bytes::from(json!({"model": model, "input": texts}).to_string()),
        stream: false,
    })
}

/// The vectors in the order of their texts, and how many tokens those had.
fn read(body: &[u8], count: usize) -> Result<(Vec<Vec<f64>>, Option<u64>), Failure> {
    let unreadable = |why: String| {
        Failure::new(
            ErrorCode::WorkerReset,
            format!("the engine's answer cannot be read: {why}"),
        )
        .retriable()
    };
    let mut vectors: Vectors =
        serde_json::from_slice(body).map_err(|error| unreadable(error.to_string()))?;
    if vectors.data.len() != count {
        let given = vectors.data.len();
        return Err(unreadable(format!("{given} vectors for {count} texts")));
    }
    vectors.data.sort_by_key(|vector| vector.index);
    let tokens = vectors.usage.map(|usage| usage.prompt_tokens);
    let all = vectors.data.into_iter().map(|vector| vector.embedding);
    Ok((all.collect(), tokens))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_one_or_several() {
        assert_eq!(texts(json!("a")).unwrap(), ["a"]);
        assert_eq!(texts(json!(["a", ""])).unwrap(), ["a", ""]);
        assert!(texts(json!("")).unwrap().is_empty());
        for wrong in [json!(null), json!(1), json!([1])] {
            assert!(texts(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_shortened_vector_has_length_one() {
        assert_eq!(shortened(vec![3.0, 4.0, 12.0], Some(2)), [0.6, 0.8]);
        assert_eq!(shortened(vec![3.0, 4.0], None), [3.0, 4.0]);
        assert_eq!(shortened(vec![3.0, 4.0], Some(9)), [3.0, 4.0]);
        assert_eq!(shortened(vec![0.0, 4.0], Some(1)), [0.0]);
    }

    #[test]
    fn vectors_are_in_the_order_of_their_texts() {
        let body = json!({
            "data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}],
            "usage": {"prompt_tokens": 4, "total_tokens": 4},
        });
        let (all, tokens) = read(body.to_string().as_bytes(), 2).unwrap();
        assert_eq!((all, tokens), (vec![vec![1.0], vec![2.0]], Some(4)));
        assert!(read(body.to_string().as_bytes(), 3).is_err());
        assert!(read(b"{}", 0).is_err());
    }
}
