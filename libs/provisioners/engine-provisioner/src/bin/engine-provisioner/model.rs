//! The model that the config names.

use std::sync::Arc;

use llama_orch_types::ModelMetadata;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::Reporter;

use crate::Failure;

pub(crate) async fn provide(
    reference: &str,
    cache: &CacheDirs,
    runtime: &RuntimeDirs,
    reporter: Arc<dyn Reporter>,
) -> Result<ModelMetadata, Failure> {
    let _ = (reference, cache, runtime, reporter);
    std::future::pending().await
}
