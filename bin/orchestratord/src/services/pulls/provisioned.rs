//! Pulls models with the provisioner.

use std::sync::Arc;

use async_trait::async_trait;
use provision_kit::progress::Reporter;
use provisioners_model_provisioner::ModelProvisioner;

use super::{Fetch, Identity, PulledModel};
use crate::services::event_log::Failure;

#[async_trait]
impl Fetch for ModelProvisioner {
    fn identify(&self, reference: &str) -> Result<Identity, Failure> {
        let identity = ModelProvisioner::identify(self, reference);
        let identity = identity.map_err(|error| Failure::from_models(&error))?;
        Ok(Identity {
            model: identity.id,
            key: identity.key,
            has_secret: identity.has_secret,
        })
    }

    async fn fetch(
        &self,
        reference: &str,
        reporter: Arc<dyn Reporter>,
    ) -> Result<PulledModel, Failure> {
        // One of its own: the model is in use until it is dropped.
        let models = self.beside(reporter);
        let model = models.ensure(reference).await;
        let model = model.map_err(|error| Failure::from_models(&error))?;
        Ok(PulledModel {
            digest: model.digest.to_string(),
            path: model.path.display().to_string(),
            size_bytes: model.size_bytes,
        })
    }
}
