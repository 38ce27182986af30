//! Calls in the engine's own API, from the queue to the log's end, with a fake
//! engine in a process of its own.

use test_harness_fake_engine::{FakeEngine, Fault, Script};
use tokio::time::timeout;
use worker_adapters_adapter_api::{CallAnswer, CallApi, EngineCall};

use super::*;
use crate::services::event_log::{Answer, Chunk, End};
use crate::services::pool::{Cancelled, ReloadRequest};

/// Binds the engine, and tells under which context.
fn bound(host: &AdapterHost, engine: &FakeEngine) -> Arc<ProvisionedContext> {
    let context = ProvisionedContext {
        url: engine.url(),
        ..context()
    };
    host.bind(context.clone()).unwrap();
    Arc::new(context)
}

/// A pool whose engine is ready, and lets tasks go at once when it is replaced.
async fn ready(engine: &FakeEngine) -> (AdapterHost, PoolHandle) {
    let host = AdapterHost::new(HostSettings::default());
    let settings = PoolSettings::new(
        PoolId::default_pool(),
        Arc::new(PoolConfig::default()),
        Duration::from_millis(20),
    );
    let board = PreparationBoard::new(Arc::new(Silent));
    let pool = PoolHandle::start(settings, host.clone(), board);
    let context = bound(&host, engine);
    pool.change(Change::Ready(context.into())).await;
    (host, pool)
}

fn call(stream: bool) -> Submission {
    call_of(&serde_json::json!({
        "messages": [{"role": "user", "content": "one two three"}], "stream": stream,
    }))
}

fn call_of(body: &serde_json::Value) -> Submission {
    let mut submission = submission();
    submission.fits = false;
    submission.task.input = TaskInput::Call(EngineCall {
        api: CallApi::ChatCompletions,
        body: body.to_string().into(),
        stream: body["stream"] == true,
    });
    submission
}

async fn submit(pool: &PoolHandle, submission: Submission) -> Arc<TaskRecord> {
    let record = Arc::clone(&submission.record);
    pool.submit(submission).await.unwrap();
    record
}

/// All events of a task, once it is over.
async fn events(record: &TaskRecord) -> Vec<TaskEvent> {
    timeout(DEADLINE, record.log.closed())
        .await
        .expect("the task ends");
    let mut cursor = record.log.cursor(0);
    let mut events = Vec::new();
    while let Some(batch) = cursor.read().await {
        events.extend(batch.into_iter().map(|(_, event)| event));
    }
    events
}

fn chunks(events: &[TaskEvent]) -> Vec<&Chunk> {
    let chunks = events.iter().filter_map(|event| match event {
        TaskEvent::Chunk(chunk) => Some(chunk),
        _ => None,
    });
    chunks.collect()
}

fn answers(events: &[TaskEvent]) -> Vec<&Answer> {
    let answers = events.iter().filter_map(|event| match event {
        TaskEvent::Answer(answer) => Some(&**answer),
        _ => None,
    });
    answers.collect()
}

fn end(events: &[TaskEvent]) -> &End {
    match events.last() {
        Some(TaskEvent::End(end)) => end,
        other => panic!("{other:?}"),
    }
}

fn failure(events: &[TaskEvent]) -> &Failure {
    match events.last() {
        Some(TaskEvent::Error(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let come_true = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    };
    timeout(DEADLINE, come_true).await.expect(what);
}

#[tokio::test]
async fn a_streamed_call_is_kept_chunk_by_chunk_and_has_its_receipt() {
    let engine = FakeEngine::start(&Script::with_pieces(&["Hä", "llo"]));
    let (_host, pool) = ready(&engine).await;
    let record = submit(&pool, call(true)).await;
    let events = events(&record).await;
    assert!(matches!(events[0], TaskEvent::Started(_)));
    let chunks = chunks(&events);
    assert_eq!(chunks.len(), 4, "role, two pieces, the reason: {chunks:?}");
    assert_eq!(events.len(), 6);
    let indices: Vec<_> = chunks
        .iter()
        .filter(|chunk| !chunk.token.t.is_empty())
        .map(|chunk| (&*chunk.token.t, chunk.token.i))
        .collect();
    assert_eq!(indices, [("Hä", 0), ("llo", 1)]);
    assert_eq!(record.log.text(), ("Hällo".to_owned(), 2));
    assert_eq!(record.log.pieces(), 2);
    let end = end(&events);
    assert_eq!((end.tokens_in, end.tokens_out), (Some(3), 2));
    assert_eq!(end.finish_reason, FinishReason::Stop);
    let receipt = end.receipt.as_ref().unwrap();
    assert_eq!(receipt.provisioning_mode, "system");
    assert!(receipt.engine_says.is_some());
    assert!(record.is_answering() && record.started.get().is_some());
}

#[tokio::test]
async fn an_answer_in_one_piece_is_kept_once_and_as_it_came() {
    let engine = FakeEngine::start(&Script::with_pieces(&["Hä", "llo"]));
    let (_host, pool) = ready(&engine).await;
    let record = submit(&pool, call(false)).await;
    let events = events(&record).await;
    let [answer] = answers(&events)[..] else {
        panic!("{events:?}")
    };
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
    assert_eq!(body["choices"][0]["message"]["content"], "Hällo");
    assert_eq!(record.log.text(), ("Hällo".to_owned(), 1));
    assert_eq!(end(&events).tokens_out, 2);
    assert!(record.log.bytes() > answer.body.len());
}

#[tokio::test]
async fn a_call_is_cancelled_wherever_it_is() {
    let endless = FakeEngine::start(&Script::endless(5));
    let (_host, pool) = ready(&endless).await;
    let streamed = submit(&pool, call(true)).await;
    let whole = submit(&pool, call(false)).await;
    let queued = submit(&pool, call(true)).await;
    until("it streams", || streamed.log.pieces() > 0).await;

    // In the queue: at once, and it never gets to the engine.
    pool.cancel(queued.id).await.unwrap();
    let queued = events(&queued).await;
    assert_eq!(end(&queued).finish_reason, FinishReason::Cancelled);
    assert_eq!(queued.len(), 1);

    // In mid-stream: nothing comes after the end, and the slot is free.
    let cancelled = pool.cancel(streamed.id).await.unwrap();
    let Cancelled::Running { report, .. } = cancelled else {
        panic!("{cancelled:?}")
    };
    assert!(matches!(report, CancelReport::Freed { .. }), "{report:?}");
    let seen = events(&streamed).await;
    assert_eq!(end(&seen).finish_reason, FinishReason::Cancelled);
    assert_eq!(end(&seen).tokens_out, streamed.log.pieces());

    // The next has the slot, and has said nothing; its client goes.
    until("it is in the slot", || endless.requests().len() == 2).await;
    pool.cancel(whole.id).await.unwrap();
    let seen = events(&whole).await;
    assert_eq!(end(&seen).finish_reason, FinishReason::Cancelled);
    assert!(answers(&seen).is_empty());
    until("the slot is free", || endless.busy_slots() == 0).await;
    assert_eq!(endless.requests().len(), 2);
}

#[tokio::test]
async fn a_call_that_has_nothing_yet_goes_to_the_engine_that_replaces_its_own() {
    for stream in [true, false] {
        // In its prompt for longer than anybody waits.
        let old = FakeEngine::start(&Script {
            first_token_ms: 600_000,
            ..Script::default()
        });
        let (host, pool) = ready(&old).await;
        let record = submit(&pool, call(stream)).await;
        until("the old engine has it", || old.busy_slots() == 1).await;
        pool.reload(ReloadRequest::default()).await.unwrap();
        let new = FakeEngine::start(&Script::with_pieces(&["new"]));
        let context = bound(&host, &new);
        pool.change(Change::Replaced(context.into())).await;
        let events = events(&record).await;
        assert_eq!(record.log.text().0, "new");
        assert_eq!(end(&events).resumed, 0);
        let begun = events
            .iter()
            .filter(|event| matches!(event, TaskEvent::Started(_)));
        assert_eq!(
            (begun.count(), answers(&events).len()),
            (1, usize::from(!stream))
        );
        until("the old engine is rid of it", || old.busy_slots() == 0).await;
    }
}

#[tokio::test]
async fn a_call_that_has_begun_to_answer_is_not_begun_again() {
    let old = FakeEngine::start(&Script::endless(5));
    let (host, pool) = ready(&old).await;
    let record = submit(&pool, call(true)).await;
    until("it streams", || record.log.pieces() > 0).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    let new = FakeEngine::start(&Script::with_pieces(&["new"]));
    let context = bound(&host, &new);
    pool.change(Change::Replaced(context.into())).await;
    assert_eq!(failure(&events(&record).await).code, ErrorCode::WorkerReset);
    assert!(new.requests().is_empty());
}

#[tokio::test]
async fn an_engine_lost_in_mid_stream_ends_the_call_after_what_it_said() {
    let engine = FakeEngine::start(&Script {
        fault: Some(Fault::Cut { after_tokens: 2 }),
        ..Script::default()
    });
    let (_host, pool) = ready(&engine).await;
    let record = submit(&pool, call(true)).await;
    let events = events(&record).await;
    let failure = failure(&events);
    assert_eq!(
        (failure.code, failure.retriable),
        (ErrorCode::WorkerReset, true)
    );
    assert_eq!(record.log.text(), ("A fake ".to_owned(), 2));
}

#[tokio::test]
async fn a_call_that_the_engine_refuses_costs_the_engine_no_trust() {
    let engine = FakeEngine::start(&Script::default());
    let (_host, pool) = ready(&engine).await;
    for body in [
        serde_json::json!({"stream": true}),
        serde_json::json!({"messages": [], "grammar": "("}),
    ] {
        let record = submit(&pool, call_of(&body)).await;
        let events = events(&record).await;
        let failure = failure(&events);
        assert_eq!(
            (failure.code, failure.retriable),
            (ErrorCode::InvalidParams, false)
        );
        assert!(failure.hint.is_none(), "{failure:?}");
    }
    let seen = pool.snapshot();
    assert_eq!((seen.doubt, seen.distrust), (0, None));
}

/// Hands out a whole answer, and does not end.
#[derive(Debug, Default)]
struct NeverEnds(AtomicUsize);

impl Answers for NeverEnds {
    fn answer(&self) -> TokenStream {
        self.0.fetch_add(1, Ordering::Relaxed);
        let answer = TokenEvent::Answer(CallAnswer {
            body: "{}".into(),
            text: String::new(),
        });
        let said = futures::stream::iter([Ok(TokenEvent::Started), Ok(answer)]);
        said.chain(futures::stream::pending()).boxed()
    }
}

#[tokio::test]
async fn no_call_is_answered_twice() {
    let engine = FakeEngine::start(&Script::default());
    let (host, pool) = ready(&engine).await;
    // The same engine to the pool, and another behind it.
    let never_ends = Arc::new(Answering::<NeverEnds>::default());
    let context = ProvisionedContext {
        url: engine.url(),
        ..context()
    };
    host.bind_adapter(context, never_ends.clone());
    let record = submit(&pool, call(false)).await;
    until("it has its answer", || record.is_answering()).await;
    pool.reload(ReloadRequest::default()).await.unwrap();
    let new = FakeEngine::start(&Script::with_pieces(&["new"]));
    let context = bound(&host, &new);
    pool.change(Change::Replaced(context.into())).await;
    let events = events(&record).await;
    assert_eq!(failure(&events).code, ErrorCode::WorkerReset);
    assert_eq!(answers(&events).len(), 1);
    assert_eq!(never_ends.0.0.load(Ordering::Relaxed), 1);
    assert!(new.requests().is_empty());
}
