//! Two models under a budget that fits one, asked in turn by many: nothing is
//! lost, nothing is answered by the wrong model, and the models do not take
//! turns at every request.

#![allow(clippy::print_stdout, reason = "what was measured is to be read")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::Client;
use serde_json::{Value, json};
use test_harness_clients::calls::{ask, request, shown};
use test_harness_clients::server::{Server, engines_of, pool, pool_with};
use test_harness_clients::twin;
use test_harness_e2e_haiku::engine::{counter, sha256};

const CLIENTS: usize = 8;
const REQUESTS: usize = 200;
const TOKENS: u32 = 8;
const DWELL: Duration = Duration::from_secs(5);

/// For all requests together; they took a fifth of it when this was written.
const LIMIT: Duration = Duration::from_mins(2);

const PROMPTS: [&str; 4] = [
    "Name a colour.",
    "What is the capital of France?",
    "Write one line about rain.",
    "How many legs has a spider?",
];

/// A model as it is to be found: its pool, its file's digest, and what it
/// answers.
#[derive(Debug)]
struct Model {
    pool: String,
    digest: String,
    answers: Vec<String>,
}

/// What a model answers when it has a daemon for itself.
async fn alone(name: &'static str, model: &str, http: &Client) -> (Vec<String>, String, Value) {
    let mut server = Server::start(name, json!({ "model": model }), json!({})).await;
    server.daemon().until_ready().await;
    let path = server.daemon().handoff()["model"]["path"].clone();
    let mut answers = vec![];
    for prompt in PROMPTS {
        let body = request(server.first(), prompt, TOKENS, false);
        answers.push(ask(http, server.url(), &body).await.text);
    }
    let memory = server.api().json("/v2/memory").await;
    server.stop().await;
    let path = path.as_str().expect("the handoff names the file");
    (answers, path.to_owned(), memory)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_models_take_turns_in_the_memory_of_one() {
    let http = Client::builder().no_proxy().build().expect("a client");
    let (first, path, memory) = alone("first", "haiku", &http).await;
    let (twin_path, twin_digest) = twin::of(Path::new(&path)).await;
    let twin_model = twin_path.to_str().expect("the path is text").to_owned();
    let (second, _, _) = alone("second", &twin_model, &http).await;
    for (one, other) in first.iter().zip(&second) {
        assert_ne!(one, other, "the models are to be told apart by each answer");
    }

    let budget = budget(&memory);
    let twin_pool = pool("twin");
    let more = json!({
        "memory": { "ram": budget, "min_dwell_seconds": DWELL.as_secs() },
        "pools": { &twin_pool: pool_with(&json!({
            "model": twin_model, "profile": "deterministic",
        })) },
    });
    let server = Server::start("swap", json!({ "load": "on_demand" }), more).await;
    let models = [
        Model {
            pool: server.first().to_owned(),
            digest: sha256(Path::new(&path)).expect("the first model can be read"),
            answers: first,
        },
        Model {
            pool: twin_pool,
            digest: twin_digest,
            answers: second,
        },
    ];
    interleave(&server, &models, &http).await;
    server.stop().await;
}

/// Enough for one of two equal models by whichever figure goes, estimated or
/// measured, and by neither for both.
fn budget(memory: &Value) -> String {
    let pools = memory["pools"].as_object();
    let pool = pools.and_then(|pools| pools.values().next());
    let pool = pool.unwrap_or_else(|| panic!("no pool in {memory:#}"));
    let figures = ["estimated", "measured", "promised"].map(|name| pool[name]["ram"].as_u64());
    let known = || figures.into_iter().flatten();
    let (Some(least), Some(most)) = (known().min(), known().max()) else {
        panic!("no figures in {memory:#}");
    };
    println!("one model takes {figures:?} bytes: estimated, measured, promised");
    assert!(
        most < 2 * least,
        "the figures lie too far apart: {memory:#}"
    );
    format!("{}B", u64::midpoint(most, 2 * least))
}

async fn interleave(server: &Server, models: &[Model; 2], http: &Client) {
    let most = Arc::new(AtomicUsize::new(0));
    let watching = Arc::new(AtomicBool::new(true));
    let watcher = {
        let (most, watching, daemon) = (most.clone(), watching.clone(), server.pid());
        std::thread::spawn(move || {
            while watching.load(Ordering::Relaxed) {
                most.fetch_max(engines_of(daemon).len(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        })
    };
    let begun = Instant::now();
    let clients = (0..CLIENTS).map(|client| one_client(server, models, http, client));
    let asked: Vec<[usize; 2]> = join_all(clients).await;
    let took = begun.elapsed();
    watching.store(false, Ordering::Relaxed);
    watcher.join().expect("the watcher does not panic");

    let by_model = |at: usize| asked.iter().map(|counts| counts[at]).sum::<usize>();
    assert_eq!(by_model(0) + by_model(1), REQUESTS);
    let metrics = server.api().text("/metrics").await;
    let loads = counter(&metrics, "orchestratord_pool_loads_total").unwrap_or(0);
    let swaps = counter(&metrics, "orchestratord_memory_swaps_total").unwrap_or(0);
    println!(
        "{REQUESTS} requests by {CLIENTS} clients, {} and {}, in {:.1} s: {loads} loads, {swaps} swaps",
        by_model(0),
        by_model(1),
        took.as_secs_f64()
    );
    assert!(took <= LIMIT, "it took {took:?}");
    let most = most.load(Ordering::Relaxed);
    assert_eq!(most, 1, "engines at the same time in the memory of one");
    // A turn ends when its pool has no task left, or after the dwell. In the first
    // case all clients wait for the other model, so its turn has one answer for
    // each of them at least. Only a turn that follows one of the second kind may be
    // shorter, and of these there are no more than dwells.
    let dwells = (took.as_secs_f64() / DWELL.as_secs_f64()).ceil() as u64;
    let bound = (REQUESTS / CLIENTS) as u64 + 2 * dwells + 1;
    assert!(
        (2..=bound).contains(&loads),
        "{loads} loads, at most {bound}"
    );
    assert_eq!(
        swaps + 1,
        loads,
        "each load but the first took another's place"
    );
}

/// One client's share, one request after another, at random over both models.
async fn one_client(
    server: &Server,
    models: &[Model; 2],
    http: &Client,
    client: usize,
) -> [usize; 2] {
    let mut random = Random(client as u64 + 1);
    let mut asked = [0, 0];
    for turn in 0..REQUESTS / CLIENTS {
        let (at, prompt) = (random.below(2), random.below(PROMPTS.len()));
        let model = &models[at];
        let body = request(&model.pool, PROMPTS[prompt], TOKENS, turn % 2 == 0);
        let answer = ask(http, server.url(), &body).await;
        assert_eq!(answer.text, model.answers[prompt], "{body}");
        let task = shown(server.api(), &answer.task).await;
        let seen: BTreeMap<&str, &Value> = BTreeMap::from([
            ("pool", &task["pool_id"]),
            ("status", &task["status"]),
            ("model", &task["end"]["receipt"]["model_digest"]),
        ]);
        let (pool, status, digest) = (json!(model.pool), json!("completed"), json!(model.digest));
        let expected = BTreeMap::from([("pool", &pool), ("status", &status), ("model", &digest)]);
        assert_eq!(seen, expected, "{task:#}");
        asked[at] += 1;
    }
    asked
}

/// The same requests in every run: xorshift.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % limit
    }
}
