//! The queue's rules, with the time passed in.

use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const AGEING: Duration = Duration::from_secs(30);

fn entry(priority: Priority, queued: Instant, deadline: Option<Instant>) -> Entry<()> {
    entry_of(0, priority, queued, deadline)
}

/// Client 0 has no name.
fn client(number: u8) -> Client {
    match number {
        0 => Client::Unnamed,
        _ => Client::Named(number.to_string().into()),
    }
}

fn entry_of(from: u8, priority: Priority, queued: Instant, deadline: Option<Instant>) -> Entry<()> {
    Entry {
        place: Place::default(),
        id: TaskId::generate(),
        client: client(from),
        priority,
        queued,
        deadline,
        task: (),
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// With a deadline so many seconds ahead, if any.
    Push(u8, Priority, Option<u64>),
    Pop,
    PopAndPutBack,
    Remove(usize),
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let priority = prop_oneof![Just(Priority::Interactive), Just(Priority::Batch)];
    prop_oneof![
        4 => (0u8..4, priority, prop::option::of(1u64..60)).prop_map(|(from, priority, within)| Step::Push(from, priority, within)),
        2 => Just(Step::Pop),
        1 => Just(Step::PopAndPutBack),
        1 => (0usize..20).prop_map(Step::Remove),
        2 => (1u64..25).prop_map(Step::Wait),
    ]
}

/// What is known of a queue from outside, for comparison.
#[derive(Debug, Default)]
struct Model {
    waiting: Vec<(TaskId, Priority, Option<Instant>)>,
}

proptest! {
    #[test]
    fn positions_are_the_order_in_which_tasks_go(steps in prop::collection::vec(step(), 0..120), capacity in 1usize..12) {
        let mut now = Instant::now();
        let mut queue = AdmissionQueue::new(capacity, AGEING);
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Push(from, priority, within) => {
                    let deadline = within.map(|seconds| now + Duration::from_secs(seconds));
                    let ahead = queue.ahead_of_next(priority, &client(from), now);
                    let new = entry_of(from, priority, now, deadline);
                    let id = new.id;
                    let full = queue.len() >= capacity;
                    prop_assert_eq!(queue.push(new).is_err(), full);
                    if !full {
                        prop_assert_eq!(queue.position(id, now), Some(ahead));
                        model.waiting.push((id, priority, deadline));
                    }
                }
                Step::Pop => {
                    let first = model.waiting.iter().find(|task| queue.position(task.0, now) == Some(0)).map(|task| task.0);
                    let popped = queue.pop(now).map(|entry| entry.id);
                    prop_assert_eq!(popped, first);
                    model.waiting.retain(|task| Some(task.0) != popped);
                }
                Step::PopAndPutBack => {
                    if let Some(entry) = queue.pop(now) {
                        queue.put_back(entry);
                    }
                }
                Step::Remove(index) => {
                    if let Some((id, ..)) = model.waiting.get(index).copied() {
                        prop_assert!(queue.remove(id).is_some());
                        model.waiting.remove(index);
                    }
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    while let Some(entry) = queue.pop_expired(now) {
                        prop_assert!(entry.deadline.is_some_and(|deadline| deadline <= now));
                        model.waiting.retain(|task| task.0 != entry.id);
                    }
                }
            }
            prop_assert_eq!(queue.len(), model.waiting.len());
            prop_assert!(model.waiting.iter().all(|task| task.2.is_none_or(|deadline| deadline > now)));
            prop_assert_eq!(queue.next_deadline(), model.waiting.iter().filter_map(|task| task.2).min());
            let mut positions: Vec<_> = model.waiting.iter().map(|task| queue.position(task.0, now).unwrap()).collect();
            positions.sort_unstable();
            prop_assert!(positions.iter().copied().eq(0..model.waiting.len()), "{:?}", positions);
        }
        // Emptied at one moment, tasks go exactly in the order of their positions.
        while !queue.is_empty() {
            let first = model.waiting.iter().find(|task| queue.position(task.0, now) == Some(0)).unwrap().0;
            prop_assert_eq!(queue.pop(now).unwrap().id, first);
            model.waiting.retain(|task| task.0 != first);
        }
    }

    // However many interactive tasks keep coming, a batch task goes within
    // two turns of its bound for each batch task before it.
    #[test]
    fn a_batch_task_is_never_starved(others in 0usize..6) {
        let start = Instant::now();
        let mut queue = AdmissionQueue::new(1000, AGEING);
        for _ in 0..others {
            queue.push(entry(Priority::Batch, start, None)).unwrap();
        }
        let last = entry(Priority::Batch, start, None);
        let id = last.id;
        queue.push(last).unwrap();
        let late = start + AGEING;
        let mut turns = 0;
        loop {
            queue.push(entry(Priority::Interactive, late, None)).unwrap();
            queue.push(entry(Priority::Interactive, late, None)).unwrap();
            turns += 1;
            if queue.pop(late).unwrap().id == id {
                break;
            }
        }
        prop_assert!(turns <= 2 * (others + 1), "{} turns", turns);
    }
}

#[test]
fn interactive_goes_first_while_batch_is_young() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(4, AGEING);
    queue.push(entry(Priority::Batch, now, None)).unwrap();
    queue.push(entry(Priority::Interactive, now, None)).unwrap();
    assert_eq!(queue.pop(now).unwrap().priority, Priority::Interactive);
    assert_eq!(queue.pop(now).unwrap().priority, Priority::Batch);
}

#[test]
fn a_task_put_back_goes_first_even_into_a_full_queue() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(2, AGEING);
    queue.push(entry(Priority::Batch, now, None)).unwrap();
    let first = queue.pop(now).unwrap();
    let id = first.id;
    queue.push(entry(Priority::Batch, now, None)).unwrap();
    queue.push(entry(Priority::Batch, now, None)).unwrap();
    queue.put_back(first);
    assert_eq!(queue.position(id, now), Some(0));
    assert!(queue.check_room().is_err());
    assert_eq!(queue.pop(now).unwrap().id, id);
}

#[test]
fn tasks_put_back_in_any_order_stand_in_the_order_of_their_admission() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(4, AGEING);
    let ids: Vec<TaskId> = (0..4)
        .map(|_| {
            let new = entry(Priority::Interactive, now, None);
            let id = new.id;
            queue.push(new).unwrap();
            id
        })
        .collect();
    let mut taken: Vec<_> = (0..3).map(|_| queue.pop(now).unwrap()).collect();
    taken.rotate_left(1);
    for entry in taken {
        queue.put_back(entry);
    }
    let order: Vec<TaskId> = std::iter::from_fn(|| queue.pop(now))
        .map(|entry| entry.id)
        .collect();
    assert_eq!(order, ids);
}

#[test]
fn clients_take_turns() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(100, AGEING);
    let mut names = HashMap::new();
    let mut push = |queue: &mut AdmissionQueue<()>, from| {
        let new = entry_of(from, Priority::Interactive, now, None);
        names.insert(new.id, from);
        queue.push(new).unwrap();
    };
    for _ in 0..4 {
        push(&mut queue, 1);
    }
    assert_eq!(
        queue.ahead_of_next(Priority::Interactive, &client(2), now),
        1
    );
    for from in [2, 2, 0] {
        push(&mut queue, from);
    }
    let order: Vec<u8> = std::iter::from_fn(|| queue.pop(now))
        .map(|entry| names[&entry.id])
        .collect();
    assert_eq!(order, [1, 2, 0, 1, 2, 1, 1]);
}

#[test]
fn who_withdraws_its_tasks_does_not_stand_behind_them() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(100, AGEING);
    queue
        .push(entry_of(2, Priority::Interactive, now, None))
        .unwrap();
    for _ in 0..50 {
        let new = entry_of(1, Priority::Interactive, now, None);
        let id = new.id;
        queue.push(new).unwrap();
        queue.remove(id).unwrap();
    }
    queue
        .push(entry_of(2, Priority::Interactive, now, None))
        .unwrap();
    let ahead = queue.ahead_of_next(Priority::Interactive, &client(1), now);
    assert!(ahead <= 2, "{ahead}");
}

#[test]
fn a_new_client_for_each_task_is_first_come_first_served() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(100, AGEING);
    let ids: Vec<TaskId> = (0..60u8)
        .map(|from| {
            let new = entry_of(from, Priority::Interactive, now, None);
            let id = new.id;
            queue.push(new).unwrap();
            id
        })
        .collect();
    let order: Vec<TaskId> = std::iter::from_fn(|| queue.pop(now))
        .map(|entry| entry.id)
        .collect();
    assert_eq!(order, ids);
}

#[test]
fn ten_thousand_tasks_are_admitted_and_taken_in_no_time() {
    let now = Instant::now();
    let mut queue = AdmissionQueue::new(10_000, AGEING);
    for number in 0..10_000u32 {
        let priority = match number % 3 {
            0 => Priority::Batch,
            _ => Priority::Interactive,
        };
        let new = entry_of((number % 251) as u8, priority, now, None);
        let id = new.id;
        queue.ahead_of_next(priority, &new.client, now);
        queue.push(new).unwrap();
        queue.position(id, now + AGEING).unwrap();
    }
    while queue.pop(now + AGEING).is_some() {}
    // Some tens of milliseconds even unoptimised; a queue that looked at every
    // task for each would take minutes.
    assert!(now.elapsed() < Duration::from_secs(10));
}

proptest! {
    // However many new clients keep coming, a client's last task goes within a
    // bound that its place and the queue's length give.
    #[test]
    fn a_client_is_never_starved(mine in 1usize..8, arrivals in 1usize..4, capacity in 10usize..40) {
        let now = Instant::now();
        let mut queue = AdmissionQueue::new(capacity, AGEING);
        let mut last = None;
        for _ in 0..mine {
            let new = entry_of(1, Priority::Interactive, now, None);
            last = Some(new.id);
            queue.push(new).unwrap();
        }
        let mut turns = 0;
        loop {
            for _ in 0..arrivals {
                let mut new = entry(Priority::Interactive, now, None);
                new.client = Client::Named(new.id.to_string().into());
                // Refused when the queue is full, as it is most of the time.
                let _ = queue.push(new);
            }
            turns += 1;
            if Some(queue.pop(now).unwrap().id) == last {
                break;
            }
            prop_assert!(turns <= (mine + 1) * capacity, "{} turns", turns);
        }
    }
}
