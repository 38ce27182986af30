//! What is written down about the use of a model that was here already: nobody who wants to start
//! an engine with it waits for the disk.

use std::path::PathBuf;

use provision_kit::chain::one_line;
use tokio::task::JoinHandle;

use crate::provenance::{self, ModelProvenance};
use crate::store::{ModelRecord, Store};

/// The records of one use, on their way to the disk. They get there when this is dropped, too,
/// unless the program ends before.
#[derive(Debug)]
#[must_use = "a program that ends at once loses the records of what it used"]
pub struct Recording(Option<JoinHandle<Option<String>>>);

impl Recording {
    /// Everything is written already.
    pub(super) fn done() -> Self {
        Self(None)
    }

    /// Begins to write. Must be called within a tokio runtime.
    pub(super) fn begin(
        store: Store,
        used: ModelRecord,
        directory: PathBuf,
        line: ModelProvenance,
    ) -> Self {
        Self(Some(tokio::task::spawn_blocking(move || {
            // The model is verified: a record that cannot be written does not change that.
            if let Err(error) = store.used(&used, &line.reference) {
                tracing::warn!(path = %used.path.display(), error = %one_line(&error), "a model is used, but its record was not written");
            }
            provenance::append(&directory, &line)
                .err()
                .map(|error| unrecorded(&error))
        })))
    }

    /// Waits until the records are written, or are known not to be, which is logged.
    pub async fn written(self) {
        if let Some(trouble) = self.trouble().await {
            tracing::warn!("{trouble}");
        }
    }

    /// Waits as long; why there is no record, if there is none.
    pub(super) async fn trouble(self) -> Option<String> {
        match self.0?.await {
            Ok(trouble) => trouble,
            Err(broken) => Some(unrecorded(&broken)),
        }
    }
}

/// What is told of a model whose use is not recorded.
pub(super) fn unrecorded(why: &dyn std::error::Error) -> String {
    format!(
        "the model is fine, but no record of it was written: {}",
        one_line(why)
    )
}
