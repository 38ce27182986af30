//! The model that the config names.

use std::sync::Arc;

use llama_orch_types::ModelMetadata;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::progress::Reporter;
use provisioners_model_provisioner::{ModelProvisioner, ModelProvisionerConfig};

use crate::{Failure, boxed};

/// Turns a path or any other model reference into a verified file.
pub(crate) async fn provide(
    reference: &str,
    cache: &CacheDirs,
    runtime: &RuntimeDirs,
    reporter: Arc<dyn Reporter>,
) -> Result<ModelMetadata, Failure> {
    let config = ModelProvisionerConfig::default();
    let provisioner = ModelProvisioner::new(config, cache, runtime, reporter).map_err(boxed)?;
    provisioner.ensure(reference).await.map_err(boxed)
}
