//! Cancelling, against a fake engine in a process of its own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::StreamExt;
use support::{Outcome, adapter, first_token, task, until};
use test_harness_fake_engine::{FakeEngine, Script};
use worker_adapters_adapter_api::{CancelReport, TokenEvent, WorkerAdapter, WorkerError};

#[tokio::test]
async fn a_cancel_while_decoding_frees_the_slot_and_no_token_follows() {
    let engine = FakeEngine::start(&Script {
        slot_free_ms: 60,
        ..Script::endless(2)
    });
    let adapter = adapter(&engine);
    let task = task(100_000);
    let id = task.id;
    let mut stream = adapter.submit(task).await.unwrap();
    first_token(&mut stream).await;
    let reader = tokio::spawn(Outcome::of(stream));
    let CancelReport::Freed { after_ms } = adapter.cancel(id).await.unwrap() else {
        panic!("not seen free");
    };
    assert!(after_ms >= 60, "{after_ms}");
    assert_eq!(engine.busy_slots(), 0);
    let outcome = reader.await.unwrap();
    assert!(matches!(outcome.error, Some(WorkerError::Cancelled)));
    assert_eq!(adapter.running(), 0);
    assert_eq!(adapter.cancel(id).await.unwrap(), CancelReport::NotRunning);
}

#[tokio::test]
async fn what_is_already_here_is_not_handed_out_after_a_cancel() {
    let engine = FakeEngine::start(&Script::endless(0));
    let adapter = Arc::new(adapter(&engine));
    let task = task(100_000);
    let id = task.id;
    let mut stream = adapter.submit(task).await.unwrap();
    first_token(&mut stream).await;
    let cancel = tokio::spawn({
        let adapter = Arc::clone(&adapter);
        async move { adapter.cancel(id).await }
    });
    // With one thread, the other task now runs up to its first wait.
    tokio::task::yield_now().await;
    assert!(matches!(
        stream.next().await,
        Some(Err(WorkerError::Cancelled))
    ));
    assert!(stream.next().await.is_none());
    assert!(matches!(
        cancel.await.unwrap().unwrap(),
        CancelReport::Freed { .. }
    ));
}

#[tokio::test]
async fn a_cancel_in_the_prompt_leaves_the_engine_its_quiet_second() {
    let script = Script {
        first_token_ms: 60_000,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    let task = task(9);
    let id = task.id;
    let stream = adapter.submit(task).await.unwrap();
    let reader = tokio::spawn(Outcome::of(stream));
    let begun = Instant::now();
    assert!(matches!(
        adapter.cancel(id).await.unwrap(),
        CancelReport::Freed { .. }
    ));
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let outcome = reader.await.unwrap();
    assert!(matches!(outcome.error, Some(WorkerError::Cancelled)));
    assert!(
        !outcome
            .events
            .iter()
            .any(|event| matches!(event, TokenEvent::Token { .. }))
    );
}

#[tokio::test]
async fn a_cancel_during_submit_ends_it() {
    let script = Script {
        first_token_ms: 60_000,
        late_headers: true,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let adapter = Arc::new(adapter(&engine));
    let task = task(9);
    let id = task.id;
    let submit = tokio::spawn({
        let adapter = Arc::clone(&adapter);
        async move { adapter.submit(task).await.map(drop) }
    });
    until("the engine has the task", || engine.busy_slots() == 1).await;
    let (report, submitted) = tokio::join!(adapter.cancel(id), submit);
    assert!(matches!(report.unwrap(), CancelReport::Freed { .. }));
    assert!(matches!(
        submitted.unwrap(),
        Err(WorkerError::Cancelled) | Ok(())
    ));
    assert_eq!(adapter.running(), 0);
}

#[tokio::test]
async fn a_dropped_submit_leaves_nothing_behind() {
    let script = Script {
        first_token_ms: 60_000,
        late_headers: true,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    let submit = adapter.submit(task(9));
    tokio::select! {
        // On a slow machine it may count as taken by now; the same must hold.
        outcome = submit => drop(outcome),
        () = until("the engine has the task", || engine.busy_slots() == 1) => {}
    }
    assert_eq!(adapter.running(), 0);
    until("the slot is free", || engine.busy_slots() == 0).await;
}

#[tokio::test]
async fn other_tasks_run_on() {
    let engine = FakeEngine::start_with(&Script::endless(3), &["--parallel", "2"]);
    let adapter = adapter(&engine);
    let (stays, goes) = (task(60), task(100_000));
    let id = goes.id;
    let staying = tokio::spawn(Outcome::of(adapter.submit(stays).await.unwrap()));
    let mut going = adapter.submit(goes).await.unwrap();
    first_token(&mut going).await;
    let going = tokio::spawn(Outcome::of(going));
    assert!(matches!(
        adapter.cancel(id).await.unwrap(),
        CancelReport::Freed { .. }
    ));
    assert!(going.await.unwrap().error.is_some());
    assert_eq!(staying.await.unwrap().end().tokens_out, 60);
}

#[tokio::test]
async fn a_dropped_stream_leaves_nothing_behind() {
    let engine = FakeEngine::start(&Script::endless(2));
    let adapter = adapter(&engine);
    let mut stream = adapter.submit(task(100_000)).await.unwrap();
    first_token(&mut stream).await;
    assert_eq!((adapter.running(), engine.busy_slots()), (1, 1));
    drop(stream);
    assert_eq!(adapter.running(), 0);
    until("the slot is free", || engine.busy_slots() == 0).await;
}

#[tokio::test]
async fn an_engine_that_shows_no_slots_cannot_be_seen_free() {
    let script = Script {
        slots_missing: true,
        ..Script::endless(2)
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    let task = task(100_000);
    let id = task.id;
    let mut stream = adapter.submit(task).await.unwrap();
    first_token(&mut stream).await;
    let reader = tokio::spawn(Outcome::of(stream));
    assert_eq!(adapter.cancel(id).await.unwrap(), CancelReport::NotShown);
    assert!(reader.await.unwrap().error.is_some());
    until("the slot is free all the same", || engine.busy_slots() == 0).await;
}

#[tokio::test]
async fn an_engine_that_tells_of_its_prompt_is_seen_free_at_once() {
    let script = Script {
        first_token_ms: 60_000,
        progress_events: 600,
        ..Script::default()
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    let task = task(9);
    let id = task.id;
    let stream = adapter.submit(task).await.unwrap();
    let reader = tokio::spawn(Outcome::of(stream));
    // Until it has told of its prompt more than once.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let begun = Instant::now();
    let report = adapter.cancel(id).await.unwrap();
    assert!(matches!(report, CancelReport::Freed { .. }), "{report:?}");
    assert!(begun.elapsed() < Duration::from_secs(1), "no quiet second");
    assert!(reader.await.unwrap().pieces().is_empty());
}

// The slot of one that was cancelled stays busy, and others come and go beside
// it: it is never taken for one of theirs.
#[tokio::test]
async fn a_slot_is_told_from_those_of_other_tasks() {
    let script = Script {
        slot_free_ms: 700,
        ..Script::endless(3)
    };
    let engine = FakeEngine::start_with(&script, &["--parallel", "4"]);
    let adapter = Arc::new(adapter(&engine));
    let long = task(100_000);
    let id = long.id;
    let mut stream = adapter.submit(long).await.unwrap();
    first_token(&mut stream).await;
    // One of another adapter: counting slots, it would be in the way.
    let stranger = support::adapter(&engine);
    let mut strange = stranger.submit(task(100_000)).await.unwrap();
    first_token(&mut strange).await;
    let strange = tokio::spawn(Outcome::of(strange));
    let reader = tokio::spawn(Outcome::of(stream));
    let beside = tokio::spawn({
        let adapter = Arc::clone(&adapter);
        async move {
            for _ in 0..30 {
                let outcome = support::run(&adapter, task(4)).await;
                assert_eq!(outcome.end().effective["dynatemp_exponent"], 1.0);
            }
        }
    });
    let report = adapter.cancel(id).await.unwrap();
    let CancelReport::Freed { after_ms } = report else {
        panic!("{report:?}")
    };
    assert!((700..2000).contains(&after_ms), "{after_ms}");
    assert!(reader.await.unwrap().error.is_some());
    beside.await.unwrap();
    strange.abort();
}

#[tokio::test]
async fn a_slot_that_is_not_seen_free_can_be_waited_for_again() {
    let script = Script {
        slot_free_ms: 2600,
        ..Script::endless(2)
    };
    let engine = FakeEngine::start(&script);
    let adapter = adapter(&engine);
    let task = task(100_000);
    let id = task.id;
    let mut stream = adapter.submit(task).await.unwrap();
    first_token(&mut stream).await;
    let reader = tokio::spawn(Outcome::of(stream));
    let report = adapter.cancel(id).await.unwrap();
    assert!(
        matches!(report, CancelReport::NotSeenFree { .. }),
        "{report:?}"
    );
    assert!(reader.await.unwrap().error.is_some());
    let CancelReport::Freed { after_ms } = adapter.cancel(id).await.unwrap() else {
        panic!("not seen free the second time")
    };
    assert!(
        after_ms >= 2600,
        "counted from the first cancel: {after_ms}"
    );
    assert_eq!(adapter.cancel(id).await.unwrap(), CancelReport::NotRunning);
}

#[tokio::test]
async fn an_engine_that_is_gone_holds_no_slot() {
    let mut engine = FakeEngine::start(&Script {
        slot_free_ms: 60_000,
        ..Script::endless(2)
    });
    let adapter = adapter(&engine);
    let task = task(100_000);
    let id = task.id;
    let mut stream = adapter.submit(task).await.unwrap();
    first_token(&mut stream).await;
    let reader = tokio::spawn(Outcome::of(stream));
    let report = adapter.cancel(id).await.unwrap();
    assert!(matches!(report, CancelReport::NotSeenFree { .. }));
    reader.await.unwrap();
    engine.kill();
    let report = adapter.cancel(id).await.unwrap();
    assert!(matches!(report, CancelReport::Freed { .. }), "{report:?}");
}
