//! What becomes of tasks when their engine is replaced, told of again, or silent.

use std::sync::atomic::AtomicU32;

use futures::stream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::TimeoutPhase;

use super::*;
use crate::services::event_log::End;
use crate::services::pool::lifecycle::ReloadState;
use crate::services::pool::{Bound, PoolSnapshot, ReloadRequest};

const MUTE: &str = "mute:";
const DEAF: &str = "deaf:";

/// Says one word and then nothing more, unless it is to finish.
#[derive(Debug)]
struct Slow {
    word: &'static str,
    finishes: bool,
    /// Not even a word.
    mute: bool,
    /// Takes no connection.
    deaf: bool,
    /// Questions beside a task that are answered; later ones are not in time.
    answers: AtomicU32,
    cancelled: CancellationToken,
}

impl Slow {
    fn bound(host: &AdapterHost, url: &str, finishes: bool) -> Arc<ProvisionedContext> {
        Self::answering(host, url, finishes, u32::MAX)
    }

    fn answering(
        host: &AdapterHost,
        url: &str,
        finishes: bool,
        answers: u32,
    ) -> Arc<ProvisionedContext> {
        let context = ProvisionedContext {
            url: url.to_owned(),
            slots: 2,
            ..context()
        };
        let word = if finishes { "new" } else { "old " };
        let mute = url == MUTE;
        let answers = AtomicU32::new(answers);
        host.bind_adapter(
            context.clone(),
            Arc::new(Self {
                word,
                finishes,
                mute,
                deaf: url == DEAF,
                answers,
                cancelled: CancellationToken::new(),
            }),
        );
        Arc::new(context)
    }
}

#[async_trait]
impl WorkerAdapter for Slow {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        Ok(EngineHealth::Ready)
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        Err(WorkerError::Cancelled)
    }

    async fn count_tokens(&self, _: &TaskInput) -> Result<u32, WorkerError> {
        let left = self.answers.load(Ordering::Relaxed);
        if left == 0 {
            return Err(WorkerError::Timeout {
                phase: TimeoutPhase::Response,
                after: Duration::from_secs(10),
            });
        }
        self.answers.store(left - 1, Ordering::Relaxed);
        Ok(1)
    }

    async fn submit(&self, _: EngineTask) -> Result<TokenStream, WorkerError> {
        if self.deaf {
            return Err(WorkerError::Timeout {
                phase: TimeoutPhase::Connect,
                after: Duration::from_secs(1),
            });
        }
        let token = TokenEvent::Token {
            text: self.word.into(),
            index: 0,
            tokens_in: 1,
            tokens_out: 1,
        };
        let end = TokenEvent::End(EndSummary {
            tokens_in: 1,
            tokens_cached: 0,
            tokens_out: 1,
            prompt_time_ms: 0.0,
            decode_time_ms: 0.0,
            finish_reason: FinishReason::Stop,
            effective: serde_json::Value::Null,
        });
        let word = (!self.mute).then_some(Ok(token));
        let begun = stream::iter([Ok(TokenEvent::Started)]).chain(stream::iter(word));
        Ok(if self.finishes {
            begun.chain(stream::iter([Ok(end)])).boxed()
        } else {
            let silence = stream::pending().take_until(self.cancelled.clone().cancelled_owned());
            begun.chain(silence).boxed()
        })
    }

    async fn cancel(&self, _: TaskId) -> Result<CancelReport, WorkerError> {
        self.cancelled.cancel();
        Ok(CancelReport::Freed { after_ms: 0 })
    }

    async fn probe(&self, _: Duration) -> Result<(), WorkerError> {
        Ok(())
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok("x".to_owned())
    }
}

fn bound(context: &Arc<ProvisionedContext>) -> Bound {
    Arc::clone(context).into()
}

async fn until(
    pool: &PoolHandle,
    what: &str,
    wanted: impl FnMut(&PoolSnapshot) -> bool,
) -> PoolSnapshot {
    let found = timeout(DEADLINE, pool.wait_for(wanted)).await;
    found.expect(what).expect("the pool lives")
}

/// Submits a task, and waits until it has its first word.
async fn begun(pool: &PoolHandle, submission: Submission) -> Arc<TaskRecord> {
    let record = Arc::clone(&submission.record);
    pool.submit(submission).await.unwrap();
    let word = async {
        while record.log.text().1 == 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, word).await.expect("it gets a word");
    record
}

/// Reports are about the newest order, so it must be there.
async fn until_asked_for(pool: &PoolHandle) {
    let asked = |seen: &PoolSnapshot| seen.phase == Phase::Provisioning;
    until(pool, "an engine is asked for", asked).await;
}

async fn last(record: &TaskRecord) -> TaskEvent {
    let closed = timeout(DEADLINE, record.log.closed());
    closed.await.expect("the task ends");
    record.log.last().unwrap()
}

async fn expect_end(record: &TaskRecord) -> Box<End> {
    match last(record).await {
        TaskEvent::End(end) => end,
        other => panic!("{other:?}"),
    }
}

async fn expect_failure(record: &TaskRecord) -> ErrorCode {
    match last(record).await {
        TaskEvent::Error(failure) => failure.code,
        other => panic!("{other:?}"),
    }
}

fn quick_drain(host: &AdapterHost) -> PoolHandle {
    let settings = PoolSettings::new(
        PoolId::default_pool(),
        Arc::new(PoolConfig::default()),
        Duration::from_millis(20),
    );
    let board = PreparationBoard::new(Arc::new(Silent));
    PoolHandle::start(settings, host.clone(), board)
}

#[tokio::test]
async fn a_retiring_engines_tasks_go_on_with_the_new_one_where_they_may() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = quick_drain(&host);
    let old = Slow::bound(&host, "old:", false);
    pool.change(Change::Ready(bound(&old))).await;
    let resumes = begun(&pool, resuming(true)).await;
    let fails = begun(&pool, resuming(false)).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    let new = Slow::bound(&host, "new:", true);
    pool.change(Change::Replaced(bound(&new))).await;
    assert_eq!(expect_end(&resumes).await.resumed, 1);
    assert_eq!(resumes.log.text().0, "old new");
    assert_eq!(expect_failure(&fails).await, ErrorCode::WorkerReset);
}

#[tokio::test]
async fn a_task_that_has_no_token_yet_begins_anew_on_the_new_engine() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = quick_drain(&host);
    let old = Slow::bound(&host, MUTE, false);
    pool.change(Change::Ready(bound(&old))).await;
    let submission = submission();
    let record = Arc::clone(&submission.record);
    pool.submit(submission).await.unwrap();
    let started = async {
        while record.started.get().is_none() {
            tokio::task::yield_now().await;
        }
    };
    timeout(DEADLINE, started).await.expect("it has begun");
    pool.reload(ReloadRequest::default()).await.unwrap();
    let new = Slow::bound(&host, "new:", true);
    pool.change(Change::Replaced(bound(&new))).await;
    assert_eq!(expect_end(&record).await.resumed, 0);
    assert_eq!(record.log.text().0, "new");
}

#[tokio::test]
async fn a_reload_that_drains_first_keeps_running_tasks_that_can_go_on() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = quick_drain(&host);
    let old = Slow::bound(&host, "old:", false);
    pool.change(Change::Ready(bound(&old))).await;
    let resumes = begun(&pool, resuming(true)).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    pool.change(Change::NoRoom("it is small".to_owned())).await;
    until(&pool, "the engine is to stop", |seen| {
        seen.phase == Phase::Stopping
    })
    .await;
    pool.change(Change::Stopped).await;
    until_asked_for(&pool).await;
    let new = Slow::bound(&host, "new:", true);
    pool.change(Change::Ready(bound(&new))).await;
    assert_eq!(expect_end(&resumes).await.resumed, 1);
    assert_eq!(resumes.log.text().0, "old new");
}

#[tokio::test]
async fn an_engine_that_is_told_of_again_is_the_same_engine() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let engine = Slow::bound(&host, "old:", false);
    pool.change(Change::Ready(bound(&engine))).await;
    begun(&pool, submission()).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    pool.drain_pool(DEADLINE).await.unwrap();
    assert!(matches!(pool.orders().borrow().wanted, Wanted::Keep));
    pool.change(Change::Ready(bound(&engine))).await;
    pool.resume().await.unwrap();
    let seen = pool.snapshot();
    assert_eq!(seen.phase, Phase::Ready);
    assert_eq!((seen.engines, seen.running, seen.retiring), (1, 1, 0));
}

#[tokio::test]
async fn a_task_never_goes_to_an_engine_that_the_pool_does_not_know_yet() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let old = Slow::bound(&host, "old:", false);
    pool.change(Change::Ready(bound(&old))).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    // Bound already, and the pool is not told yet.
    let new = Slow::bound(&host, "new:", true);
    let submission = submission();
    let record = Arc::clone(&submission.record);
    pool.submit(submission).await.unwrap();
    until(&pool, "the task is given back", |seen| {
        seen.dispatched == 1 && seen.running == 0
    })
    .await;
    assert!(record.started.get().is_none());
    pool.change(Change::Replaced(bound(&new))).await;
    expect_end(&record).await;
    assert_eq!(record.log.text().0, "new");
}

#[tokio::test]
async fn an_engine_that_is_slow_beside_its_tasks_is_doubted_and_one_that_is_silent_is_ended() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let engine = Slow::answering(&host, "old:", false, 0);
    pool.change(Change::Ready(bound(&engine))).await;
    let working = begun(&pool, submission()).await;
    let mut asks = submission();
    (asks.fits, asks.task.input) = (false, TaskInput::Messages(Vec::new()));
    let asking = Arc::clone(&asks.record);
    pool.submit(asks).await.unwrap();
    assert_eq!(expect_failure(&asking).await, ErrorCode::DecodeTimeout);
    let seen = until(&pool, "doubt", |seen| seen.doubt == 1).await;
    assert!(seen.distrust.is_none(), "{:?}", seen.distrust);
    pool.cancel(working.id).await.unwrap();
    let mut asks = submission();
    (asks.fits, asks.task.input) = (false, TaskInput::Messages(Vec::new()));
    pool.submit(asks).await.unwrap();
    until(&pool, "distrust", |seen| seen.distrust.is_some()).await;
}

#[tokio::test]
async fn an_engine_that_takes_no_connection_is_ended_however_many_tasks_wait() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let engine = Slow::bound(&host, DEAF, false);
    pool.change(Change::Ready(bound(&engine))).await;
    for _ in 0..4 {
        pool.submit(submission()).await.unwrap();
    }
    let seen = until(&pool, "distrust", |seen| seen.distrust.is_some()).await;
    assert!(seen.running + seen.queued() > 0, "others are kept");
}

#[tokio::test]
async fn only_what_turned_a_reload_is_its_error() {
    let host = AdapterHost::new(HostSettings::default());
    let pool = pool(&host);
    let old = Slow::bound(&host, "old:", false);
    pool.change(Change::Ready(bound(&old))).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    let crash = |message: &str| Change::Exited {
        cause: RestartCause::Crash,
        failure: Failure::new(ErrorCode::PoolUnavailable, message),
    };
    pool.change(crash("the old one crashed")).await;
    until_asked_for(&pool).await;
    let new = Slow::bound(&host, "new:", true);
    pool.change(Change::Ready(bound(&new))).await;
    let over = |seen: &PoolSnapshot| {
        seen.reload
            .as_ref()
            .is_some_and(|reload| reload.state.is_over())
    };
    let reload = until(&pool, "done", over).await.reload.unwrap();
    assert_eq!((reload.state, reload.error), (ReloadState::Done, None));

    pool.reload(ReloadRequest::default()).await.unwrap();
    pool.change(crash("the old one crashed again")).await;
    until_asked_for(&pool).await;
    let failure = Failure::new(ErrorCode::PoolUnavailable, "the new one cannot load");
    pool.change(Change::NotStarted {
        failure,
        log: Vec::new(),
    })
    .await;
    let back = |seen: &PoolSnapshot| {
        let state = seen.reload.as_ref().map(|reload| reload.state);
        state == Some(ReloadState::RollingBack)
    };
    until(&pool, "the old configuration is tried", back).await;
    pool.change(Change::Ready(bound(&old))).await;
    let reload = until(&pool, "rolled back", over).await.reload.unwrap();
    assert_eq!(reload.state, ReloadState::RolledBack);
    assert_eq!(reload.error.unwrap().message, "the new one cannot load");
}
