//! The actor: claims, leases, and who leaves.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::doubles::Double;
use crate::services::residency::plan::{Activity, Never, Wait};
use crate::services::residency::{
    Budget, Claim, Group, Lease, Limit, MemoryView, Needs, Refused, Residency, Rules, Unloading,
};

const DEADLINE: Duration = Duration::from_secs(20);

fn no_dwell() -> Rules {
    Rules {
        min_dwell: Some(Duration::ZERO),
        ..Rules::default()
    }
}

fn of(bytes: u64, by_hand: bool) -> Residency {
    let ram = Some(Limit { bytes, by_hand });
    let budget = Budget { ram, vram: None };
    Residency::start(no_dwell(), std::future::ready(budget))
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    let what = tokio::time::timeout(DEADLINE, what).await;
    what.expect("it comes in time")
}

async fn get(residency: &Residency, claim: Claim) -> Lease {
    soon(residency.acquire(claim, &|_| {})).await.unwrap()
}

async fn until(residency: &Residency, wanted: impl Fn(&MemoryView) -> bool) -> MemoryView {
    let mut view = residency.view.clone();
    soon(view.wait_for(|view| wanted(view)))
        .await
        .unwrap()
        .clone()
}

type Waiting = tokio::task::JoinHandle<Result<Lease, Refused>>;

/// Lines up, and returns once it stands in the line.
async fn line_up(residency: &Residency, claim: Claim) -> Waiting {
    let before = residency.view().waiting.len();
    let handle = residency.clone();
    let waiting = tokio::spawn(async move { handle.acquire(claim, &|_| {}).await });
    until(residency, |view| view.waiting.len() > before).await;
    waiting
}

#[tokio::test]
async fn an_idle_pool_makes_way_and_a_lease_is_given_back_when_dropped() {
    let residency = of(10, true);
    let (a, b) = (Double::new("a"), Double::new("b"));
    let lease = get(&residency, a.claim(8)).await;
    assert_eq!(lease.promised(), Needs::of_ram(8));
    a.idle();
    let waiting = line_up(&residency, b.claim(8)).await;
    assert_eq!(soon(a.asked(1)).await, [Unloading::IfIdle]);
    let view = until(&residency, |view| view.swaps == 1).await;
    assert_eq!(view.promised.ram, 8, "it holds its memory until it is gone");
    assert!(!waiting.is_finished());
    drop(lease);
    let lease = soon(waiting).await.unwrap().unwrap();
    drop(lease);
    until(&residency, |view| view.promised == Needs::default()).await;
}

#[tokio::test]
async fn a_busy_pool_is_asked_to_yield_and_the_words_say_for_what_is_waited() {
    let residency = of(10, true);
    let (a, b) = (Double::new("a"), Double::new("b"));
    let lease = get(&residency, a.claim(8)).await;
    a.set(Activity::Busy { tasks: 2 });
    let told = Arc::new(Mutex::new(Vec::new()));
    let (handle, claim, heard) = (residency.clone(), b.claim(8), Arc::clone(&told));
    let waiting = tokio::spawn(async move {
        let tell = move |wait: &Wait| heard.lock().unwrap().push(wait.to_string());
        handle.acquire(claim, &tell).await
    });
    assert_eq!(soon(a.asked(1)).await, [Unloading::Yield]);
    a.set(Activity::Leaving { tasks: 1 });
    let one = "waits for memory: `a` finishes 1 task";
    until(&residency, |view| {
        view.waiting
            .first()
            .is_some_and(|waiting| waiting.reason == one)
    })
    .await;
    drop(lease);
    soon(waiting).await.unwrap().unwrap();
    let told = told.lock().unwrap();
    assert_eq!(told[0], "waits for memory: `a` finishes 2 tasks");
}

#[tokio::test]
async fn a_pool_that_would_not_go_is_asked_again() {
    let residency = of(10, true);
    let (a, b) = (Double::new("a"), Double::new("b"));
    let _lease = get(&residency, a.claim(8)).await;
    a.idle();
    // Its unload is refused, as if a task had come in the meantime.
    let stubborn = Arc::clone(&a);
    let waiting = line_up(&residency, b.claim(8)).await;
    soon(stubborn.asked(1)).await;
    a.idle();
    assert!(soon(a.asked(2)).await.len() >= 2);
    waiting.abort();
    until(&residency, |view| view.waiting.is_empty()).await;
}

#[tokio::test]
async fn who_leaves_the_line_holds_up_nobody_and_no_grant_is_lost() {
    let residency = of(10, true);
    let (a, b, c) = (Double::new("a"), Double::new("b"), Double::new("c"));
    let lease = get(&residency, a.claim(10)).await;
    let first = line_up(&residency, b.claim(10)).await;
    let second = line_up(&residency, c.claim(10)).await;
    first.abort();
    until(&residency, |view| view.waiting.len() == 1).await;
    drop(lease);
    drop(soon(second).await.unwrap().unwrap());
    // Whether the grant or the leaving comes first, nothing stays promised.
    for _ in 0..200 {
        let lease = get(&residency, a.claim(10)).await;
        let waiting = line_up(&residency, b.claim(10)).await;
        drop(lease);
        tokio::task::yield_now().await;
        waiting.abort();
        drop(waiting.await);
        until(&residency, |view| {
            view.promised == Needs::default() && view.waiting.is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn those_who_wait_are_served_in_their_order() {
    let residency = of(10, true);
    let (a, b, c, d) = (
        Double::new("a"),
        Double::new("b"),
        Double::new("c"),
        Double::new("d"),
    );
    let lease = get(&residency, a.claim(6)).await;
    let large = line_up(&residency, b.claim(10)).await;
    // It would fit, but the larger one would wait the longer.
    let small = line_up(&residency, c.claim(4)).await;
    let refused = soon(residency.try_acquire(d.claim(1))).await.unwrap_err();
    assert!(
        matches!(refused, Refused::Never(Never::NoRoom(_))),
        "{refused:?}"
    );
    drop(lease);
    let lease = soon(large).await.unwrap().unwrap();
    assert!(!small.is_finished());
    drop(lease);
    soon(small).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_can_never_fit_is_refused_unless_only_the_estimate_says_so() {
    let (a, b) = (Double::new("a"), Double::new("b"));
    let by_hand = of(10, true);
    let refused = soon(by_hand.acquire(a.claim(11), &|_| {}))
        .await
        .unwrap_err();
    assert!(
        matches!(refused, Refused::Never(Never::TooLarge { .. })),
        "{refused:?}"
    );
    // Alone it may try, where the budget is the machine's.
    let machine = of(10, false);
    let lease = get(&machine, b.claim(4)).await;
    let waiting = line_up(&machine, a.claim(11)).await;
    assert!(!waiting.is_finished());
    drop(lease);
    let lease = soon(waiting).await.unwrap().unwrap();
    assert_eq!(lease.promised(), Needs::of_ram(10), "no more than there is");
}

#[tokio::test]
async fn a_pinned_pool_stays() {
    let residency = of(10, true);
    let (a, b) = (Double::new("a"), Double::new("b"));
    let _lease = get(&residency, a.claim(8)).await;
    a.pin();
    a.idle();
    let refused = soon(residency.acquire(b.claim(8), &|_| {}))
        .await
        .unwrap_err();
    assert_eq!(
        refused,
        Refused::Never(Never::Pinned(vec!["a".parse().unwrap()]))
    );
    let _beside = get(&residency, b.claim(2)).await;
}

#[tokio::test]
async fn a_group_has_so_many_seats() {
    let group = Group {
        pools: ["a", "b"].iter().map(|id| id.parse().unwrap()).collect(),
        at_most: 1,
    };
    let rules = Rules {
        groups: vec![group],
        ..no_dwell()
    };
    let residency = Residency::start(rules, std::future::ready(Budget::default()));
    let (a, b, c) = (Double::new("a"), Double::new("b"), Double::new("c"));
    let lease = get(&residency, a.claim(1)).await;
    a.idle();
    let _other = get(&residency, c.claim(1)).await;
    let beside = soon(residency.try_acquire(a.claim(1))).await;
    drop(beside.expect("a pool's second engine takes no second seat"));
    let waiting = line_up(&residency, b.claim(1)).await;
    soon(a.asked(1)).await;
    drop(lease);
    soon(waiting).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_was_measured_is_remembered() {
    let residency = of(1000, true);
    let a = Double::new("a");
    let lease = get(&residency, a.claim(300)).await;
    lease.measured(Needs::of_ram(400));
    // A moment later it holds less; it may need it again.
    lease.measured(Needs::of_ram(350));
    let view = until(&residency, |view| view.promised.ram == 420).await;
    assert_eq!(view.measured.ram, 400);
    drop(lease);
    let lease = get(&residency, a.claim(300)).await;
    assert_eq!(lease.promised().ram, 420);
    let memory = residency.view().pools[&"a".parse().unwrap()];
    assert_eq!(memory.measured, Some(Needs::of_ram(400)));
    // An estimate is not cut to next to nothing.
    let b = Double::new("b");
    let lease = get(&residency, b.claim(300)).await;
    lease.measured(Needs::of_ram(1));
    until(&residency, |view| {
        view.pools[&"b".parse().unwrap()].promised == Some(Needs::of_ram(200))
    })
    .await;
}
