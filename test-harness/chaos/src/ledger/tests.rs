//! Histories that keep every promise, and histories that break one each.

use super::*;
use proptest::prelude::*;
use serde_json::json;

const NUMBERED: Facts = Facts {
    verbose: true,
    numbered: true,
    resumes: false,
    deadline: None,
};

fn key() -> Key {
    Key {
        generation: 1,
        task: "a".to_owned(),
    }
}

fn event(id: u64, name: &str, data: Value) -> Event {
    Event {
        id,
        name: name.to_owned(),
        data,
    }
}

fn token(id: u64, index: u64) -> Event {
    event(id, "token", json!({"i": index, "t": format!("w{index} ")}))
}

fn end(id: u64) -> Event {
    event(id, "end", json!({"finish_reason": "length"}))
}

fn started() -> Event {
    event(1, "started", json!({"waited_ms": 3}))
}

fn good() -> Vec<Event> {
    vec![started(), token(2, 0), token(3, 1), token(4, 2), end(5)]
}

fn feed(facts: Facts, events: &[Event]) -> Ledger {
    let mut ledger = Ledger::default();
    ledger.admitted(&key(), facts, Instant::now());
    for event in events {
        ledger.event(&key(), event, Instant::now());
    }
    ledger
}

fn complaints(ledger: &mut Ledger) -> Vec<&'static str> {
    let broken = ledger.take_broken();
    broken.into_iter().map(|broken| broken.invariant).collect()
}

#[track_caller]
fn breaks(facts: Facts, events: &[Event], invariant: &str) {
    let complaints = complaints(&mut feed(facts, events));
    assert!(complaints.contains(&invariant), "{complaints:?}");
}

#[test]
fn a_good_history_breaks_nothing() {
    let mut ledger = feed(NUMBERED, &good());
    ledger.shown(&key(), &json!({"status": "completed", "pieces": 3}));
    ledger.replayed(&key(), &good(), Instant::now());
    ledger.finish();
    assert!(complaints(&mut ledger).is_empty());
    assert_eq!(ledger.totals().completed, 1);
    assert_eq!(ledger.totals().tokens, 3);
}

#[test]
fn a_quiet_reader_is_not_shown_every_id() {
    let quiet = Facts {
        verbose: false,
        ..NUMBERED
    };
    let events = [started(), token(2, 0), token(4, 1), end(7)];
    assert!(complaints(&mut feed(quiet, &events)).is_empty());
    breaks(NUMBERED, &events, "event ids have no gap and no repeat");
    breaks(
        quiet,
        &[started(), token(2, 0), token(2, 1)],
        "event ids have no gap and no repeat",
    );
}

#[test]
fn gaps_and_repeats_are_seen() {
    let invariant = "token indices have no gap and no repeat";
    breaks(NUMBERED, &[started(), token(2, 1)], invariant);
    breaks(NUMBERED, &[started(), token(2, 0), token(3, 0)], invariant);
    breaks(NUMBERED, &[started(), token(2, 0), token(3, 2)], invariant);
    let other = event(2, "token", json!({"i": 0, "t": "w1 "}));
    breaks(
        NUMBERED,
        &[started(), other],
        "the text has no gap and no repeat",
    );
}

#[test]
fn a_task_ends_once_and_for_all() {
    let invariant = "nothing comes after a terminal event";
    let mut events = good();
    events.push(token(6, 3));
    breaks(NUMBERED, &events, invariant);
    events[5] = end(6);
    breaks(NUMBERED, &events, invariant);
    let failed = event(
        2,
        "error",
        json!({"code": "WORKER_RESET", "message": "m", "retriable": true}),
    );
    breaks(NUMBERED, &[started(), failed, end(3)], invariant);
}

#[test]
fn a_task_that_never_ends_is_seen() {
    let mut ledger = feed(NUMBERED, &good()[..3]);
    ledger.finish();
    assert_eq!(complaints(&mut ledger), ["every admitted task ends"]);
    let mut ledger = feed(NUMBERED, &good()[..3]);
    ledger.stream_ended(&key(), "while nothing was wrong");
    ledger.finish();
    assert_eq!(
        complaints(&mut ledger),
        ["every stream ends with `end` or `error`"]
    );
}

#[test]
fn a_task_lost_with_its_daemon_is_counted_apart() {
    let mut ledger = feed(NUMBERED, &good()[..3]);
    ledger.lost(&key());
    ledger.finish();
    assert!(complaints(&mut ledger).is_empty());
    assert_eq!(ledger.totals().lost_with_the_daemon, 1);
}

#[test]
fn errors_say_code_and_retriable() {
    let invariant = "an error says code and retriable";
    for data in [
        json!({}),
        json!({"code": "OOPS", "message": "m", "retriable": true}),
        json!({"code": "WORKER_RESET", "message": "m"}),
        json!({"code": "WORKER_RESET", "message": "", "retriable": true}),
    ] {
        breaks(NUMBERED, &[event(1, "error", data.clone())], invariant);
        let mut ledger = Ledger::default();
        ledger.refusal("POST /v2/tasks", 400, &json!({ "error": data }));
        assert_eq!(complaints(&mut ledger), [invariant]);
    }
    let internal = json!({"code": "INTERNAL", "message": "m", "retriable": false});
    breaks(
        NUMBERED,
        &[event(1, "error", internal.clone())],
        "nothing goes wrong inside the daemon",
    );
    let mut ledger = Ledger::default();
    ledger.refusal("GET /", 500, &json!({ "error": internal }));
    assert_eq!(
        complaints(&mut ledger),
        ["nothing goes wrong inside the daemon"]
    );
}

#[test]
fn no_token_after_a_cancels_answer() {
    let invariant = "a cancelled task gives no token after the answer";
    let mut ledger = feed(NUMBERED, &good()[..2]);
    ledger.cancel_answered(&key(), 1);
    ledger.event(&key(), &token(3, 1), Instant::now());
    assert_eq!(complaints(&mut ledger), [invariant]);
    // Read before the answer, but beyond what was shown after it.
    let mut ledger = feed(NUMBERED, &good()[..4]);
    ledger.cancel_answered(&key(), 2);
    assert_eq!(complaints(&mut ledger), [invariant]);
    // On its way when the answer came.
    let mut ledger = feed(NUMBERED, &good()[..2]);
    ledger.cancel_answered(&key(), 2);
    ledger.event(&key(), &token(3, 1), Instant::now());
    let cancelled = event(4, "end", json!({"finish_reason": "cancelled"}));
    ledger.event(&key(), &cancelled, Instant::now());
    assert!(complaints(&mut ledger).is_empty());
    assert_eq!(ledger.totals().cancelled, 1);
}

#[test]
fn a_task_is_shown_as_it_ended() {
    for view in [
        json!({"status": "running", "pieces": 3}),
        json!({"status": "completed", "pieces": 4}),
        json!({}),
    ] {
        let mut ledger = feed(NUMBERED, &good());
        ledger.shown(&key(), &view);
        assert_eq!(complaints(&mut ledger), ["a task is shown as it ended"]);
    }
}

#[test]
fn every_reader_sees_the_same() {
    let invariant = ["every reader sees the same events"];
    let mut other = good();
    other[4] = event(5, "end", json!({"finish_reason": "stop"}));
    for later in [&good()[..4], &good()[1..], &other] {
        let mut ledger = feed(NUMBERED, &good());
        ledger.replayed(&key(), later, Instant::now());
        assert_eq!(complaints(&mut ledger), invariant);
    }
}

#[test]
fn a_late_start_is_seen() {
    let facts = Facts {
        deadline: Some(Duration::from_millis(50)),
        ..NUMBERED
    };
    let late = event(1, "started", json!({"waited_ms": 400}));
    breaks(facts, &[late], "no task runs late in silence");
    assert!(complaints(&mut feed(facts, &good())).is_empty());
}

#[test]
fn only_who_asked_is_continued() {
    let resumed = |facts| {
        let mut events = good();
        events[4] = event(5, "end", json!({"finish_reason": "length", "resumed": 1}));
        feed(facts, &events)
    };
    assert_eq!(
        complaints(&mut resumed(NUMBERED)),
        ["only who asked for it is continued"]
    );
    let asked = Facts {
        resumes: true,
        ..NUMBERED
    };
    let mut ledger = resumed(asked);
    assert!(complaints(&mut ledger).is_empty());
    assert_eq!(ledger.totals().resumed, 1);
}

#[test]
fn the_queues_bound_holds() {
    let view = |queued: u64, exits: u64| {
        json!({"state": "ready", "slots": 2, "engine_exits": exits,
            "queue": {"interactive": queued, "batch": 1, "capacity": 4}})
    };
    let start = Instant::now();
    let later = start + Duration::from_mins(1);
    let mut ledger = Ledger::default();
    ledger.pool(&view(3, 0), start);
    ledger.pool(&view(3, 0), later);
    assert!(complaints(&mut ledger).is_empty());
    ledger.pool(&view(4, 0), later);
    assert_eq!(
        complaints(&mut ledger),
        ["the queue never holds more than its bound"]
    );
    // Tasks that a lost engine gave back stand beyond it for a while.
    ledger.pool(&view(5, 1), later);
    assert!(complaints(&mut ledger).is_empty());
    ledger.pool(&view(6, 1), later);
    assert_eq!(
        complaints(&mut ledger),
        ["the queue never holds more than its bound"]
    );
}

#[test]
fn strangers_and_doubles_are_seen() {
    let mut ledger = Ledger::default();
    ledger.event(&key(), &started(), Instant::now());
    assert_eq!(complaints(&mut ledger), ["only admitted tasks have events"]);
    ledger.admitted(&key(), NUMBERED, Instant::now());
    ledger.admitted(&key(), NUMBERED, Instant::now());
    assert_eq!(complaints(&mut ledger), ["every task has an id of its own"]);
}

proptest! {
    /// However a good history is spoilt by one loss, repeat or swap, it shows.
    #[test]
    fn any_one_mistake_shows(tokens in 2u64..20, place in 0usize..20, kind in 0u8..3) {
        let mut events = vec![started()];
        events.extend((0..tokens).map(|index| token(index + 2, index)));
        events.push(end(tokens + 2));
        prop_assert!(complaints(&mut feed(NUMBERED, &events)).is_empty());
        let place = place % (events.len() - 1);
        match kind {
            0 => { events.remove(place); }
            1 => events.insert(place, events[place].clone()),
            _ => events.swap(place, place + 1),
        }
        prop_assert!(!complaints(&mut feed(NUMBERED, &events)).is_empty());
    }
}
