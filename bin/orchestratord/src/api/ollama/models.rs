//! `/api/tags`, `/api/show` and `/api/ps`: the models, as these clients list them.
//!
//! Every pool is a model, whether it is loaded or not, under its id and under each
//! of its aliases. What a model's file says of itself is known once it is here.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use jiff::{SignedDuration, Timestamp};
use llama_orch_types::{ErrorCode, ModelMetadata};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::errors::OllamaError;
use super::lines::written;
use super::request::{check_model, parse};
use super::{plain_name, tagged_name};
use crate::api::error::ApiError;
use crate::app::config::Serves;
use crate::app::state::AppState;
use crate::services::event_log::Failure;
use crate::services::pool::{Phase, PoolHandle, PoolSnapshot};

/// The context of a pool whose configuration, model and engine do not tell: the
/// most that it is given then.
const DEFAULT_CTX: u32 = 4096;

/// These clients show a time as far off as this as "forever".
const FOREVER: SignedDuration = SignedDuration::from_hours(100 * 365 * 24);

/// What is known of a model's file.
#[derive(Debug, Clone, Default, PartialEq)]
struct Facts {
    digest: String,
    size: u64,
    modified_at: Option<Timestamp>,
    architecture: Option<String>,
    quantization: Option<String>,
    parameters: Option<u64>,
    ctx_max: Option<u32>,
    template: Option<String>,
}

impl From<&ModelMetadata> for Facts {
    fn from(model: &ModelMetadata) -> Self {
        Self {
            digest: model.digest.hex(),
            size: model.size_bytes,
            modified_at: None,
            architecture: model.architecture.clone(),
            quantization: model.quantization.clone(),
            parameters: model.parameter_count,
            ctx_max: model.ctx_max,
            template: model.chat_template.clone(),
        }
    }
}

/// The files there are, with the names they were asked for by.
#[cfg(feature = "provisioning")]
async fn files(state: &AppState) -> Result<Vec<(Vec<String>, Facts)>, Failure> {
    let records = state.models.list().await;
    let records =
        records.map_err(|error| Failure::internal(provision_kit::chain::one_line(&error)))?;
    let facts = |record: provisioners_model_provisioner::ModelRecord| {
        let facts = Facts {
            digest: record.digest.hex(),
            size: record.stamp.size_bytes,
            modified_at: Some(record.verified_at),
            architecture: record.facts.architecture,
            quantization: record.facts.quantization,
            parameters: record.facts.parameter_count,
            ctx_max: record.facts.ctx_max,
            template: record.facts.chat_template,
        };
        (record.references.into_iter().collect(), facts)
    };
    Ok(records.into_iter().map(facts).collect())
}

/// A build without provisioning keeps no models.
#[cfg(not(feature = "provisioning"))]
#[allow(clippy::unused_async, reason = "the same shape in both builds")]
async fn files(_: &AppState) -> Result<Vec<(Vec<String>, Facts)>, Failure> {
    Ok(Vec::new())
}

/// What is known of a pool's model: by the engine that has it, else by the file that
/// was fetched for it.
fn facts_of(snapshot: &PoolSnapshot, files: &[(Vec<String>, Facts)]) -> Facts {
    let settings = &snapshot.settings;
    let loaded = snapshot
        .context
        .as_ref()
        .and_then(|context| context.model.as_ref());
    let filed = files.iter().find(|(names, facts)| match loaded {
        Some(model) => facts.digest == model.digest.hex(),
        None => names
            .iter()
            .any(|name| *name == settings.config.model || *name == settings.model),
    });
    match (loaded, filed) {
        (_, Some((_, facts))) => facts.clone(),
        (Some(model), None) => model.into(),
        (None, None) => Facts::default(),
    }
}

fn ctx_of(snapshot: &PoolSnapshot, facts: &Facts) -> u32 {
    let running = snapshot.context.as_ref().map(|context| context.ctx);
    let trained = facts.ctx_max.map(|most| most.min(DEFAULT_CTX));
    running
        .or(snapshot.settings.config.ctx)
        .or(trained)
        .unwrap_or(DEFAULT_CTX)
}

/// The context of one slot of the pool, in tokens. Where no engine runs it is the one
/// that the next engine is started with, as far as that can be told.
pub(super) async fn context_of(state: &AppState, pool: &PoolHandle) -> u32 {
    let snapshot = pool.snapshot();
    let told = snapshot.context.is_some() || snapshot.settings.config.ctx.is_some();
    // A catalogue that cannot be read says nothing; the engine has the last word.
    let files = if told {
        Vec::new()
    } else {
        files(state).await.unwrap_or_default()
    };
    ctx_of(&snapshot, &facts_of(&snapshot, &files))
}

#[derive(Debug, Serialize)]
struct Details {
    parent_model: &'static str,
    format: &'static str,
    family: String,
    families: Vec<String>,
    parameter_size: String,
    quantization_level: String,
}

impl Details {
    fn of(facts: &Facts) -> Self {
        let family = facts.architecture.clone().unwrap_or_default();
        Self {
            parent_model: "",
            format: "gguf",
            families: facts.architecture.clone().into_iter().collect(),
            family,
            parameter_size: facts.parameters.map(in_short).unwrap_or_default(),
            quantization_level: facts.quantization.clone().unwrap_or_default(),
        }
    }
}

/// A number of weights as people say it: `134.52M`, `8.0B`.
fn in_short(parameters: u64) -> String {
    #[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
    let number = parameters as f64;
    if number >= 1e9 {
        format!("{:.1}B", number / 1e9)
    } else if number >= 1e6 {
        format!("{:.2}M", number / 1e6)
    } else {
        format!("{:.2}K", number / 1e3)
    }
}

/// When it was made, or the time that stands for none.
fn modified(facts: &Facts) -> String {
    const NONE: &str = "0001-01-01T00:00:00Z";
    facts.modified_at.map_or(NONE.to_owned(), written)
}

/// All names of a pool, as they are listed.
fn names(snapshot: &PoolSnapshot) -> Vec<String> {
    let settings = &snapshot.settings;
    let aliases = settings.config.aliases.iter().map(String::as_str);
    [settings.id.as_str()]
        .into_iter()
        .chain(aliases)
        .map(tagged_name)
        .collect()
}

/// Names of a pool with its snapshot and what is known of its model.
type Known = (Vec<String>, PoolSnapshot, Facts);

async fn known(state: &AppState) -> Result<Vec<Known>, Failure> {
    let files = files(state).await?;
    let pools = state.pools.get();
    let known = pools.values().map(|pool| {
        let snapshot = pool.snapshot();
        let facts = facts_of(&snapshot, &files);
        (names(&snapshot), snapshot, facts)
    });
    Ok(known.collect())
}

/// The models that can be asked for: all configured pools, by all of their names.
#[utoipa::path(
    get, path = "/api/tags", tag = "ollama",
    responses((status = 200, description = "`models`", body = Object), (status = 500, body = OllamaError))
)]
pub async fn tags(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    let mut models = Vec::new();
    for (names, _, facts) in known(&state).await? {
        for name in names {
            models.push(json!({
                "name": name, "model": name, "modified_at": modified(&facts),
                "size": facts.size, "digest": facts.digest, "details": Details::of(&facts),
            }));
        }
    }
    Ok(Json(json!({"models": models})))
}

/// The models in memory.
#[utoipa::path(
    get, path = "/api/ps", tag = "ollama",
    responses((status = 200, description = "`models`", body = Object), (status = 500, body = OllamaError))
)]
pub async fn ps(State(state): State<Arc<AppState>>) -> Result<Json<Value>, ApiError> {
    let (now, instant) = (Timestamp::now(), Instant::now());
    let in_memory = |(names, snapshot, facts): Known| {
        let context = snapshot.context.as_ref()?;
        let loaded = matches!(snapshot.phase, Phase::Ready | Phase::Draining);
        let name = names.first().filter(|_| loaded)?;
        let expires_at = match expires_in(&snapshot, instant) {
            Some(left) => now.checked_add(left),
            None => now.checked_add(FOREVER),
        };
        let mut model = json!({
            "name": name, "model": name, "size": facts.size, "digest": facts.digest,
            "details": Details::of(&facts), "context_length": context.ctx,
            // Fails only where the clock is thousands of years off.
            "expires_at": written(expires_at.unwrap_or(now)),
        });
        if let Some(bytes) = in_vram(&snapshot) {
            model["size_vram"] = bytes.into();
        }
        Some(model)
    };
    let models: Vec<Value> = known(&state)
        .await?
        .into_iter()
        .filter_map(in_memory)
        .collect();
    Ok(Json(json!({"models": models})))
}

/// How long the pool stays in memory if no task comes; `None` for ever.
fn expires_in(snapshot: &PoolSnapshot, now: Instant) -> Option<Duration> {
    let config = &snapshot.settings.config;
    let ttl = config.idle_ttl_seconds.filter(|_| !config.pin)?;
    let at = snapshot.unloads_at;
    Some(at.map_or(Duration::from_secs(ttl), |at| {
        at.saturating_duration_since(now)
    }))
}

/// Bytes on a GPU; absent where that is not known. With `gpu_layers: 0` it is none.
fn in_vram(snapshot: &PoolSnapshot) -> Option<u64> {
    (snapshot.settings.config.gpu_layers == Some(0)).then_some(0)
}

/// Body of `POST /api/show`.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct ShowRequest {
    model: String,
    /// What older clients say.
    name: String,
}

/// One model.
#[utoipa::path(
    post, path = "/api/show", tag = "ollama",
    request_body(content = Object, description = "`model`"),
    responses((status = 200, description = "What is known of it", body = Object), (status = 404, body = OllamaError))
)]
pub async fn show(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    let request: ShowRequest = parse(body?).await?;
    let name = [request.model, request.name]
        .into_iter()
        .find(|name| !name.is_empty())
        .unwrap_or_default();
    check_model(&name)?;
    let pool = state.pool_named(Some(plain_name(&name)))?;
    let files = files(&state).await?;
    let snapshot = pool.snapshot();
    Ok(Json(shown(&snapshot, &facts_of(&snapshot, &files))))
}

fn shown(snapshot: &PoolSnapshot, facts: &Facts) -> Value {
    let config = &snapshot.settings.config;
    let template = facts.template.as_deref().unwrap_or_default();
    let ctx = ctx_of(snapshot, facts);
    json!({
        "modelfile": format!("# pool `{}` of orchestratord serves {}\n", snapshot.settings.id, snapshot.settings.model),
        "parameters": format!("num_ctx                        {ctx}"),
        "template": template,
        "details": Details::of(facts),
        "model_info": model_info(facts),
        "capabilities": capabilities(config.serves, template, &config.flags),
        "modified_at": modified(facts),
    })
}

/// Facts under the names that GGUF files have for them.
fn model_info(facts: &Facts) -> Map<String, Value> {
    let mut info = Map::new();
    if let Some(architecture) = &facts.architecture {
        info.insert("general.architecture".to_owned(), json!(architecture));
        if let Some(ctx) = facts.ctx_max {
            info.insert(format!("{architecture}.context_length"), json!(ctx));
        }
    }
    if let Some(parameters) = facts.parameters {
        info.insert("general.parameter_count".to_owned(), json!(parameters));
    }
    info
}

/// What a pool can be asked for, judged by what it serves, by the model's template
/// and by the engine's flags.
fn capabilities(serves: Serves, template: &str, flags: &[String]) -> Vec<&'static str> {
    match serves {
        Serves::Embeddings => return vec!["embedding"],
        Serves::Rerank => return Vec::new(),
        Serves::Text => {}
    }
    let flag = |wanted: &str| flags.iter().any(|flag| flag.starts_with(wanted));
    let mut all = vec!["completion"];
    if template.contains("tools") {
        all.push("tools");
    }
    if template.contains("enable_thinking") || template.contains("<think>") {
        all.push("thinking");
    }
    if flag("--mmproj") || flags.iter().any(|flag| flag == "-mm") {
        all.push("vision");
    }
    all
}

/// Whether the pool's model is on this machine.
pub(super) async fn is_here(state: &AppState, pool: &PoolHandle) -> Result<bool, Failure> {
    let snapshot = pool.snapshot();
    if snapshot.context.is_some() {
        return Ok(true);
    }
    let files = files(state).await?;
    Ok(!facts_of(&snapshot, &files).digest.is_empty())
}

/// For a model that no pool serves: what these clients know as the sign to pull it.
pub(super) fn not_here(pool: &PoolHandle) -> Failure {
    let settings = pool.settings();
    Failure::new(
        ErrorCode::ModelNotFound,
        format!(
            "the model of pool {} is not on this machine yet",
            settings.id
        ),
    )
    .with_hint(format!(
        "`orchestratord models pull {}` fetches it, and so does the pool's first task",
        settings.model
    ))
}

#[cfg(test)]
#[path = "models_tests.rs"]
mod tests;
