//! The host's promises, with mock engines in the process and fake ones outside.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Arc;
use std::time::Duration;

use adapter_host::{AdapterHost, BindingHealth, HostError, HostSettings};
use futures::StreamExt;
use llama_orch_types::{
    EngineKind, ErrorCode, Hinted, PoolId, ProvisionedContext, ProvisioningMode, ReplicaId, TaskId,
};
use test_harness_fake_engine::{FakeEngine, Fault, Script};
use worker_adapters_adapter_api::{
    CancelReport, EngineHealth, EngineTask, SamplingParams, TaskInput, TokenEvent, TokenStream,
    WorkerError,
};
use worker_adapters_mock::{MockAdapter, MockFault, MockScript};

fn pool() -> PoolId {
    PoolId::default_pool()
}

fn context(engine: EngineKind, replica: &str, url: &str) -> ProvisionedContext {
    ProvisionedContext {
        pool_id: pool(),
        replica_id: replica.parse().unwrap(),
        url: url.to_owned(),
        engine,
        engine_version: "b11434".to_owned(),
        engine_digest: None,
        provisioning_mode: ProvisioningMode::Source,
        model: None,
        slots: 2,
        ctx: 4096,
        flags: vec![],
        pid: None,
    }
}

fn mock_context() -> ProvisionedContext {
    context(EngineKind::Mock, "r0", "mock:")
}

fn bind_mock(host: &AdapterHost, replica: &str, script: MockScript) -> MockAdapter {
    let mock = MockAdapter::new(script);
    host.bind_adapter(
        context(EngineKind::Mock, replica, "mock:"),
        Arc::new(mock.clone()),
    );
    mock
}

fn endless() -> MockScript {
    MockScript::endless(Duration::from_millis(10))
}

fn task(max_tokens: u32) -> EngineTask {
    EngineTask {
        id: TaskId::generate(),
        input: TaskInput::Prompt("three short words".into()),
        answered: String::new(),
        max_tokens,
        stop: vec![],
        sampling: SamplingParams::default(),
    }
}

async fn first_token(stream: &mut TokenStream) {
    while !matches!(
        stream.next().await.unwrap().unwrap(),
        TokenEvent::Token { .. }
    ) {}
}

fn running(host: &AdapterHost) -> Vec<(usize, usize)> {
    host.snapshot()
        .iter()
        .map(|binding| (binding.running, binding.draining))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn an_unbound_pool_is_told_as_such() {
    let host = AdapterHost::default();
    let error = host.submit(&pool(), task(1)).await.err().unwrap();
    assert!(matches!(&error, HostError::NotBound { pool } if pool.is_default()));
    assert_eq!(
        (error.code(), error.retriable()),
        (ErrorCode::PoolUnready, true)
    );
    assert!(host.context(&pool()).is_none());
    assert!(host.health(&pool()).await.is_err());
    assert_eq!(
        host.cancel(&pool(), TaskId::generate()).await.unwrap(),
        CancelReport::NotRunning
    );
}

#[tokio::test(start_paused = true)]
async fn a_rebind_never_cuts_a_running_stream() {
    let host = AdapterHost::default();
    let old = bind_mock(&host, "r0", endless());
    let mut stream = host.submit(&pool(), task(50)).await.unwrap();
    first_token(&mut stream).await;
    let new = bind_mock(&host, "r0", endless());
    assert_eq!(running(&host), [(0, 1)]);
    let second = host.submit(&pool(), task(3)).await.unwrap();
    assert_eq!(running(&host), [(1, 1)]);
    assert_eq!((old.tasks().len(), new.tasks().len()), (1, 1));
    let rest: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert!(matches!(rest.last(), Some(TokenEvent::End(end)) if end.tokens_out == 50));
    drop(second);
    assert_eq!(running(&host), [(0, 0)]);
}

#[tokio::test(start_paused = true)]
async fn a_cancel_reaches_the_adapter_that_runs_the_task() {
    let host = AdapterHost::default();
    let old = bind_mock(&host, "r0", endless());
    let task = task(1000);
    let id = task.id;
    let mut stream = host.submit(&pool(), task).await.unwrap();
    first_token(&mut stream).await;
    bind_mock(&host, "r0", endless());
    let other: PoolId = "other".parse().unwrap();
    assert_eq!(
        host.cancel(&other, id).await.unwrap(),
        CancelReport::NotRunning
    );
    assert!(matches!(
        host.cancel(&pool(), id).await.unwrap(),
        CancelReport::Freed { .. }
    ));
    assert!(matches!(
        stream.next().await,
        Some(Err(WorkerError::Cancelled))
    ));
    assert_eq!((old.running(), running(&host)), (0, vec![(0, 0)]));
    assert_eq!(
        host.cancel(&pool(), id).await.unwrap(),
        CancelReport::NotRunning
    );
}

#[tokio::test(start_paused = true)]
async fn after_an_unbind_nothing_new_runs_and_the_old_runs_on() {
    let host = AdapterHost::default();
    bind_mock(&host, "r0", endless());
    let mut stream = host.submit(&pool(), task(20)).await.unwrap();
    first_token(&mut stream).await;
    assert!(host.unbind(&pool(), &ReplicaId::first()));
    assert!(!host.unbind(&pool(), &ReplicaId::first()));
    assert!(matches!(
        host.submit(&pool(), task(1)).await,
        Err(HostError::NotBound { .. })
    ));
    assert!(host.snapshot().is_empty());
    let rest: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert!(matches!(rest.last(), Some(TokenEvent::End(_))));
}

#[tokio::test(start_paused = true)]
async fn a_task_counts_as_running_until_its_last_event_or_its_drop() {
    let host = AdapterHost::default();
    let mock = bind_mock(&host, "r0", endless());
    let mut dropped = host.submit(&pool(), task(1000)).await.unwrap();
    first_token(&mut dropped).await;
    let mut ended = host.submit(&pool(), task(2)).await.unwrap();
    assert_eq!(running(&host), [(2, 0)]);
    while !matches!(ended.next().await.unwrap().unwrap(), TokenEvent::End(_)) {}
    assert_eq!(running(&host), [(1, 0)], "the end is enough");
    drop(dropped);
    assert_eq!((running(&host), mock.running()), (vec![(0, 0)], 0));
}

#[tokio::test(start_paused = true)]
async fn a_refused_task_leaves_nothing_running() {
    let host = AdapterHost::default();
    bind_mock(
        &host,
        "r0",
        MockScript {
            fault: Some(MockFault::Refuse),
            ..MockScript::default()
        },
    );
    let task = task(1);
    for _ in 0..2 {
        let error = host.submit(&pool(), task.clone()).await.err().unwrap();
        assert_eq!(error.code(), ErrorCode::InvalidParams);
    }
    assert_eq!(running(&host), [(0, 0)]);
}

#[tokio::test(start_paused = true)]
async fn one_task_runs_only_once_at_a_time() {
    let host = AdapterHost::default();
    bind_mock(&host, "r0", endless());
    let task = task(1000);
    let stream = host.submit(&pool(), task.clone()).await.unwrap();
    let again = host.submit(&pool(), task.clone()).await.err().unwrap();
    assert!(matches!(again, HostError::AlreadyRunning { task: id } if id == task.id));
    assert_eq!(running(&host), [(1, 0)], "the first one is still tracked");
    drop(stream);
    drop(host.submit(&pool(), task).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn tasks_go_to_the_replica_with_the_most_free_slots() {
    let host = AdapterHost::default();
    let first = bind_mock(&host, "r0", endless());
    let second = bind_mock(&host, "r1", endless());
    let mut streams = Vec::new();
    for _ in 0..4 {
        streams.push(host.submit(&pool(), task(1000)).await.unwrap());
    }
    assert_eq!((first.running(), second.running()), (2, 2));
    assert_eq!(
        host.context(&pool()).unwrap().replica_id,
        ReplicaId::first()
    );
}

#[tokio::test(start_paused = true)]
async fn health_is_asked_and_remembered() {
    let host = AdapterHost::default();
    let mock = bind_mock(
        &host,
        "r0",
        MockScript {
            health: EngineHealth::Loading,
            ..MockScript::default()
        },
    );
    assert_eq!(host.snapshot()[0].health, BindingHealth::Unknown);
    assert_eq!(host.health(&pool()).await.unwrap(), EngineHealth::Loading);
    assert_eq!(host.snapshot()[0].health, BindingHealth::Loading);
    mock.set_script(MockScript::default());
    assert_eq!(host.health(&pool()).await.unwrap(), EngineHealth::Ready);
    assert_eq!(host.snapshot()[0].health, BindingHealth::Ready);
}

#[test]
fn a_mock_context_binds_only_in_a_build_that_has_the_mock() {
    let outcome = AdapterHost::default().bind(mock_context());
    if cfg!(feature = "mock-adapter") {
        outcome.unwrap();
    } else {
        let error = outcome.unwrap_err();
        assert!(matches!(
            error,
            HostError::UnsupportedEngine {
                engine: EngineKind::Mock,
                ..
            }
        ));
        assert!(error.hint().unwrap().contains("mock-adapter"));
    }
}

#[tokio::test]
async fn a_real_process_is_bound_from_its_context_alone() {
    let engine = FakeEngine::start(&Script::with_pieces(&["a", "b"]));
    let host = AdapterHost::default();
    host.bind(context(EngineKind::Llamacpp, "r0", &engine.url()))
        .unwrap();
    assert_eq!(host.health(&pool()).await.unwrap(), EngineHealth::Ready);
    assert_eq!(host.props(&pool()).await.unwrap().version, "b11434");
    let input = TaskInput::Prompt("one two".into());
    assert_eq!(host.count_tokens(&pool(), &input).await.unwrap(), 2);
    let stream = host.submit(&pool(), task(9)).await.unwrap();
    let events: Vec<_> = stream.map(Result::unwrap).collect().await;
    assert_eq!(events.len(), 4);
    assert!(matches!(&events[3], TokenEvent::End(end) if end.tokens_out == 2));
}

#[tokio::test]
async fn the_hosts_timeouts_reach_the_adapter() {
    let fault = Some(Fault::Hang { after_tokens: 1 });
    let engine = FakeEngine::start(&Script {
        fault,
        ..Script::default()
    });
    let settings = HostSettings {
        next_token_timeout: Duration::from_millis(120),
        ..HostSettings::default()
    };
    let host = AdapterHost::new(settings);
    host.bind(context(EngineKind::Llamacpp, "r0", &engine.url()))
        .unwrap();
    let stream = host.submit(&pool(), task(9)).await.unwrap();
    let last = stream
        .map(Result::err)
        .collect::<Vec<_>>()
        .await
        .pop()
        .flatten();
    assert!(
        matches!(last, Some(WorkerError::Timeout { after, .. }) if after.as_millis() == 120),
        "{last:?}"
    );
    assert_eq!(running(&host), [(0, 0)]);
}

#[tokio::test]
async fn a_task_for_one_engine_never_goes_to_its_successor() {
    let host = AdapterHost::default();
    let old = mock_context();
    bind_mock(&host, "r0", MockScript::default());
    assert!(host.submit_to(&old, task(1), "").await.is_ok());
    let new = context(EngineKind::Mock, "r0", "mock:next");
    let adapter = MockAdapter::new(MockScript::default());
    host.bind_adapter(new.clone(), Arc::new(adapter));
    let refused = host.submit_to(&old, task(1), "").await.err().unwrap();
    assert!(matches!(refused, HostError::NotBound { .. }));
    assert!(refused.retriable());
    assert!(host.submit_to(&new, task(1), "").await.is_ok());
}
