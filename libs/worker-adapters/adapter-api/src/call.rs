//! Requests in the engine's own HTTP API, passed on as they came.
//!
//! The API that clients know (OpenAI's, and Anthropic's) is the engine's own. What
//! it is asked and what it answers is carried, not understood: an option that
//! this program has never heard of works if the engine knows it.

use bytes::Bytes;
use bytestring::ByteString;

/// One request, checked for nothing but what routing needs.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineCall {
    pub api: CallApi,
    /// A JSON object.
    pub body: Bytes,
    /// Whether the answer comes as server-sent events, as the body asks.
    pub stream: bool,
}

/// Which route of the engine is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallApi {
    ChatCompletions,
    Completions,
    Responses,
    Embeddings,
    /// Anthropic's.
    Messages,
    /// Anthropic's.
    CountTokens,
    Rerank,
    Tokenize,
    Detokenize,
}

impl CallApi {
    /// The engine's route.
    pub fn path(self) -> &'static str {
        match self {
            Self::ChatCompletions => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Responses => "/v1/responses",
            Self::Embeddings => "/v1/embeddings",
            Self::Messages => "/v1/messages",
            Self::CountTokens => "/v1/messages/count_tokens",
            Self::Rerank => "/v1/rerank",
            Self::Tokenize => "/tokenize",
            Self::Detokenize => "/detokenize",
        }
    }

    /// Whether it generates text, token by token.
    pub fn generates(self) -> bool {
        matches!(
            self,
            Self::ChatCompletions | Self::Completions | Self::Responses | Self::Messages
        )
    }
}

/// One server-sent event of an answer. Its texts may be parts of the buffer that
/// it was read into: who keeps them for long copies them.
#[derive(Debug, Clone, PartialEq)]
pub struct CallChunk {
    /// Its `event:` name, where the API gives one.
    pub name: Option<ByteString>,
    /// Its data, as the engine sent it.
    pub data: ByteString,
    /// What it adds to the answer's text; empty for most events that are no
    /// token, and for thoughts and tool calls.
    pub text: ByteString,
    /// Tokens generated so far, as far as the engine has told.
    pub tokens_out: u64,
}

/// The whole answer to a call that does not stream.
#[derive(Debug, Clone, PartialEq)]
pub struct CallAnswer {
    /// JSON, as the engine sent it.
    pub body: Bytes,
    /// The text in it; empty where it is none.
    pub text: String,
}
