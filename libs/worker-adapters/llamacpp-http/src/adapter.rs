//! The adapter: llama-server's routes behind the trait.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use llama_orch_types::TaskId;
use reqwest::StatusCode;
use tokio::time::{Instant, sleep_until};
use worker_adapters_adapter_api::{
    CancelReport, EngineHealth, EngineProps, EngineTask, TaskInput, TokenStream, WorkerAdapter,
    WorkerError,
};

use crate::client::{EngineClient, encode};
use crate::completion::Completion;
use crate::live::LiveTasks;
use crate::settings::AdapterSettings;
use crate::wire::{
    CompletionRequest, PropsAnswer, SlotAnswer, TemplateAnswer, TemplateRequest, TokenizeAnswer,
    TokenizeRequest,
};

/// While the engine decodes it sees a client gone between two tokens, so the
/// slot is looked at soon and then less and less often.
const FIRST_LOOK_DECODING: Duration = Duration::from_millis(3);
const DECODING_BOUND: Duration = Duration::from_secs(2);
/// While the engine works on a prompt it looks for its client only after a
/// second without any other request. Looking more often would keep it from it.
const LOOK_IN_PROMPT: Duration = Duration::from_millis(1100);
const PROMPT_BOUND: Duration = Duration::from_secs(6);

/// One llama-server process.
#[derive(Debug)]
pub struct LlamaCppAdapter {
    client: Arc<EngineClient>,
    live: Arc<LiveTasks>,
}

impl LlamaCppAdapter {
    /// Connects to nothing yet. Fails if the API key cannot be put into a
    /// header, or if the HTTP client cannot be made.
    pub fn new(settings: AdapterSettings) -> Result<Self, WorkerError> {
        Ok(Self {
            client: Arc::new(EngineClient::new(settings)?),
            live: Arc::default(),
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
        }
    }

    /// Waits, with a bound, until the engine works on no more slots than tasks
    /// other than this one run here.
    async fn wait_until_freed(&self, task: TaskId, decoding: bool) -> CancelReport {
        let start = Instant::now();
        let bound = if decoding {
            DECODING_BOUND
        } else {
            PROMPT_BOUND
        };
        let mut look = if decoding {
            FIRST_LOOK_DECODING
        } else {
            LOOK_IN_PROMPT
        };
        while look <= bound {
            sleep_until(start + look).await;
            match self.busy_slots(start + bound).await {
                Ok(busy) if busy <= self.live.others_in_slots(task) => {
                    let after_ms = start.elapsed().as_millis() as u64;
                    return CancelReport::Freed { after_ms };
                }
                Ok(_) => {}
                // This engine was told not to show its slots.
                Err(WorkerError::InvalidParams { .. }) => break,
                Err(error) => tracing::debug!(%error, %task, "the engine's slots cannot be seen"),
            }
            // 3, 5, 8, 12, 18, … ms, or every 1.1 s.
            let pause = if decoding { look / 2 } else { LOOK_IN_PROMPT };
            look = start.elapsed().max(look) + pause.max(Duration::from_millis(2));
        }
        let waited_ms = start.elapsed().as_millis() as u64;
        CancelReport::NotSeenFree { waited_ms }
    }

    async fn busy_slots(&self, deadline: Instant) -> Result<usize, WorkerError> {
        let limit = (deadline - Instant::now()).max(Duration::from_millis(100));
        let slots: Vec<SlotAnswer> = self.client.get_within("/slots", limit).await?;
        Ok(slots.iter().filter(|slot| slot.is_processing).count())
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
        let prompt = cancel
            .run_until_cancelled(self.prompt(&task.input))
            .await
            .unwrap_or(Err(WorkerError::Cancelled))?;
        let body = encode(&CompletionRequest::new(&task, &prompt))?;
        let mut completion = Completion::start(Arc::clone(&self.client), live, body);
        completion.accepted().await?;
        Ok(completion.into_stream())
    }

    /// The stream notices when it is polled or dropped, which whoever holds it
    /// must go on doing. Other tasks of the same engine that were not sent
    /// through this adapter make the report more cautious than need be.
    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError> {
        let Some(handle) = self.live.get(task) else {
            return Ok(CancelReport::NotRunning);
        };
        handle.cancel.cancel();
        Ok(self.wait_until_freed(task, handle.is_decoding()).await)
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok(self.props().await?.version)
    }
}
