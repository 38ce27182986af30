//! The adapter: one server behind the trait.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use llama_orch_types::TaskId;
use reqwest::header::HeaderValue;
use worker_adapters_adapter_api::{
    CallApi, CancelReport, EngineHealth, EngineProps, EngineTask, TaskInput, TokenStream,
    WorkerAdapter, WorkerError,
};

use crate::answer::{Answer, Work};
use crate::client::{Client, encode};
use crate::live::LiveTasks;
use crate::reading::Kind;
use crate::settings::{Endpoint, Waits};
use crate::splice::splice;
use crate::wire::{CancelAnswer, ModelsAnswer, NativeRequest, ProbeRequest};

/// What a server is called that does not name itself.
const UNNAMED: &str = "unknown";

/// One server.
#[derive(Debug)]
pub struct OpenaiAdapter {
    client: Arc<Client>,
    live: Arc<LiveTasks>,
}

impl OpenaiAdapter {
    /// Connects to nothing yet. Fails if the token cannot be put into a header, or
    /// if the HTTP client cannot be made.
    pub fn new(endpoint: Endpoint, waits: Waits) -> Result<Self, WorkerError> {
        Ok(Self {
            client: Arc::new(Client::new(endpoint, waits)?),
            live: Arc::default(),
        })
    }

    pub fn endpoint(&self) -> &Endpoint {
        &self.client.endpoint
    }

    /// Whether the server answers, without a task.
    pub async fn check(&self) -> Result<(), WorkerError> {
        match self.client.get("/v1/models").await {
            Ok(_) => Ok(()),
            // A server that lists no models may still be well.
            Err(WorkerError::NotOffered { .. } | WorkerError::InvalidParams { .. }) => {
                self.client.get("/health").await.map(drop)
            }
            Err(error) => Err(error),
        }
    }

    /// A request for a task.
    fn work(&self, task: &EngineTask, correlation_id: &str) -> Result<Work, WorkerError> {
        let model = &self.client.endpoint.model;
        // Fails only for an id that no header may hold, which ours never are.
        let correlation_id = HeaderValue::from_str(correlation_id).ok();
        let correlation_id = correlation_id.filter(|id| !id.is_empty());
        let call = match &task.input {
            TaskInput::Call(call) => call,
            native => {
                let api = match native {
                    TaskInput::Prompt(_) => CallApi::Completions,
                    TaskInput::Messages(_) | TaskInput::Call(_) => CallApi::ChatCompletions,
                };
                return Ok(Work {
                    path: api.path(),
                    body: encode(&NativeRequest::new(task, model)?)?,
                    kind: Kind::Native {
                        max_tokens: task.max_tokens,
                    },
                    streams: true,
                    correlation_id,
                });
            }
        };
        let counts = matches!(call.api, CallApi::ChatCompletions | CallApi::Completions);
        let spliced = splice(&call.body, model, call.stream && counts).map_err(|error| {
            WorkerError::InvalidParams {
                message: format!("the body is not a JSON object: {error}"),
            }
        })?;
        Ok(Work {
            path: call.api.path(),
            body: spliced.body,
            kind: Kind::Call {
                api: call.api,
                usage_is_ours: spliced.usage_is_ours,
            },
            streams: call.stream,
            correlation_id,
        })
    }
}

#[async_trait]
impl WorkerAdapter for OpenaiAdapter {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        match self.check().await {
            Ok(()) => Ok(EngineHealth::Ready),
            Err(WorkerError::Unavailable {
                retry_after: Some(_),
                ..
            }) => Ok(EngineHealth::Loading),
            Err(error) => Err(error),
        }
    }

    /// What the server's list of models says: its `version` is its owner's name
    /// there, and a context length of 0 means that it tells none.
    async fn props(&self) -> Result<EngineProps, WorkerError> {
        let endpoint = &self.client.endpoint;
        let answer = match self.client.get("/v1/models").await {
            Ok(body) => serde_json::from_slice(&body).unwrap_or_default(),
            Err(WorkerError::NotOffered { .. } | WorkerError::InvalidParams { .. }) => {
                ModelsAnswer::default()
            }
            Err(error) => return Err(error),
        };
        let (version, ctx) = answer.about(&endpoint.model);
        Ok(EngineProps {
            version: version.unwrap_or_else(|| UNNAMED.to_owned()),
            model_path: None,
            ctx: ctx.unwrap_or(0),
            slots: endpoint.slots,
        })
    }

    async fn count_tokens(&self, _: &TaskInput) -> Result<u32, WorkerError> {
        Err(WorkerError::NotOffered {
            what: "counting tokens".to_owned(),
        })
    }

    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError> {
        self.submit_traced(task, "").await
    }

    async fn submit_traced(
        &self,
        task: EngineTask,
        correlation_id: &str,
    ) -> Result<TokenStream, WorkerError> {
        let work = self.work(&task, correlation_id)?;
        let live = self
            .live
            .register(task.id)
            .ok_or_else(|| WorkerError::InvalidParams {
                message: format!("task {} runs already", task.id),
            })?;
        let mut answer = Answer::start(Arc::clone(&self.client), live, work);
        answer.accepted().await?;
        Ok(answer.into_stream())
    }

    /// Another orchestratord is asked first, since it tells when the slot is free;
    /// every other server sees its client gone.
    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError> {
        let Some(handle) = self.live.get(task) else {
            return Ok(CancelReport::NotRunning);
        };
        // The server may end its answer before it says that it has.
        handle.set_unwanted();
        let freed = match handle.upstream() {
            Some(upstream) => {
                let path = format!("/v2/tasks/{upstream}/cancel");
                let limit = self.client.waits.response;
                let answer = self.client.ask(&path, Bytes::new(), limit).await;
                // A server that will not be asked notices by the connection.
                let answer = answer
                    .ok()
                    .and_then(|body| serde_json::from_slice::<CancelAnswer>(&body).ok());
                answer.and_then(|answer| answer.freed_ms)
            }
            None => None,
        };
        handle.cancel.cancel();
        Ok(match freed {
            Some(after_ms) => CancelReport::Freed { after_ms },
            None => CancelReport::NotShown,
        })
    }

    async fn probe(&self, limit: Duration) -> Result<(), WorkerError> {
        let request = ProbeRequest::new(&self.client.endpoint.model);
        let path = CallApi::ChatCompletions.path();
        let asked = self.client.ask(path, encode(&request)?, limit).await;
        match asked {
            // One that embeds or ranks refuses, and so is there.
            Ok(_) | Err(WorkerError::NotOffered { .. } | WorkerError::InvalidParams { .. }) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok(self.props().await?.version)
    }
}
