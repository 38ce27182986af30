//! Errors as these clients know them: one text.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::services::event_log::Failure;

/// The one shape of every error, as an answer and as the last line of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct OllamaError {
    /// What went wrong, and what to try next.
    pub error: String,
}

impl OllamaError {
    pub fn of(failure: &Failure) -> Self {
        let error = match &failure.hint {
            Some(hint) => format!("{}; {hint}", failure.message),
            None => failure.message.clone(),
        };
        Self { error }
    }
}
