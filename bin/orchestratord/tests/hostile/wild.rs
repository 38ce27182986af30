//! Every route the daemon describes, asked at random.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use test_harness_fake_engine::Script;

use crate::generate::{Delivery, Dice, Request, Route, request};
use crate::raw::Raw;
use crate::support::{Daemon, Setup, id};
use crate::{Footprint, a_task_completes, until_descriptors_are_back};

const WORKERS: u64 = 4;
const REQUESTS: usize = 400;

/// Repeats a run.
const SEED: &str = "HOSTILE_SEED";

/// What may be kept after so many requests: finished tasks, and what the
/// allocator does not give back.
const KEPT_KIB: u64 = 64 * 1024;

fn routes(description: &Value) -> Vec<Route> {
    let paths = description["paths"].as_object().unwrap();
    let routes = paths.iter().flat_map(|(path, methods)| {
        let methods = methods.as_object().unwrap().keys();
        methods.map(move |method| Route {
            method: method.to_uppercase(),
            path: path.clone(),
        })
    });
    routes.collect()
}

#[tokio::test]
async fn every_route_answers_whatever_is_asked() {
    let seed = match std::env::var(SEED) {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => u64::from(std::process::id()),
    };
    println!("repeat with {SEED}={seed}");
    let limits = json!({ "header_seconds": 1, "body_stall_seconds": 1, "idle_seconds": 2, "reader_stall_seconds": 2 });
    let daemon = Setup::new(&Script::default())
        .top("limits", limits)
        .ready()
        .await;
    a_task_completes(&daemon).await;
    let description = daemon.get_json("/openapi.json").await;
    let routes = routes(&description);
    assert!(routes.len() >= 11, "{routes:?}");
    let mut tasks = Vec::new();
    for _ in 0..3 {
        let accepted = daemon
            .submit(json!({ "prompt": "a", "max_tokens": 2 }))
            .await;
        tasks.push(id(&accepted).to_owned());
    }
    let before = Footprint::of(&daemon);
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let (url, routes, tasks) = (daemon.url.clone(), routes.clone(), tasks.clone());
            let dice = Dice::new(seed.wrapping_add(worker << 32));
            tokio::task::spawn_blocking(move || ask_at_random(&url, dice, &routes, &tasks))
        })
        .collect();
    let mut statuses = BTreeMap::<u16, usize>::new();
    for worker in workers {
        for (status, count) in worker.await.unwrap() {
            *statuses.entry(status).or_default() += count;
        }
    }
    println!("answers by status (0 is none): {statuses:?}");
    for usual in [200, 202, 400, 404, 405] {
        assert!(statuses.contains_key(&usual), "no {usual}: {statuses:?}");
    }
    serves_again(&daemon, &routes).await;
    until_descriptors_are_back(&daemon, before).await;
    let after = Footprint::of(&daemon);
    println!("{before:?}, {after:?}");
    assert!(after.resident_kib < before.resident_kib + KEPT_KIB);
}

/// Whatever pools were told at random, they serve when they are told to.
async fn serves_again(daemon: &Daemon, routes: &[Route]) {
    if routes.iter().any(|route| route.path.ends_with("/resume")) {
        daemon.post("/v2/pools/default/resume", json!({})).await;
    }
    daemon.until_state("ready").await;
    a_task_completes(daemon).await;
}

fn ask_at_random(
    url: &str,
    mut dice: Dice,
    routes: &[Route],
    tasks: &[String],
) -> BTreeMap<u16, usize> {
    let mut statuses = BTreeMap::new();
    for number in 0..REQUESTS {
        let request = request(&mut dice, routes, tasks);
        let shown = String::from_utf8_lossy(&request.bytes);
        let shown: String = shown.chars().take(2000).collect();
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            ask(url, &mut dice, &request)
        }));
        let status = asked.unwrap_or_else(|_| {
            panic!("request {number}, {:?}: {shown:?}", request.delivery);
        });
        *statuses.entry(status).or_default() += 1;
    }
    statuses
}

/// The status of the first answer; 0 if there was none and none was due.
fn ask(url: &str, dice: &mut Dice, request: &Request) -> u16 {
    let mut raw = Raw::connect(url);
    let bytes = &request.bytes;
    match request.delivery {
        Delivery::Whole => {
            raw.send(bytes);
        }
        Delivery::InPieces => {
            for piece in bytes.chunks(bytes.len() / (2 + dice.below(3)) + 1) {
                raw.send(piece);
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Delivery::HalfClosed => {
            raw.send(bytes);
            raw.half_close();
        }
        Delivery::Aborted => {
            raw.send(&bytes[..dice.below(bytes.len().max(1))]);
            return 0;
        }
    }
    let headless = bytes.starts_with(b"HEAD ");
    let mut answer = raw.answer(headless);
    if answer.as_ref().is_some_and(|answer| answer.status == 100) {
        answer = raw.answer(headless);
    }
    assert!(answer.is_some() || !request.answered, "no answer");
    answer.map_or(0, |answer| answer.status)
}
