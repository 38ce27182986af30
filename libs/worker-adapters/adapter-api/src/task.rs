//! What is asked of an engine.

use llama_orch_types::TaskId;
use serde::{Deserialize, Serialize};

use crate::call::EngineCall;

/// One task as the engine gets it: checked, complete, with nothing left to
/// default.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineTask {
    pub id: TaskId,
    pub input: TaskInput,
    /// The answer's text so far, from which the engine goes on: what another
    /// engine had sent before it was lost. Empty for a new task.
    pub answered: String,
    /// The most tokens to generate, at least 1.
    pub max_tokens: u32,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    pub sampling: SamplingParams,
}

/// A text to continue, a conversation to answer, or a call.
#[derive(Debug, Clone, PartialEq)]
pub enum TaskInput {
    /// Continued as it is, without a chat template.
    Prompt(String),
    /// Put through the model's own chat template.
    Messages(Vec<ChatMessage>),
    /// A request in the engine's own API, which says everything itself: what else
    /// the task holds but its id does not matter.
    Call(EngineCall),
}

impl TaskInput {
    /// Size of the text in bytes. A token is at least one byte long, so this
    /// bounds the number of tokens of the text itself from above.
    pub fn len_bytes(&self) -> usize {
        match self {
            Self::Prompt(text) => text.len(),
            Self::Messages(messages) => messages
                .iter()
                .map(|message| message.role.len() + message.content.len())
                .sum(),
            Self::Call(call) => call.body.len(),
        }
    }
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChatMessage {
    /// `system`, `user` or `assistant`.
    pub role: String,
    pub content: String,
}

/// How tokens are chosen. What is `None` is left to the engine's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct SamplingParams {
    pub seed: Option<u32>,
    /// 0 is greedy.
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
    pub min_p: Option<f64>,
    /// 1 is off.
    pub repeat_penalty: Option<f64>,
    /// GBNF grammar the answer must follow; excludes `json_schema`.
    pub grammar: Option<String>,
    /// JSON schema the answer must follow; excludes `grammar`.
    pub json_schema: Option<serde_json::Value>,
}
