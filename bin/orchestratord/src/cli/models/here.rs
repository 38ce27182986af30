//! The work itself, where no daemon runs.

#[cfg(feature = "provisioning")]
pub(super) use provisioned::Here;
#[cfg(not(feature = "provisioning"))]
pub(super) use without::Here;

#[cfg(feature = "provisioning")]
mod provisioned {
    use provisioners_model_provisioner::ModelProvisioner;

    use super::super::ModelsError;
    use super::super::way::Pulled;
    use crate::api::catalog::view::{ModelView, ModelsView, RemovedView, VerifiedView};
    use crate::app::bootstrap::{self, StartError};
    use crate::cli::Context;
    use crate::services::pulls::PulledModel;
    use crate::ui::progress_reporter;

    /// The store.
    pub(crate) struct Here {
        models: ModelProvisioner,
    }

    impl Here {
        pub(crate) fn new(context: &Context) -> Result<Self, ModelsError> {
            let loaded = context.source.load();
            let loaded = loaded.map_err(|error| ModelsError::Setup(StartError::Setup(error)))?;
            let (cache, runtime) =
                bootstrap::directories(&loaded.config).map_err(ModelsError::Setup)?;
            let reporter = progress_reporter(context.log_format, &context.bars);
            let models = ModelProvisioner::new(loaded.config.models, &cache, &runtime, reporter);
            let models = models.map_err(|error| ModelsError::Setup(StartError::Models(error)))?;
            Ok(Self { models })
        }

        pub(crate) async fn list(&self) -> Result<ModelsView, ModelsError> {
            let entries = self.models.entries().await?;
            let view = |entry| ModelView::new(entry, Vec::new());
            Ok(ModelsView {
                models: entries.into_iter().map(view).collect(),
            })
        }

        pub(crate) async fn show(&self, name: &str) -> Result<ModelView, ModelsError> {
            Ok(ModelView::new(self.models.entry(name).await?, Vec::new()))
        }

        pub(crate) async fn remove(&self, name: &str) -> Result<RemovedView, ModelsError> {
            Ok(self.models.remove(name).await?.into())
        }

        pub(crate) async fn verify(
            &self,
            name: &str,
            repair: bool,
        ) -> Result<VerifiedView, ModelsError> {
            Ok(self.models.verify(name, repair).await?.into())
        }

        /// One after the other: together they would only share the same line.
        pub(crate) async fn pull_all(
            &self,
            references: &[String],
        ) -> Vec<Result<Pulled, ModelsError>> {
            let mut results = Vec::new();
            for reference in references {
                results.push(self.pull(reference).await);
            }
            results
        }

        async fn pull(&self, reference: &str) -> Result<Pulled, ModelsError> {
            let model = self.models.ensure(reference).await?;
            Ok(Pulled {
                model: model.id,
                pull_id: None,
                result: Some(PulledModel {
                    digest: model.digest.to_string(),
                    path: model.path.display().to_string(),
                    size_bytes: model.size_bytes,
                }),
            })
        }
    }
}

/// A build without provisioning keeps no models.
#[cfg(not(feature = "provisioning"))]
#[allow(clippy::unused_async, reason = "the same shape in both builds")]
mod without {
    use super::super::ModelsError;
    use super::super::way::Pulled;
    use crate::api::catalog::view::{ModelView, ModelsView, RemovedView, VerifiedView};
    use crate::cli::Context;
    use crate::services::event_log::Failure;

    /// Never made.
    pub(crate) enum Here {}

    impl Here {
        pub(crate) fn new(_: &Context) -> Result<Self, ModelsError> {
            let failure = Failure::no_models_in_this_build();
            Err(ModelsError::Failure(Box::new(failure)))
        }

        pub(crate) async fn list(&self) -> Result<ModelsView, ModelsError> {
            match *self {}
        }

        pub(crate) async fn show(&self, _: &str) -> Result<ModelView, ModelsError> {
            match *self {}
        }

        pub(crate) async fn remove(&self, _: &str) -> Result<RemovedView, ModelsError> {
            match *self {}
        }

        pub(crate) async fn verify(&self, _: &str, _: bool) -> Result<VerifiedView, ModelsError> {
            match *self {}
        }

        pub(crate) async fn pull_all(&self, _: &[String]) -> Vec<Result<Pulled, ModelsError>> {
            match *self {}
        }
    }
}
