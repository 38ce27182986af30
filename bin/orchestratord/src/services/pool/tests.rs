//! The actor with an adapter that breaks in ways no engine does.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use adapter_host::{AdapterHost, HostSettings};
use async_trait::async_trait;
use futures::StreamExt;
use llama_orch_types::{
    EngineKind, ErrorCode, PoolId, ProvisionedContext, ProvisioningMode, ReplicaId, TaskId,
};
use provision_kit::progress::Silent;
use worker_adapters_adapter_api::{
    CancelReport, EndSummary, EngineHealth, EngineProps, EngineTask, FinishReason, SamplingParams,
    TaskInput, TokenEvent, TokenStream, WorkerAdapter, WorkerError,
};

use super::{Change, Phase, PoolHandle, PoolSettings, Submission, Wanted};
use crate::app::config::PoolConfig;
use crate::services::admission::Priority;
use crate::services::event_log::TaskEvent;
use crate::services::preparation::PreparationBoard;
use crate::services::tasks::{NewTask, TaskRecord};

const DEADLINE: Duration = Duration::from_secs(20);

/// Panics over the first task and answers every later one.
#[derive(Debug, Default)]
struct BreaksOnce(AtomicUsize);

#[async_trait]
impl WorkerAdapter for BreaksOnce {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        Ok(EngineHealth::Ready)
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        Err(WorkerError::Cancelled)
    }

    async fn count_tokens(&self, _: &TaskInput) -> Result<u32, WorkerError> {
        Ok(1)
    }

    async fn submit(&self, _: EngineTask) -> Result<TokenStream, WorkerError> {
        assert!(
            self.0.fetch_add(1, Ordering::Relaxed) > 0,
            "this adapter breaks once"
        );
        let end = TokenEvent::End(EndSummary {
            tokens_in: 1,
            tokens_cached: 0,
            tokens_out: 0,
            prompt_time_ms: 0.0,
            decode_time_ms: 0.0,
            finish_reason: FinishReason::Stop,
            effective: serde_json::Value::Null,
        });
        Ok(futures::stream::iter([Ok(TokenEvent::Started), Ok(end)]).boxed())
    }

    async fn cancel(&self, _: TaskId) -> Result<CancelReport, WorkerError> {
        Ok(CancelReport::NotRunning)
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok("x".to_owned())
    }
}

fn context() -> ProvisionedContext {
    ProvisionedContext {
        pool_id: PoolId::default_pool(),
        replica_id: ReplicaId::first(),
        url: "none:".to_owned(),
        engine: EngineKind::Llamacpp,
        engine_version: "x".to_owned(),
        engine_digest: None,
        provisioning_mode: ProvisioningMode::System,
        model: None,
        slots: 1,
        ctx: 4096,
        flags: Vec::new(),
        pid: None,
    }
}

fn submission() -> Submission {
    let record = TaskRecord::new(NewTask {
        pool: PoolId::default_pool(),
        fallback: false,
        priority: Priority::default(),
        correlation_id: "c".to_owned(),
        cancel_on_disconnect: false,
        start_within: None,
    });
    Submission {
        task: EngineTask {
            id: record.id,
            input: TaskInput::Prompt("a".to_owned()),
            max_tokens: 1,
            stop: Vec::new(),
            sampling: SamplingParams::default(),
        },
        record,
        max_tokens_given: true,
        fits: true,
        attempts: 0,
        serial: 0,
    }
}

fn pool(host: &AdapterHost) -> PoolHandle {
    let config = Arc::new(PoolConfig {
        queue_capacity: 4,
        default_max_tokens: 1,
        ..PoolConfig::default()
    });
    let settings = PoolSettings::new(PoolId::default_pool(), config, DEADLINE);
    PoolHandle::start(
        settings,
        host.clone(),
        PreparationBoard::new(Arc::new(Silent)),
    )
}

async fn ending(pool: &PoolHandle) -> TaskEvent {
    let submission = submission();
    let log = Arc::clone(&submission.record.log);
    pool.submit(submission).await.unwrap();
    tokio::time::timeout(DEADLINE, log.closed())
        .await
        .expect("the task ends");
    log.last().unwrap()
}

#[tokio::test]
async fn a_run_that_breaks_ends_its_task_and_gives_its_slot_back() {
    let host = AdapterHost::new(HostSettings::default());
    host.bind_adapter(context(), Arc::new(BreaksOnce::default()));
    let pool = pool(&host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    assert!(matches!(ending(&pool).await, TaskEvent::Error(_)));
    assert!(
        matches!(ending(&pool).await, TaskEvent::End(_)),
        "the one slot is free again"
    );
}

#[tokio::test]
async fn a_dropped_submission_leaves_no_reader_waiting() {
    let submission = submission();
    let log = Arc::clone(&submission.record.log);
    drop(submission);
    assert!(matches!(log.last(), Some(TaskEvent::Error(_))));
}

#[tokio::test]
async fn a_configuration_is_applied_as_a_difference() {
    let host = AdapterHost::new(HostSettings::default());
    host.bind_adapter(context(), Arc::new(BreaksOnce::default()));
    let pool = pool(&host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    let mut config = (*pool.settings().config).clone();
    let first = pool.orders().borrow().serial;
    pool.apply(config.clone()).await.unwrap();
    config.queue_capacity = 7;
    config.restart.crashes = 9;
    pool.apply(config.clone()).await.unwrap();
    let snapshot = pool.wait_for(|snapshot| snapshot.settings.queue_capacity == 7);
    let snapshot = snapshot.await.unwrap();
    assert_eq!(snapshot.phase, Phase::Ready);
    assert!(snapshot.reload.is_none());
    assert_eq!(pool.orders().borrow().serial, first, "no engine is touched");

    config.flags = vec!["--mlock".to_owned()];
    pool.apply(config.clone()).await.unwrap();
    let order = pool.orders().borrow().clone();
    assert!(matches!(order.wanted, Wanted::Replace(wanted) if wanted.flags == config.flags));
    // The same once more is what is on its way; another is one too many.
    pool.apply(config.clone()).await.unwrap();
    config.slots = 2;
    let refused = pool.apply(config).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::AdmissionReject);
    assert!(pool.settings().config.flags.is_empty(), "not yet");
}

#[tokio::test]
async fn a_report_that_an_order_overtook_changes_nothing() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let first = pool.orders().borrow().serial;
    pool.drain_pool(DEADLINE).await.unwrap();
    let stopping = pool.wait_for(|snapshot| snapshot.phase == Phase::Stopping);
    stopping.await.unwrap();
    // Ready in the moment in which its end was ordered.
    let ready = Change::Ready(Arc::new(context()).into());
    pool.report(first, ready).await;
    pool.change(Change::Stopped).await;
    let stopped = pool.wait_for(|snapshot| snapshot.phase == Phase::Stopped);
    assert!(stopped.await.unwrap().context.is_none());
}
