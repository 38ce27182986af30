//! The machine under single events, and under all of them in any order.

mod unload;

use proptest::prelude::*;

use super::*;

const SOON: Duration = Duration::from_secs(10);

fn machine() -> (Lifecycle, Instant) {
    machine_that(false)
}

fn machine_that(on_demand: bool) -> (Lifecycle, Instant) {
    let now = Instant::now();
    let policy = Policy {
        restart: RestartPolicy::default(),
        drain: SOON,
    };
    (Lifecycle::new(policy, on_demand, now), now)
}

fn ready() -> (Lifecycle, Instant) {
    let (mut life, now) = machine();
    for event in [Event::Providing, Event::Loading, Event::Ready] {
        life.on(event, now, 0.5).unwrap();
    }
    assert_eq!(life.phase(), Phase::Ready);
    (life, now)
}

fn effects(life: &mut Lifecycle, event: Event, now: Instant) -> Vec<Effect> {
    life.on(event, now, 1.0).unwrap().effects
}

#[test]
fn a_crash_waits_and_starts_again() {
    let (mut life, now) = ready();
    let crash = Event::Exited(RestartCause::Crash);
    let reaction = life.on(crash, now, 1.0).unwrap();
    assert_eq!(reaction.counted, Some(RestartCause::Crash));
    assert!(reaction.effects.is_empty(), "the queue is kept");
    assert_eq!(life.phase(), Phase::Backoff);
    let due = life.next_try().unwrap();
    assert_eq!(due - now, RestartPolicy::default().first_delay);
    assert!(life.on(Event::TimeUp, now, 1.0).unwrap().ignored, "not yet");
    let effects = effects(&mut life, Event::TimeUp, due);
    assert_eq!(effects, [Effect::Start(Which::Current)]);
    assert_eq!(life.phase(), Phase::Provisioning);
}

#[test]
fn the_breaker_opens_and_resume_closes_it() {
    let (mut life, now) = ready();
    let policy = RestartPolicy::default();
    for number in 1..=policy.crashes {
        let hang = Event::Exited(RestartCause::Hang);
        let reaction = life.on(hang, now, 1.0).unwrap();
        assert_eq!(reaction.opened, number == policy.crashes);
        if number < policy.crashes {
            life.on(Event::TimeUp, life.next_try().unwrap(), 1.0)
                .unwrap();
            life.on(Event::Ready, now, 1.0).unwrap();
        }
    }
    assert_eq!(life.phase(), Phase::Failed);
    assert_eq!(life.next_try(), Some(now + policy.cool_down));
    assert_eq!(life.restarts().hang, policy.crashes as u64);
    let effects = effects(&mut life, Event::Resume, now);
    assert_eq!(effects, [Effect::Start(Which::Current)]);
    life.on(Event::Ready, now, 1.0).unwrap();
    life.on(Event::Exited(RestartCause::Crash), now, 1.0)
        .unwrap();
    assert_eq!(life.phase(), Phase::Backoff, "counted afresh");
}

#[test]
fn a_drain_finishes_what_was_admitted_and_stops_the_engine() {
    let (mut life, now) = ready();
    let until = now + SOON;
    assert!(effects(&mut life, Event::Drain { until }, now).is_empty());
    assert!(life.runs_tasks(), "queued tasks go on");
    assert_eq!(
        effects(&mut life, Event::TimeUp, until),
        [Effect::EndQueued, Effect::CancelRunning]
    );
    assert_eq!(effects(&mut life, Event::TasksOver, until), [Effect::Rest]);
    assert_eq!(life.phase(), Phase::Stopping);
    assert!(effects(&mut life, Event::Stopped, until).is_empty());
    assert_eq!(life.phase(), Phase::Stopped);
    assert_eq!(
        effects(&mut life, Event::Resume, until),
        [Effect::Start(Which::Current)]
    );
}

#[test]
fn tasks_that_do_not_end_when_told_are_not_waited_for_without_a_bound() {
    let until = Instant::now();
    for event in [Event::Drain { until }, Event::Shutdown { until }] {
        let (mut life, now) = ready();
        life.on(at(event, now), now, 0.0).unwrap();
        assert!(!life.overdue());
        assert_eq!(
            effects(&mut life, Event::TimeUp, now + SOON),
            [Effect::EndQueued, Effect::CancelRunning]
        );
        assert!(life.overdue());
        let due = life.deadline().expect("the wait is bounded");
        assert_eq!(effects(&mut life, Event::TimeUp, due), [Effect::Rest]);
        assert_eq!(life.phase(), Phase::Stopping);
        assert!(!life.overdue());
    }
}

#[test]
fn a_resume_in_time_keeps_the_engine_and_one_too_late_waits_for_its_end() {
    let (mut life, now) = ready();
    let drain = Event::Drain { until: now + SOON };
    life.on(drain, now, 0.0).unwrap();
    assert!(effects(&mut life, Event::Resume, now).is_empty());
    assert_eq!(life.phase(), Phase::Ready);
    life.on(drain, now, 0.0).unwrap();
    life.on(Event::TasksOver, now, 0.0).unwrap();
    assert!(
        effects(&mut life, Event::Resume, now).is_empty(),
        "never two engines"
    );
    assert_eq!(
        effects(&mut life, Event::Stopped, now),
        [Effect::Start(Which::Current)]
    );
}

#[test]
fn a_reload_beside_switches_and_the_old_engine_retires() {
    let (mut life, now) = ready();
    assert_eq!(effects(&mut life, Event::Reload, now), [Effect::Replace]);
    assert_eq!(
        life.on(Event::Reload, now, 0.0),
        Err(Refusal::ReloadUnderWay)
    );
    assert_eq!(
        effects(&mut life, Event::Replaced, now),
        [Effect::Adopt, Effect::RetireUntil(now + SOON)]
    );
    assert_eq!(
        life.on(Event::Reload, now, 0.0),
        Err(Refusal::ReloadUnderWay)
    );
    life.on(Event::Retired, now, 0.0).unwrap();
    assert_eq!(life.reload().unwrap().state, ReloadState::Done);
    assert_eq!((life.phase(), life.restarts().reload), (Phase::Ready, 1));
}

#[test]
fn a_reload_that_fails_beside_changes_nothing() {
    let (mut life, now) = ready();
    life.on(Event::Reload, now, 0.0).unwrap();
    assert_eq!(
        effects(&mut life, Event::NotReplaced, now),
        [Effect::DropCandidate]
    );
    assert_eq!(life.phase(), Phase::Ready);
    assert_eq!(life.reload().unwrap().state, ReloadState::RolledBack);
    assert_eq!(life.restarts(), Restarts::default());
}

#[test]
fn without_room_the_old_engine_goes_first_and_comes_back_if_need_be() {
    let (mut life, now) = ready();
    life.on(Event::Reload, now, 0.0).unwrap();
    life.on(Event::NoRoom, now, 0.0).unwrap();
    assert_eq!(life.phase(), Phase::Draining);
    assert!(!life.runs_tasks(), "the queue waits for the new engine");
    assert_eq!(
        effects(&mut life, Event::TimeUp, now + SOON),
        [Effect::CancelRunning]
    );
    life.on(Event::TasksOver, now, 0.0).unwrap();
    assert_eq!(
        effects(&mut life, Event::Stopped, now),
        [Effect::Start(Which::Candidate)]
    );
    let failed = Event::NotStarted { retriable: false };
    assert_eq!(
        effects(&mut life, failed, now),
        [Effect::DropCandidate, Effect::Start(Which::Current)]
    );
    assert_eq!(life.reload().unwrap().state, ReloadState::RollingBack);
    assert_eq!(
        life.restarts().load_failure,
        0,
        "the reload's, not the pool's"
    );
    let mut lost = life.clone();
    lost.on(failed, now, 0.0).unwrap();
    assert_eq!(
        (lost.phase(), lost.restarts().load_failure),
        (Phase::Failed, 1)
    );
    assert!(effects(&mut life, Event::Ready, now).is_empty());
    assert_eq!(life.reload().unwrap().state, ReloadState::RolledBack);
    assert_eq!(life.phase(), Phase::Ready);
}

#[test]
fn the_old_engines_crash_during_a_reload_makes_way_for_the_new_one() {
    let (mut life, now) = ready();
    life.on(Event::Reload, now, 0.0).unwrap();
    assert_eq!(
        effects(&mut life, Event::Exited(RestartCause::Crash), now),
        [Effect::Start(Which::Candidate)]
    );
    assert_eq!(effects(&mut life, Event::Ready, now), [Effect::Adopt]);
}

#[test]
fn a_reload_without_an_engine_tries_the_new_configuration() {
    let (mut life, now) = machine();
    life.on(Event::NotStarted { retriable: false }, now, 0.0)
        .unwrap();
    assert_eq!(life.phase(), Phase::Failed);
    assert_eq!(
        effects(&mut life, Event::Reload, now),
        [Effect::Adopt, Effect::Start(Which::Current)]
    );
    life.on(Event::Ready, now, 0.0).unwrap();
    assert_eq!(life.reload().unwrap().state, ReloadState::Done);
}

#[test]
fn a_lost_supervisor_fails_the_pool_and_it_is_tried_again() {
    let (mut life, now) = ready();
    assert_eq!(effects(&mut life, Event::Lost, now), [Effect::EndQueued]);
    assert_eq!(life.phase(), Phase::Failed);
    let due = life.next_try().unwrap();
    assert_eq!(
        effects(&mut life, Event::TimeUp, due),
        [Effect::Start(Which::Current)]
    );
}

/// Any event. Times are told when they are used.
fn any_event() -> impl Strategy<Value = Event> {
    let zero = Instant::now();
    prop_oneof![
        1 => Just(Event::Providing),
        1 => Just(Event::Loading),
        4 => Just(Event::Ready),
        2 => Just(Event::Exited(RestartCause::Crash)),
        1 => Just(Event::Exited(RestartCause::Hang)),
        1 => any::<bool>().prop_map(|retriable| Event::NotStarted { retriable }),
        2 => Just(Event::Stopped),
        1 => Just(Event::Lost),
        1 => Just(Event::Replaced),
        1 => Just(Event::NotReplaced),
        1 => Just(Event::NoRoom),
        1 => Just(Event::Retired),
        1 => Just(Event::Drain { until: zero }),
        2 => any::<bool>().prop_map(|waited_for| Event::Unload { waited_for }),
        2 => Just(Event::Wanted),
        2 => Just(Event::Resume),
        2 => Just(Event::Reload),
        2 => Just(Event::TasksOver),
        4 => Just(Event::TimeUp),
    ]
}

fn at(event: Event, now: Instant) -> Event {
    match event {
        Event::Drain { .. } => Event::Drain { until: now + SOON },
        Event::Shutdown { .. } => Event::Shutdown { until: now + SOON },
        other => other,
    }
}

/// Whether the event itself says that the engine is gone.
fn tells_the_end(event: Event) -> bool {
    matches!(
        event,
        Event::Exited(_) | Event::NotStarted { .. } | Event::Stopped | Event::Lost
    )
}

/// What must be true after every event.
fn check(before: &Lifecycle, event: Event, life: &Lifecycle, reaction: &Reaction) {
    let starts = |effect: &&Effect| matches!(effect, Effect::Start(_));
    let started = reaction.effects.iter().filter(starts).count();
    assert!(started <= 1, "{event:?}: {reaction:?}");
    if started == 1 {
        let free = matches!(before.engine(), Engine::None | Engine::Starting);
        assert!(
            free || tells_the_end(event),
            "{event:?} starts a second engine: {before:?}"
        );
        assert_eq!(life.engine(), Engine::Starting);
    }
    match life.phase() {
        Phase::Ready => assert_eq!(life.engine(), Engine::Up),
        Phase::Provisioning | Phase::Starting => assert_eq!(life.engine(), Engine::Starting),
        Phase::Backoff | Phase::Failed => {
            assert!(life.next_try().is_some(), "it is tried again");
            assert_eq!(life.engine(), Engine::None);
        }
        Phase::Stopping => assert!(life.deadline().is_some(), "its wait is bounded"),
        Phase::Stopped => assert_eq!(life.engine(), Engine::None),
        Phase::Unloaded => {
            assert_eq!((life.engine(), life.drain()), (Engine::None, None));
            assert_eq!(life.deadline(), None, "only a task or a start ends it");
        }
        Phase::Draining => assert!(life.drain().is_some()),
    }
    if life.unloading() {
        assert!(!life.runs_tasks(), "the queue waits for the next engine");
    }
    if before.phase() == Phase::Unloaded && started == 1 {
        assert!(matches!(event, Event::Wanted | Event::Resume), "{event:?}");
    }
    if let Event::Unload { .. } = event {
        let ended = [Effect::EndQueued, Effect::CancelRunning, Effect::End];
        assert!(ended.iter().all(|end| !reaction.effects.contains(end)));
    }
    // No task is ended by an unload, nor by an engine that ends within one, unless
    // it was one crash too many.
    if before.unloading() && tells_the_end(event) && life.phase() != Phase::Failed {
        assert!(!reaction.effects.contains(&Effect::EndQueued), "{event:?}");
    }
    if reaction.ignored {
        assert!(reaction.effects.is_empty() && reaction.moved.is_none());
        assert_eq!(before.phase(), life.phase());
    }
    if let Some(moved) = reaction.moved {
        assert_eq!((moved.from, moved.to), (before.phase(), life.phase()));
    } else {
        assert_eq!(before.phase(), life.phase(), "a silent move by {event:?}");
    }
}

/// The candidate's configuration exists exactly while a reload that could be
/// rolled back is under way.
fn track_candidate(candidate: &mut bool, event: Event, effects: &[Effect]) {
    if event == Event::Reload {
        *candidate = true;
    }
    for effect in effects {
        match effect {
            Effect::Start(Which::Candidate) | Effect::Replace => {
                assert!(*candidate, "{event:?} uses a candidate that is gone");
            }
            Effect::Adopt => {
                assert!(*candidate, "{event:?} adopts a candidate that is gone");
                *candidate = false;
            }
            Effect::DropCandidate => *candidate = false,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_order_of_events_breaks_an_invariant(
        on_demand in any::<bool>(),
        events in prop::collection::vec((any_event(), 0u64..400, 0.0f64..1.0), 0..80),
        end in prop::collection::vec(any_event(), 0..20),
    ) {
        let (mut life, mut now) = machine_that(on_demand);
        let mut candidate = false;
        let mut resting = false;
        for (event, seconds, random) in events {
            now += Duration::from_secs(seconds);
            let event = at(event, now);
            let before = life.clone();
            let Ok(reaction) = life.on(event, now, random) else {
                prop_assert_eq!(before.phase(), life.phase());
                continue;
            };
            check(&before, event, &life, &reaction);
            track_candidate(&mut candidate, event, &reaction.effects);
            match event {
                Event::Drain { .. } => resting = true,
                Event::Resume | Event::Reload => resting = false,
                _ => {}
            }
            if resting {
                let wakes = |effect: &Effect| matches!(effect, Effect::Start(_) | Effect::Replace);
                prop_assert!(!reaction.effects.iter().any(wakes), "{:?} wakes a drained pool", event);
            }
        }
        // Whatever happened, and whatever else comes, a shutdown ends it.
        let mut ends = 0;
        let mut last = Vec::new();
        last.push(at(Event::Shutdown { until: now }, now));
        last.extend(end);
        last.extend([Event::TasksOver, Event::Stopped]);
        for event in last {
            let event = at(event, now);
            let before = life.clone();
            let Ok(reaction) = life.on(event, now, 0.5) else { continue };
            check(&before, event, &life, &reaction);
            for effect in reaction.effects {
                prop_assert!(!matches!(effect, Effect::Start(_) | Effect::Replace));
                ends += usize::from(effect == Effect::End);
            }
        }
        prop_assert_eq!(life.phase(), Phase::Stopped);
        prop_assert_eq!(ends, 1);
    }

    #[test]
    fn a_crash_loop_always_ends_in_an_open_breaker(pauses in prop::collection::vec(0u64..30, 5..20)) {
        let (mut life, mut now) = ready();
        let mut opened = false;
        for seconds in pauses {
            now += Duration::from_secs(seconds);
            opened |= life.on(Event::Exited(RestartCause::Crash), now, 0.5).unwrap().opened;
            now = now.max(life.next_try().unwrap());
            life.on(Event::TimeUp, now, 0.5).unwrap();
            life.on(Event::Ready, now, 0.5).unwrap();
        }
        prop_assert!(opened, "five crashes, at most a minute apart");
    }
}
