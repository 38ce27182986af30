//! The adapter: llama-server's routes behind the trait.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use llama_orch_types::TaskId;
use reqwest::StatusCode;
use tokio::sync::OnceCell;
use worker_adapters_adapter_api::{
    CancelReport, EngineHealth, EngineProps, EngineTask, TaskInput, TokenStream, WorkerAdapter,
    WorkerError,
};

use crate::calls::Call;
use crate::client::{EngineClient, encode};
use crate::completion::{Completion, Work};
use crate::deadlines::{PromptSpeed, guess_tokens};
use crate::freeing::wait_until_freed;
use crate::live::LiveTasks;
use crate::settings::AdapterSettings;
use crate::tagging::Tagging;
use crate::wire::{
    CompletionRequest, PropsAnswer, TemplateAnswer, TemplateRequest, TokenizeAnswer,
    TokenizeRequest,
};

/// One llama-server process.
#[derive(Debug)]
pub struct LlamaCppAdapter {
    client: Arc<EngineClient>,
    live: Arc<LiveTasks>,
    speed: Arc<PromptSpeed>,
    tagging: OnceCell<Option<Tagging>>,
}

impl LlamaCppAdapter {
    /// Connects to nothing yet. Fails if the API key cannot be put into a
    /// header, or if the HTTP client cannot be made.
    pub fn new(settings: AdapterSettings) -> Result<Self, WorkerError> {
        Ok(Self {
            client: Arc::new(EngineClient::new(settings)?),
            live: Arc::default(),
            speed: Arc::default(),
            tagging: OnceCell::new(),
        })
    }

    /// How many tasks run here.
    pub fn running(&self) -> usize {
        self.live.len()
    }

    /// The text that the engine shall continue.
    async fn prompt<'a>(&self, input: &'a TaskInput) -> Result<Cow<'a, str>, WorkerError> {
        match input {
            TaskInput::Prompt(text) => Ok(Cow::Borrowed(text)),
            TaskInput::Messages(messages) => {
                let request = TemplateRequest { messages };
                let answer: TemplateAnswer = self.client.ask("/apply-template", &request).await?;
                Ok(Cow::Owned(answer.prompt))
            }
            TaskInput::Call(_) => Err(WorkerError::NotOffered {
                what: "counting a call's tokens".to_owned(),
            }),
        }
    }

    /// How tasks are told apart, if they can be. Asked once; an engine that does
    /// not answer now is asked again for the next task.
    async fn tagging(&self) -> Option<&Tagging> {
        let asked = self.tagging.get_or_try_init(async || {
            let props: PropsAnswer = self.client.get("/props").await?;
            Ok::<_, WorkerError>(Tagging::of(&props))
        });
        asked.await.ok()?.as_ref()
    }
}

#[async_trait]
impl WorkerAdapter for LlamaCppAdapter {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        match self.client.health_status().await? {
            StatusCode::OK => Ok(EngineHealth::Ready),
            StatusCode::SERVICE_UNAVAILABLE => Ok(EngineHealth::Loading),
            status => Err(WorkerError::Protocol {
                what: format!("/health answered with status {status}"),
            }),
        }
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        let answer: PropsAnswer = self.client.get("/props").await?;
        Ok(answer.into())
    }

    async fn count_tokens(&self, input: &TaskInput) -> Result<u32, WorkerError> {
        let prompt = self.prompt(input).await?;
        let request = TokenizeRequest {
            content: &prompt,
            add_special: true,
            parse_special: true,
        };
        let answer: TokenizeAnswer = self.client.ask("/tokenize", &request).await?;
        Ok(u32::try_from(answer.tokens.len()).unwrap_or(u32::MAX))
    }

    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError> {
        if task.sampling.grammar.is_some() && task.sampling.json_schema.is_some() {
            return Err(WorkerError::InvalidParams {
                message: "`grammar` and `json_schema` exclude each other".to_owned(),
            });
        }
        let live = self
            .live
            .register(task.id)
            .ok_or_else(|| WorkerError::InvalidParams {
                message: format!("task {} runs already", task.id),
            })?;
        let cancel = live.handle.cancel.clone();
        if let TaskInput::Call(call) = &task.input {
            let tags = cancel.run_until_cancelled(self.tagging()).await;
            let tags = tags.ok_or(WorkerError::Cancelled)?.is_some();
            let speed = Arc::clone(&self.speed);
            let mut call = Call::start(&self.client, live, call, tags, speed)?;
            call.accepted().await?;
            return Ok(call.into_stream());
        }
        let prompt = cancel
            .run_until_cancelled(self.prompt(&task.input))
            .await
            .unwrap_or(Err(WorkerError::Cancelled))?;
        let mut prompt = prompt;
        prompt.to_mut().push_str(&task.answered);
        let tagging = self.tagging().await;
        let tag = tagging.map(|_| live.handle.tag());
        let work = Work {
            body: encode(&CompletionRequest::new(&task, &prompt, tag))?,
            prompt_tokens: guess_tokens(&prompt),
            max_tokens: task.max_tokens,
            tagging: tagging.cloned(),
            speed: Arc::clone(&self.speed),
        };
        let mut completion = Completion::start(Arc::clone(&self.client), live, work);
        completion.accepted().await?;
        Ok(completion.into_stream())
    }

    /// The stream notices when it is polled or dropped, which whoever holds it
    /// must go on doing. Where the engine does not show which slot the task is in,
    /// tasks that were not sent through this adapter make the report more cautious
    /// than need be.
    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError> {
        let Some(handle) = self.live.get(task) else {
            return Ok(CancelReport::NotRunning);
        };
        // Asked for when the task was submitted, or not at all.
        let tagged = self.tagging.get().is_some_and(Option::is_some) && !handle.is_untagged();
        Ok(wait_until_freed(&self.client, &self.live, tagged, task, &handle).await)
    }

    async fn probe(&self, limit: Duration) -> Result<(), WorkerError> {
        self.client.probe(limit).await
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok(self.props().await?.version)
    }
}
