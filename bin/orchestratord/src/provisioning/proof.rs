//! Lets an engine show that it works: a completion of one token.

use std::time::Duration;

use adapter_host::{AdapterHost, HostError, HostSettings};
use futures::StreamExt;
use llama_orch_types::{ProvisionedContext, TaskId};
use worker_adapters_adapter_api::{EngineTask, SamplingParams, TaskInput};

/// Why an engine did not show it.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProofError {
    #[error("the completion failed")]
    Failed(#[source] HostError),
    #[error("there was no token within {:.1} s", .limit.as_secs_f64())]
    TooSlow { limit: Duration },
}

/// Has an engine, which need not be bound, generate one token within `limit`.
pub(super) async fn one_token(
    context: &ProvisionedContext,
    limit: Duration,
) -> Result<(), ProofError> {
    let proved = tokio::time::timeout(limit, complete(context, limit)).await;
    match proved {
        Ok(completed) => completed.map_err(ProofError::Failed),
        Err(_) => Err(ProofError::TooSlow { limit }),
    }
}

async fn complete(context: &ProvisionedContext, limit: Duration) -> Result<(), HostError> {
    // A host of its own, so that no task can come to an engine on trial.
    let host = AdapterHost::new(HostSettings {
        first_token_timeout: limit,
        next_token_timeout: limit,
        ..HostSettings::default()
    });
    host.bind(context.clone())?;
    let task = EngineTask {
        id: TaskId::generate(),
        input: TaskInput::Prompt("1".to_owned()),
        max_tokens: 1,
        stop: Vec::new(),
        sampling: SamplingParams::default(),
    };
    let mut stream = host.submit(&context.pool_id, task).await?;
    while let Some(event) = stream.next().await {
        event?;
    }
    Ok(())
}
