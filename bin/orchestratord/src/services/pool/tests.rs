//! The actor with an adapter that breaks in ways no engine does.

mod calls;
mod handover;
mod on_demand;

use std::fmt::Debug;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
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

use super::lifecycle::RestartCause;
use super::{Change, Leaving, Phase, PoolHandle, PoolSettings, Submission, Wanted};
use crate::app::config::PoolConfig;
use crate::services::admission::{Client, Place, Priority};
use crate::services::event_log::{Failure, TaskEvent};
use crate::services::preparation::PreparationBoard;
use crate::services::resume::Carried;
use crate::services::tasks::{NewTask, TaskRecord};

const DEADLINE: Duration = Duration::from_secs(20);

/// What an engine answers, for those of which nothing else matters.
trait Answers: Debug + Send + Sync {
    fn answer(&self) -> TokenStream;
}

/// An engine that is well and answers so.
#[derive(Debug, Default)]
struct Answering<A>(A);

#[async_trait]
impl<A: Answers> WorkerAdapter for Answering<A> {
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
        Ok(self.0.answer())
    }

    async fn cancel(&self, _: TaskId) -> Result<CancelReport, WorkerError> {
        Ok(CancelReport::NotRunning)
    }

    async fn probe(&self, _: Duration) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok("x".to_owned())
    }
}

/// Panics over the first task and answers every later one.
#[derive(Debug, Default)]
struct BreaksOnce(AtomicUsize);

impl Answers for BreaksOnce {
    fn answer(&self) -> TokenStream {
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
        futures::stream::iter([Ok(TokenEvent::Started), Ok(end)]).boxed()
    }
}

pub(in crate::services) fn context() -> ProvisionedContext {
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
    resuming(false)
}

fn resuming(resumes: bool) -> Submission {
    let record = TaskRecord::new(NewTask {
        pool: PoolId::default_pool(),
        fallback: false,
        priority: Priority::default(),
        client: Client::Unnamed,
        correlation_id: "c".to_owned(),
        cancel_on_disconnect: false,
        resumes,
        start_within: None,
    });
    Submission {
        task: EngineTask {
            id: record.id,
            input: TaskInput::Prompt("a".to_owned()),
            answered: String::new(),
            max_tokens: 100,
            stop: Vec::new(),
            sampling: SamplingParams::default(),
        },
        record,
        max_tokens_given: true,
        fits: true,
        attempts: 0,
        carried: Carried::default(),
        place: Place::default(),
    }
}

fn pool(host: &AdapterHost) -> PoolHandle {
    let config = PoolConfig {
        queue_capacity: 4,
        default_max_tokens: 1,
        ..PoolConfig::default()
    };
    pool_of(config, host)
}

fn pool_of(config: PoolConfig, host: &AdapterHost) -> PoolHandle {
    let settings = PoolSettings::new(PoolId::default_pool(), Arc::new(config), DEADLINE);
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
    host.bind_adapter(context(), Arc::new(Answering::<BreaksOnce>::default()));
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
    host.bind_adapter(context(), Arc::new(Answering::<BreaksOnce>::default()));
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

/// Gives one token and is lost, each time; or answers with a fault of its own.
#[derive(Debug)]
struct Breaks {
    with: fn() -> WorkerError,
    tasks: Mutex<Vec<EngineTask>>,
}

impl Breaks {
    fn bound(host: &AdapterHost, with: fn() -> WorkerError) -> Arc<Self> {
        let adapter = Arc::new(Self {
            with,
            tasks: Mutex::default(),
        });
        host.bind_adapter(context(), adapter.clone());
        adapter
    }
}

#[async_trait]
impl WorkerAdapter for Breaks {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        Ok(EngineHealth::Ready)
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        Err(WorkerError::Cancelled)
    }

    async fn count_tokens(&self, _: &TaskInput) -> Result<u32, WorkerError> {
        Ok(1)
    }

    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError> {
        let mut tasks = self.tasks.lock().unwrap();
        let token = TokenEvent::Token {
            text: format!("{} ", tasks.len()).into(),
            index: 0,
            tokens_in: 1 + tasks.len() as u64,
            tokens_out: 2,
        };
        tasks.push(task);
        let events = [Ok(TokenEvent::Started), Ok(token), Err((self.with)())];
        Ok(futures::stream::iter(events).boxed())
    }

    async fn cancel(&self, _: TaskId) -> Result<CancelReport, WorkerError> {
        Ok(CancelReport::NotRunning)
    }

    async fn probe(&self, _: Duration) -> Result<(), WorkerError> {
        Err((self.with)())
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok("x".to_owned())
    }
}

fn reset() -> WorkerError {
    WorkerError::Reset {
        reason: "gone".to_owned(),
    }
}

#[tokio::test]
async fn a_task_that_ends_engines_does_not_do_it_for_ever() {
    let host = AdapterHost::new(HostSettings::default());
    let engine = Breaks::bound(&host, reset);
    let pool = pool(&host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    let submission = resuming(true);
    let record = Arc::clone(&submission.record);
    pool.submit(submission).await.unwrap();
    tokio::time::timeout(DEADLINE, record.log.closed())
        .await
        .expect("the task ends");
    let Some(TaskEvent::Error(failure)) = record.log.last() else {
        panic!("{:?}", record.log.last())
    };
    assert_eq!(failure.code, ErrorCode::WorkerReset);
    assert_eq!(record.log.text(), ("0 1 2 3 ".to_owned(), 4));
    let tasks = engine.tasks.lock().unwrap();
    let seen: Vec<(&str, u32)> = tasks
        .iter()
        .map(|task| (task.answered.as_str(), task.max_tokens))
        .collect();
    let expected = [("", 100), ("0 ", 98), ("0 1 ", 96), ("0 1 2 ", 94)];
    assert_eq!(seen, expected);
    assert_eq!(record.tokens_in.get(), Some(&1), "the prompt's own");
}

#[tokio::test]
async fn an_engines_own_fault_casts_doubt_and_ends_the_task() {
    let host = AdapterHost::new(HostSettings::default());
    let _engine = Breaks::bound(&host, || WorkerError::Protocol {
        what: "noise".to_owned(),
    });
    let pool = pool(&host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    assert!(matches!(ending(&pool).await, TaskEvent::Error(_)));
    let doubtful = pool.wait_for(|snapshot| snapshot.doubt == 1);
    tokio::time::timeout(DEADLINE, doubtful)
        .await
        .expect("the pool doubts its engine")
        .unwrap();
    assert!(host.probe(&PoolId::default_pool(), DEADLINE).await.is_err());
}

#[tokio::test]
async fn a_drain_ends_a_task_that_waits_to_be_gone_on_with() {
    let host = AdapterHost::new(HostSettings::default());
    let _engine = Breaks::bound(&host, reset);
    let pool = pool(&host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    let submission = resuming(true);
    let log = Arc::clone(&submission.record.log);
    pool.submit(submission).await.unwrap();
    // It waits between two engines, or runs: either way it ends, and once.
    let stopped = async {
        let stopping = pool.wait_for(|snapshot| snapshot.phase == Phase::Stopping);
        stopping.await.unwrap();
        pool.change(Change::Stopped).await;
    };
    let drained = async { tokio::join!(pool.end(Leaving::DaemonEnds, Duration::ZERO), stopped) };
    tokio::time::timeout(DEADLINE, drained)
        .await
        .expect("the drain ends");
    assert!(matches!(log.last(), Some(TaskEvent::Error(_))));
}

#[tokio::test]
async fn a_pool_that_fails_ends_what_its_lost_engine_gives_back() {
    let host = AdapterHost::new(HostSettings::default());
    let _engine = Breaks::bound(&host, reset);
    let mut config = (*pool(&host).settings().config).clone();
    config.restart.crashes = 1;
    let pool = pool_of(config, &host);
    pool.change(Change::Ready(Arc::new(context()).into())).await;
    let submission = resuming(true);
    let log = Arc::clone(&submission.record.log);
    pool.submit(submission).await.unwrap();
    let failure = Failure::new(ErrorCode::PoolUnavailable, "no more");
    pool.change(Change::Exited {
        cause: RestartCause::Crash,
        failure,
    })
    .await;
    let failed = pool.wait_for(|snapshot| snapshot.phase == Phase::Failed);
    failed.await.unwrap();
    tokio::time::timeout(DEADLINE, log.closed())
        .await
        .expect("the task ends");
}
