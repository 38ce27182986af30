//! `provenance/engines.jsonl`: which engine was provided and started, from what, when.

use llama_orch_types::{Digest, ProvisionedContext};
use provision_kit::blocking::blocking;
use provision_kit::dirs::RuntimeDirs;
use provision_kit::fs::{FsError, append_jsonl};
use serde::Serialize;
use tokio::task::JoinHandle;

use super::EngineInstallation;
use crate::manifest::{Manifest, Recipe};

#[derive(Serialize)]
struct Provided {
    at: String,
    event: &'static str,
    engine: &'static str,
    #[serde(flatten)]
    installation: EngineInstallation,
    recipe: Option<Recipe>,
    origin_digest: Option<Digest>,
}

#[derive(Serialize)]
struct Started {
    at: String,
    event: &'static str,
    #[serde(flatten)]
    context: ProvisionedContext,
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// Records that an engine came to this machine, or that the machine's own was chosen.
pub(super) async fn record_provided(
    runtime: &RuntimeDirs,
    installation: &EngineInstallation,
    manifest: Option<&Manifest>,
) {
    let record = Provided {
        at: now(),
        event: "provided",
        engine: "llamacpp",
        installation: installation.clone(),
        recipe: manifest.map(|manifest| manifest.recipe.clone()),
        origin_digest: manifest.and_then(|manifest| manifest.origin_digest),
    };
    append(runtime, record).await;
}

/// Records that an engine became ready, beside whatever the caller does next.
pub(crate) fn record_start(runtime: &RuntimeDirs, context: &ProvisionedContext) -> JoinHandle<()> {
    let record = Started {
        at: now(),
        event: "started",
        context: context.clone(),
    };
    let path = runtime.provenance().join("engines.jsonl");
    // Off the runtime's threads from the start: it is not given up half-way.
    tokio::task::spawn_blocking(move || told(append_jsonl(&path, &record)))
}

/// An engine that works is not given up because a record of it could not be written.
async fn append(runtime: &RuntimeDirs, record: impl Serialize + Send + 'static) {
    let path = runtime.provenance().join("engines.jsonl");
    told(blocking(move || append_jsonl(&path, &record)).await);
}

fn told(result: Result<(), FsError>) {
    if let Err(error) = result {
        tracing::warn!(error = %crate::error::chain(&error), "provenance is not recorded");
    }
}
