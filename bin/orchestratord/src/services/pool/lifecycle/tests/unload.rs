//! Pools that come and go.

use super::*;

const ASKED: Event = Event::Unload { waited_for: false };

fn unloaded() -> (Lifecycle, Instant) {
    let (life, now) = machine_that(true);
    assert_eq!(life.phase(), Phase::Unloaded);
    (life, now)
}

/// A pool whose tasks finish, so that its memory comes free.
fn unloading() -> (Lifecycle, Instant) {
    let (mut life, now) = ready();
    assert!(effects(&mut life, ASKED, now).is_empty());
    assert_eq!((life.phase(), life.deadline()), (Phase::Draining, None));
    (life, now)
}

fn stopping() -> (Lifecycle, Instant) {
    let (mut life, now) = unloading();
    assert_eq!(effects(&mut life, Event::TasksOver, now), [Effect::Rest]);
    assert_eq!(life.phase(), Phase::Stopping);
    (life, now)
}

#[test]
fn a_pool_on_demand_begins_with_nothing_and_its_first_task_starts_it() {
    let (mut life, now) = unloaded();
    assert!(life.on(Event::TimeUp, now, 0.0).unwrap().ignored);
    assert!(
        life.on(Event::Stopped, now, 0.0).unwrap().ignored,
        "its supervisor rests"
    );
    assert_eq!(
        effects(&mut life, Event::Wanted, now),
        [Effect::Start(Which::Current)]
    );
    assert_eq!(life.phase(), Phase::Provisioning);
    assert!(life.on(Event::Wanted, now, 0.0).unwrap().ignored);
    let (mut life, now) = unloaded();
    assert_eq!(
        effects(&mut life, Event::Resume, now),
        [Effect::Start(Which::Current)]
    );
}

#[test]
fn an_unload_lets_running_tasks_finish_and_keeps_the_queue() {
    let (mut life, now) = unloading();
    assert!(!life.runs_tasks(), "no further task begins");
    assert!(life.unloading());
    let long = now + SOON * 1000;
    assert!(
        life.on(Event::TimeUp, long, 0.0).unwrap().ignored,
        "running ones have deadlines of their own"
    );
    assert!(life.on(Event::Wanted, now, 0.0).unwrap().ignored);
    assert!(
        effects(&mut life, ASKED, now).is_empty(),
        "it is on its way"
    );
    assert_eq!(effects(&mut life, Event::TasksOver, now), [Effect::Rest]);
    assert!(life.on(Event::Wanted, now, 0.0).unwrap().ignored);
    assert!(effects(&mut life, Event::Stopped, now).is_empty());
    assert_eq!(life.phase(), Phase::Unloaded);
    assert_eq!(
        effects(&mut life, Event::Wanted, now),
        [Effect::Start(Which::Current)],
        "a task that came in the meantime has it loaded again"
    );
}

#[test]
fn what_is_asked_in_the_middle_of_an_unload() {
    // A start keeps the engine while it is there, and waits for its end after.
    let (mut life, now) = unloading();
    assert!(effects(&mut life, Event::Resume, now).is_empty());
    assert_eq!(life.phase(), Phase::Ready);
    let (mut life, now) = stopping();
    assert!(
        effects(&mut life, Event::Resume, now).is_empty(),
        "never two engines"
    );
    let mut again = life.clone();
    assert_eq!(
        effects(&mut life, Event::Stopped, now),
        [Effect::Start(Which::Current)]
    );
    again.on(ASKED, now, 0.0).unwrap();
    again.on(Event::Stopped, now, 0.0).unwrap();
    assert_eq!(again.phase(), Phase::Unloaded, "the last word counts");
    // A drain stops it for good.
    let until = now + SOON;
    let (mut life, now) = unloading();
    assert!(effects(&mut life, Event::Drain { until }, now).is_empty());
    assert!(life.runs_tasks(), "what was admitted is finished");
    let (mut life, now) = stopping();
    assert_eq!(
        effects(&mut life, Event::Drain { until }, now),
        [Effect::EndQueued]
    );
    life.on(Event::Stopped, now, 0.0).unwrap();
    assert_eq!(life.phase(), Phase::Stopped);
    // So does the daemon's end.
    for (mut life, now) in [unloading(), stopping()] {
        let ends = effects(&mut life, Event::Shutdown { until }, now);
        assert_eq!(ends, [Effect::EndQueued]);
        life.on(Event::TasksOver, now, 0.0).unwrap();
        assert_eq!(effects(&mut life, Event::Stopped, now), [Effect::End]);
    }
}

#[test]
fn an_unloaded_pool_is_drained_and_ended_without_an_engine() {
    let until = Instant::now() + SOON;
    for event in [Event::Drain { until }, Event::Shutdown { until }] {
        let (mut life, now) = unloaded();
        assert_eq!(effects(&mut life, event, now), [Effect::EndQueued]);
        let last = effects(&mut life, Event::TasksOver, now);
        assert_eq!(life.phase(), Phase::Stopped);
        assert_eq!(
            last.contains(&Effect::End),
            event == Event::Shutdown { until }
        );
        assert_eq!(
            life.on(ASKED, now, 0.0),
            Err(match event {
                Event::Drain { .. } => Refusal::Stopped,
                _ => Refusal::ShuttingDown,
            })
        );
    }
}

#[test]
fn an_engine_that_ends_in_the_middle_of_an_unload_ends_no_queued_task() {
    let crash = Event::Exited(RestartCause::Crash);
    let (mut life, now) = unloading();
    let reaction = life.on(crash, now, 0.0).unwrap();
    assert_eq!(reaction.counted, Some(RestartCause::Crash));
    assert!(reaction.effects.is_empty(), "the queue is kept");
    assert!(life.on(crash, now, 0.0).unwrap().ignored, "it is told once");
    life.on(Event::TasksOver, now, 0.0).unwrap();
    assert_eq!(life.phase(), Phase::Unloaded);
    // It counts for the breaker as any other.
    let (mut life, now) = ready();
    let mut opened = false;
    for _ in 0..RestartPolicy::default().crashes {
        life.on(ASKED, now, 0.0).unwrap();
        opened |= life.on(crash, now, 0.0).unwrap().opened;
        life.on(Event::TasksOver, now, 0.0).unwrap();
        life.on(Event::Wanted, now, 0.0).unwrap();
        life.on(Event::Ready, now, 0.0).unwrap();
    }
    assert!(opened);
}

#[test]
fn an_unload_gives_up_only_a_start_that_nobody_waits_for() {
    for loading in [false, true] {
        let (mut life, now) = machine();
        if loading {
            life.on(Event::Loading, now, 0.0).unwrap();
        }
        assert_eq!(
            life.on(Event::Unload { waited_for: true }, now, 0.0),
            Err(Refusal::LoadsForTasks),
            "or it might never get ready"
        );
        assert_eq!(effects(&mut life, ASKED, now), [Effect::Rest]);
        // Ready in the moment in which its end was asked for.
        assert!(life.on(Event::Ready, now, 0.0).unwrap().ignored);
        life.on(Event::Stopped, now, 0.0).unwrap();
        assert_eq!(life.phase(), Phase::Unloaded);
    }
}

#[test]
fn without_an_engine_an_unload_only_ends_the_wait_for_the_next_try() {
    let (mut crashed, now) = ready();
    crashed
        .on(Event::Exited(RestartCause::Crash), now, 0.0)
        .unwrap();
    let waited_for = Event::Unload { waited_for: true };
    assert!(crashed.on(waited_for, now, 0.0).unwrap().ignored);
    assert_eq!(crashed.phase(), Phase::Backoff, "the pause is kept");
    let (mut failed, now) = machine();
    failed
        .on(Event::NotStarted { retriable: true }, now, 0.0)
        .unwrap();
    for mut life in [crashed, failed] {
        assert!(effects(&mut life, ASKED, now).is_empty());
        assert_eq!((life.phase(), life.next_try()), (Phase::Unloaded, None));
    }
}

#[test]
fn a_load_on_demand_that_fails_ends_the_queue_and_is_tried_again() {
    let (mut life, now) = unloaded();
    life.on(Event::Wanted, now, 0.0).unwrap();
    let failed = Event::NotStarted { retriable: true };
    assert_eq!(effects(&mut life, failed, now), [Effect::EndQueued]);
    assert_eq!(life.phase(), Phase::Failed);
    let due = life.next_try().unwrap();
    assert_eq!(
        effects(&mut life, Event::TimeUp, due),
        [Effect::Start(Which::Current)]
    );
}

#[test]
fn a_reload_without_a_wish_for_an_engine_only_adopts() {
    for (mut life, now) in [unloaded(), unloading(), stopping()] {
        let phase = life.phase();
        assert_eq!(effects(&mut life, Event::Reload, now), [Effect::Adopt]);
        assert_eq!(life.phase(), phase);
        let reload = life.reload().unwrap();
        assert_eq!(
            (reload.mode, reload.state),
            (ReloadMode::Restart, ReloadState::Done)
        );
    }
}

#[test]
fn an_engine_that_a_reload_has_outdated_is_not_kept() {
    let (mut life, now) = unloading();
    life.on(Event::Reload, now, 0.0).unwrap();
    assert!(effects(&mut life, Event::Resume, now).is_empty());
    assert_eq!(life.phase(), Phase::Draining, "it has the old model");
    assert_eq!(effects(&mut life, Event::TasksOver, now), [Effect::Rest]);
    assert_eq!(
        effects(&mut life, Event::Stopped, now),
        [Effect::Start(Which::Current)]
    );
    // Nor are tasks that wait given to it by a drain.
    let (mut life, now) = unloading();
    life.on(Event::Reload, now, 0.0).unwrap();
    assert_eq!(
        effects(&mut life, Event::Drain { until: now + SOON }, now),
        [Effect::EndQueued]
    );
}

#[test]
fn a_reload_under_way_is_not_unloaded() {
    let (mut life, now) = ready();
    life.on(Event::Reload, now, 0.0).unwrap();
    assert_eq!(life.on(ASKED, now, 0.0), Err(Refusal::ReloadUnderWay));
    life.on(Event::Replaced, now, 0.0).unwrap();
    assert_eq!(
        life.on(ASKED, now, 0.0),
        Err(Refusal::ReloadUnderWay),
        "the old engine has tasks"
    );
    life.on(Event::Retired, now, 0.0).unwrap();
    life.on(ASKED, now, 0.0).unwrap();
    let (mut life, now) = ready();
    life.on(Event::Drain { until: now + SOON }, now, 0.0)
        .unwrap();
    assert_eq!(life.on(ASKED, now, 0.0), Err(Refusal::BeingDrained));
}

proptest! {
    /// Whatever happens to it, a pool in which a task waits gets an engine, or
    /// says why not.
    #[test]
    fn a_task_that_waits_is_never_forgotten(
        on_demand in any::<bool>(),
        events in prop::collection::vec((any_event(), 0u64..400), 0..60),
    ) {
        let (mut life, mut now) = machine_that(on_demand);
        for (event, seconds) in events {
            now += Duration::from_secs(seconds);
            if !matches!(event, Event::Drain { .. }) {
                let _ = life.on(event, now, 0.5);
            }
        }
        // The supervisor does as it is told, and no task runs for ever.
        for _ in 0..8 {
            now = now.max(life.deadline().unwrap_or(now));
            let event = match life.phase() {
                Phase::Unloaded => Event::Wanted,
                Phase::Provisioning | Phase::Starting => Event::Ready,
                Phase::Draining => Event::TasksOver,
                Phase::Stopping => Event::Stopped,
                _ => Event::TimeUp,
            };
            life.on(event, now, 0.5).unwrap();
        }
        prop_assert_eq!(life.phase(), Phase::Ready);
    }
}

/// Its tasks fail by the crash, and so its end is asked for before it is known.
#[test]
fn a_crash_that_is_seen_while_the_engine_is_stopped_counts_as_any_other() {
    let (mut life, now) = ready();
    let policy = RestartPolicy::default();
    let crash = Event::Exited(RestartCause::Crash);
    for number in 1..=policy.crashes {
        life.on(Event::Unload { waited_for: true }, now, 1.0)
            .unwrap();
        assert_eq!(effects(&mut life, Event::TasksOver, now), [Effect::Rest]);
        let reaction = life.on(crash, now, 1.0).unwrap();
        assert_eq!(reaction.counted, Some(RestartCause::Crash));
        assert_eq!(life.restarts().crash, u64::try_from(number).unwrap());
        assert_eq!(reaction.opened, number == policy.crashes);
        if reaction.opened {
            break;
        }
        assert_eq!(life.phase(), Phase::Unloaded, "the queue is kept");
        for event in [Event::Wanted, Event::Loading, Event::Ready] {
            life.on(event, now, 1.0).unwrap();
        }
    }
    assert_eq!(life.phase(), Phase::Failed, "the breaker knows of it");
}
