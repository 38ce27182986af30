//! Pools that come and go: the actor's part. The supervisor is the test.

use futures::stream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::app::config::LoadPolicy;
use crate::services::pool::lifecycle::{ReloadMode, ReloadState};
use crate::services::pool::{PoolSnapshot, Unload, UnloadCause};
use crate::services::tasks::Admitted;

/// Finishes its tasks once the gate is open.
#[derive(Debug, Default)]
struct Gated(CancellationToken);

impl Answers for Gated {
    fn answer(&self) -> TokenStream {
        let end = TokenEvent::End(EndSummary {
            tokens_in: 1,
            tokens_cached: 0,
            tokens_out: 0,
            prompt_time_ms: 0.0,
            decode_time_ms: 0.0,
            finish_reason: FinishReason::Stop,
            effective: serde_json::Value::Null,
        });
        let open = self.0.clone();
        let end = stream::once(async move {
            open.cancelled_owned().await;
            Ok(end)
        });
        let begun = stream::iter([Ok(TokenEvent::Started)]);
        begun.chain(end).boxed()
    }
}

/// A pool, whose engine finishes tasks when the gate is open.
struct Bench {
    pool: PoolHandle,
    gate: CancellationToken,
}

impl Bench {
    fn new(config: PoolConfig) -> Self {
        let host = AdapterHost::new(HostSettings::default());
        let gate = CancellationToken::new();
        host.bind_adapter(context(), Arc::new(Answering(Gated(gate.clone()))));
        Self {
            pool: pool_of(config, &host),
            gate,
        }
    }

    async fn until(&self, what: &str, wanted: impl FnMut(&PoolSnapshot) -> bool) -> PoolSnapshot {
        let found = timeout(DEADLINE, self.pool.wait_for(wanted)).await;
        found.expect(what).expect("the pool lives")
    }

    async fn until_phase(&self, phase: Phase) -> PoolSnapshot {
        self.until(phase.as_str(), |seen| seen.phase == phase).await
    }

    /// Waits for an order and returns what is wanted.
    async fn ordered(&self, wanted: fn(&Wanted) -> bool) {
        let mut orders = self.pool.orders();
        let found = timeout(DEADLINE, orders.wait_for(|order| wanted(&order.wanted))).await;
        found.expect("it is ordered").expect("the pool lives");
    }

    /// Follows the order to start.
    async fn load(&self) {
        self.ordered(starts).await;
        self.pool.change(Change::Starting).await;
        let ready = Change::Ready(Arc::new(context()).into());
        self.pool.change(ready).await;
    }

    async fn submit(&self) -> (Arc<TaskRecord>, Admitted) {
        let submission = submission();
        let record = Arc::clone(&submission.record);
        let admitted = self.pool.submit(submission).await.unwrap();
        (record, admitted)
    }
}

fn starts(wanted: &Wanted) -> bool {
    matches!(wanted, Wanted::Start { .. })
}

fn rests(wanted: &Wanted) -> bool {
    matches!(wanted, Wanted::Rest)
}

async fn completed(record: &TaskRecord) {
    timeout(DEADLINE, record.log.closed())
        .await
        .expect("the task ends");
    let last = record.log.last();
    assert!(matches!(last, Some(TaskEvent::End(_))), "{last:?}");
}

fn on_demand() -> PoolConfig {
    PoolConfig {
        load: LoadPolicy::OnDemand,
        ..PoolConfig::default()
    }
}

#[tokio::test]
async fn the_first_task_has_the_engine_loaded() {
    let bench = Bench::new(on_demand());
    bench.gate.cancel();
    let snapshot = bench.pool.snapshot();
    assert_eq!(snapshot.phase, Phase::Unloaded);
    assert!(snapshot.idle_since.is_some() && snapshot.loaded_since.is_none());
    assert!(
        rests(&bench.pool.orders().borrow().wanted),
        "nothing is asked for"
    );
    bench.pool.change(Change::Stopped).await;
    let (record, _) = bench.submit().await;
    bench.load().await;
    completed(&record).await;
    let idle = |seen: &PoolSnapshot| seen.idle_since.is_some();
    let snapshot = bench.until("it is idle", idle).await;
    assert_eq!(
        (snapshot.phase, snapshot.loads.measured()),
        (Phase::Ready, 1)
    );
    assert!(snapshot.loaded_since.is_some() && snapshot.load_took.is_some());
    assert_eq!(snapshot.unloads_at, None, "no time is set");
}

#[tokio::test]
async fn a_start_is_predicted_from_loads_that_were_measured() {
    let bench = Bench::new(on_demand());
    bench.gate.cancel();
    let (_, guessed) = bench.submit().await;
    assert!(guessed.predicted_start >= Duration::from_secs(5), "a guess");
    bench.ordered(starts).await;
    bench.pool.change(Change::Starting).await;
    tokio::time::sleep(Duration::from_millis(30)).await;
    bench.load().await;
    let idle = |seen: &PoolSnapshot| seen.phase == Phase::Ready && seen.idle_since.is_some();
    let took = bench.until("it is idle", idle).await.load_took.unwrap();
    assert!(took >= Duration::from_millis(30), "{took:?}");
    let asked = UnloadCause::Asked;
    bench.pool.unload(Unload::IfIdle, asked).await.unwrap();
    bench.pool.change(Change::Stopped).await;
    bench.until_phase(Phase::Unloaded).await;
    let (_, measured) = bench.submit().await;
    assert_eq!(measured.predicted_start, took);
}

#[tokio::test]
async fn no_task_for_long_unloads_and_one_in_that_moment_is_not_lost() {
    let bench = Bench::new(PoolConfig {
        idle_ttl_seconds: Some(0),
        ..PoolConfig::default()
    });
    let (first, _) = bench.submit().await;
    bench.load().await;
    bench.until_phase(Phase::Ready).await;
    bench.gate.cancel();
    completed(&first).await;
    bench.ordered(rests).await;
    // The end of the engine is ordered, and not reported yet.
    let (second, admitted) = bench.submit().await;
    assert_eq!(admitted.queue_position, 0);
    let unloading = bench.until_phase(Phase::Stopping).await;
    assert!(unloading.unloading);
    bench.pool.change(Change::Stopped).await;
    bench.load().await;
    completed(&second).await;
}

#[tokio::test]
async fn a_pinned_pool_stays_whatever_wants_its_memory() {
    let bench = Bench::new(PoolConfig {
        idle_ttl_seconds: Some(0),
        pin: true,
        ..PoolConfig::default()
    });
    bench.load().await;
    let snapshot = bench.until_phase(Phase::Ready).await;
    assert_eq!(snapshot.unloads_at, None);
    for how in [Unload::IfIdle, Unload::Yield] {
        let why = UnloadCause::Memory("another".to_owned());
        let refused = bench.pool.unload(how, why).await.unwrap_err();
        assert_eq!(refused.code, ErrorCode::AdmissionReject);
    }
    assert_eq!(bench.pool.snapshot().phase, Phase::Ready);
    let asked = UnloadCause::Asked;
    bench.pool.unload(Unload::IfIdle, asked).await.unwrap();
    bench.ordered(rests).await;
}

#[tokio::test]
async fn a_busy_pool_is_unloaded_only_if_it_may_finish_what_runs() {
    let bench = Bench::new(PoolConfig::default());
    let why = || UnloadCause::Memory("another".to_owned());
    let (running, _) = bench.submit().await;
    let refused = bench.pool.unload(Unload::IfIdle, why()).await.unwrap_err();
    assert!(refused.message.contains("1 wait"), "{refused:?}");
    bench.load().await;
    let (waiting, _) = bench.submit().await;
    bench
        .until("one runs", |seen| seen.running == 1 && seen.queued() == 1)
        .await;
    let refused = bench.pool.unload(Unload::IfIdle, why()).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::AdmissionReject);
    assert!(refused.retriable && refused.message.contains("1 tasks run"));
    bench.pool.unload(Unload::Yield, why()).await.unwrap();
    let (late, _) = bench.submit().await;
    let seen = bench.until_phase(Phase::Draining).await;
    assert!(seen.unloading);
    assert_eq!((seen.running, seen.unloads_at), (1, None));
    bench.gate.cancel();
    completed(&running).await;
    bench.ordered(rests).await;
    let seen = bench.until_phase(Phase::Stopping).await;
    assert_eq!((seen.running, seen.queued()), (0, 2), "none was begun");
    bench.pool.change(Change::Stopped).await;
    bench.load().await;
    completed(&waiting).await;
    completed(&late).await;
    let steps = bench.pool.snapshot().transitions;
    let passes = |phase| steps.iter().any(|step| step.to == phase);
    assert!(passes(Phase::Unloaded), "{steps:?}");
    let cause = |phase| steps.iter().rfind(|step| step.to == phase).unwrap();
    assert_eq!(cause(Phase::Provisioning).cause, "a task came");
    assert_eq!(
        cause(Phase::Draining).cause,
        "unload: its memory is wanted for another"
    );
}

#[tokio::test]
async fn settings_of_a_pool_that_comes_and_goes_change_at_run_time() {
    let bench = Bench::new(PoolConfig::default());
    bench.load().await;
    bench.until_phase(Phase::Ready).await;
    let serial = bench.pool.orders().borrow().serial;
    let mut config = (*bench.pool.settings().config).clone();
    config.load = LoadPolicy::OnDemand;
    config.idle_ttl_seconds = Some(1000);
    bench.pool.apply(config.clone()).await.unwrap();
    let snapshot = bench.pool.snapshot();
    assert_eq!(snapshot.phase, Phase::Ready);
    let left = snapshot.unloads_at.unwrap() - snapshot.loaded_since.unwrap();
    assert!(left >= Duration::from_secs(1000));
    config.pin = true;
    bench.pool.apply(config.clone()).await.unwrap();
    assert_eq!(bench.pool.snapshot().unloads_at, None);
    assert_eq!(
        bench.pool.orders().borrow().serial,
        serial,
        "no engine is touched"
    );
    config.pin = false;
    config.idle_ttl_seconds = Some(0);
    bench.pool.apply(config).await.unwrap();
    bench.ordered(rests).await;
}

#[tokio::test]
async fn an_unloaded_pool_adopts_another_configuration_and_tries_it_when_it_is_wanted() {
    let bench = Bench::new(on_demand());
    let mut config = on_demand();
    config.flags = vec!["--mlock".to_owned()];
    bench.pool.apply(config.clone()).await.unwrap();
    let snapshot = bench.pool.snapshot();
    let reload = snapshot.reload.unwrap();
    assert_eq!(
        (reload.mode, reload.state),
        (ReloadMode::Restart, ReloadState::Done)
    );
    assert_eq!(snapshot.phase, Phase::Unloaded);
    assert_eq!(snapshot.settings.config.flags, config.flags);
    assert!(rests(&bench.pool.orders().borrow().wanted));
    bench.submit().await;
    bench.ordered(starts).await;
    let order = bench.pool.orders().borrow().clone();
    assert!(
        matches!(order.wanted, Wanted::Start { config: wanted, .. } if wanted.flags == config.flags)
    );
}

#[tokio::test]
async fn a_load_on_demand_that_fails_ends_its_tasks_with_the_reason() {
    let bench = Bench::new(on_demand());
    let (record, _) = bench.submit().await;
    bench.ordered(starts).await;
    let failure = Failure::new(ErrorCode::PoolUnavailable, "no such model");
    let log = Vec::new();
    bench.pool.change(Change::NotStarted { failure, log }).await;
    timeout(DEADLINE, record.log.closed())
        .await
        .expect("the task ends");
    let Some(TaskEvent::Error(said)) = record.log.last() else {
        panic!("{:?}", record.log.last())
    };
    assert_eq!(said.message, "no such model");
    let snapshot = bench.until_phase(Phase::Failed).await;
    assert!(snapshot.next_try.is_some());
}
