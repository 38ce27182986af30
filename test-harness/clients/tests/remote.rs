//! Engines elsewhere that are real: a second daemon with its engine, and a
//! `llama-server` that was started by hand, as the two replicas of one pool.

#![allow(clippy::print_stdout, reason = "what was seen is to be read")]

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use futures::future::join_all;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use test_harness_clients::bare::Bare;
use test_harness_clients::calls::{ask, begin, request, shown, task_of};
use test_harness_clients::server::{Server, alone};
use test_harness_e2e_haiku::engine::Engine;
use test_harness_e2e_haiku::wait_for;

const TOKENS: u32 = 8;
/// What each replica takes at the same time.
const SLOTS: u32 = 2;
const PROMPT: &str = "Write one line about rain.";
/// A small model goes on with it for hundreds of tokens.
const COUNTING: &str = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,";
/// Far beyond what an engine needs to see that nobody wants its answer any more, and
/// far below what the tasks would take that are cancelled here.
const FREE_LIMIT: Duration = Duration::from_secs(5);
const SEEN_LIMIT: Duration = Duration::from_secs(30);

/// The places of the front daemon's replicas in its configuration.
const DAEMON: &str = "r0";
const BARE: &str = "r1";

/// A daemon in front of another one and of a bare engine.
struct Fleet {
    front: Server,
    behind: Server,
    /// The engine of the daemon behind.
    engine: Engine,
    bare: Bare,
    http: Client,
}

impl Fleet {
    async fn start() -> Self {
        let mut behind = Server::start(
            "behind",
            json!({ "slots": SLOTS, "profile": null }),
            json!({}),
        )
        .await;
        behind.daemon().until_ready().await;
        let engine = behind.daemon().engine().await;
        let binary = std::fs::read_link(engine.executable()).expect("the engine runs");
        let model = behind.daemon().handoff()["model"]["path"].clone();
        let model = model.as_str().expect("the handoff names the file");
        let bare = Bare::start(&binary, Path::new(model), SLOTS).await;
        let endpoints = json!([
            { "url": behind.url(), "slots": SLOTS },
            { "url": bare.engine.api.url(), "slots": SLOTS },
        ]);
        let front = Server::in_front_of("front", behind.first(), endpoints).await;
        let fleet = Self {
            front,
            behind,
            engine,
            bare,
            http: Client::builder().no_proxy().build().expect("a client"),
        };
        fleet.until_slots(2 * SLOTS).await;
        fleet
    }

    async fn pool(&self) -> Value {
        let path = format!("/v2/pools/{}", self.front.first());
        self.front.api().json(&path).await
    }

    /// Waits until the front daemon's pool takes so many tasks at the same time.
    async fn until_slots(&self, slots: u32) {
        wait_for("the replicas that are well", SEEN_LIMIT, async || {
            let pool = self.pool().await;
            (pool["state"] == "ready" && pool["slots"] == slots).then_some(())
        })
        .await;
    }

    /// A call through `/v1` that must be answered; says which replica did.
    async fn call(&self, stream: bool) -> String {
        let body = request(self.front.first(), PROMPT, TOKENS, stream);
        let answer = ask(&self.http, self.front.url(), &body).await;
        assert!(!answer.text.trim().is_empty(), "{answer:?}");
        self.replica_of(&answer.task).await
    }

    /// A native task that must be answered; says which replica did.
    async fn native(&self) -> String {
        let admission = self.front.api().submit(&self.task(PROMPT, TOKENS)).await;
        let events = self.front.api().events(&admission, None).await.rest().await;
        let tokens = events.iter().filter(|seen| seen.event.name == "token");
        assert!(tokens.count() > 0, "{events:#?}");
        self.replica_of(id(&admission)).await
    }

    fn task(&self, prompt: &str, max_tokens: u32) -> Value {
        json!({
            "pool_id": self.front.first(), "max_tokens": max_tokens, "temperature": 0.0,
            "prompt": prompt,
        })
    }

    /// The replica that a task's receipt names. The task must be completed.
    async fn replica_of(&self, task: &str) -> String {
        let task = shown(self.front.api(), task).await;
        assert_eq!(task["status"], "completed", "{task:#}");
        let receipt = &task["end"]["receipt"];
        assert_eq!(receipt["engine"], "openai", "{task:#}");
        let replica = receipt["replica"].as_str();
        replica.expect("a receipt names the replica").to_owned()
    }

    /// Waits until no engine works and no daemon has a task running.
    async fn until_free(&self, what: &str) {
        let begun = Instant::now();
        wait_for(what, FREE_LIMIT, async || {
            let path = format!("/v2/pools/{}", self.behind.first());
            let far = self.behind.api().json(&path).await;
            let busy = self.engine.busy_slots().await + self.bare.engine.busy_slots().await;
            let near = self.pool().await;
            (busy == 0 && far["running"] == 0 && near["running"] == 0).then_some(())
        })
        .await;
        println!("{what}: seen after {:?}", begun.elapsed());
    }

    async fn until_both_work(&self) {
        wait_for("work on both engines", SEEN_LIMIT, async || {
            let (far, bare) = (self.engine.busy_slots(), self.bare.engine.busy_slots());
            (far.await == 1 && bare.await == 1).then_some(())
        })
        .await;
    }
}

fn id(admission: &Value) -> &str {
    admission["task_id"].as_str().expect("a task id")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_daemon_and_a_real_engine_are_one_pool() {
    let _alone = alone().await;
    let mut fleet = Fleet::start().await;
    each_kind_reaches_both(&fleet).await;
    cancels_reach_both(&fleet).await;
    who_goes_is_gone_for_both(&fleet).await;
    let replicas = fleet.pool().await["replicas"].clone();
    for replica in replicas.as_array().expect("replicas") {
        assert_eq!(replica["healthy"], true, "{replicas:#}");
        let error = &replica["last_error"];
        assert!(error.is_null(), "a cancel is no failure: {replicas:#}");
    }
    one_dies_and_nothing_is_lost(&mut fleet).await;
    let Fleet { front, behind, .. } = fleet;
    front.stop().await;
    behind.stop().await;
}

/// One after the other, a task goes to the replica that has served less: so two of a
/// kind see both.
async fn each_kind_reaches_both(fleet: &Fleet) {
    let both = BTreeSet::from([DAEMON.to_owned(), BARE.to_owned()]);
    let before = fleet.bare.engine.tokens_predicted().await;
    let native = [fleet.native().await, fleet.native().await];
    assert_eq!(BTreeSet::from(native), both, "native tasks");
    for stream in [false, true] {
        let calls = [fleet.call(stream).await, fleet.call(stream).await];
        assert_eq!(BTreeSet::from(calls), both, "stream: {stream}");
    }
    let predicted = fleet.bare.engine.tokens_predicted().await - before;
    assert!(
        predicted > 0 && predicted <= 3 * u64::from(TOKENS),
        "{predicted}"
    );
}

/// Two at the same time are on one replica each.
async fn cancels_reach_both(fleet: &Fleet) {
    let api = fleet.front.api();
    let task = fleet.task(COUNTING, 3000);
    let admitted = [api.submit(&task).await, api.submit(&task).await];
    let mut readers = vec![];
    for admission in &admitted {
        let mut reader = api.events(admission, None).await;
        reader.tokens(3).await;
        readers.push(reader);
    }
    fleet.until_both_work().await;
    for admission in &admitted {
        let path = format!("/v2/tasks/{}/cancel", id(admission));
        let (status, answer) = api.post(&path, &json!({})).await;
        assert_eq!(status, StatusCode::OK, "{answer:#}");
        assert_eq!(answer["cancelled"], true, "{answer:#}");
    }
    fleet.until_free("cancelled tasks' slots").await;
    for mut reader in readers {
        let events = reader.rest().await;
        let last = &events.last().expect("a cancelled task ends").event;
        assert_eq!(last.name, "end", "{last:?}");
        assert_eq!(last.data["finish_reason"], "cancelled", "{last:?}");
    }
}

/// Clients of `/v1` that go away in the middle.
async fn who_goes_is_gone_for_both(fleet: &Fleet) {
    let body = request(fleet.front.first(), COUNTING, 3000, true);
    let mut answers = vec![];
    for _ in 0..2 {
        let mut answer = begin(&fleet.http, fleet.front.url(), &body).await;
        let piece = answer.chunk().await.expect("the stream begins");
        assert!(piece.is_some(), "the stream has ended already");
        answers.push(answer);
    }
    fleet.until_both_work().await;
    let tasks: Vec<String> = answers.iter().map(task_of).collect();
    drop(answers);
    fleet.until_free("slots of clients that went").await;
    for task in &tasks {
        let task = shown(fleet.front.api(), task).await;
        assert_eq!(task["status"], "cancelled", "{task:#}");
    }
}

async fn one_dies_and_nothing_is_lost(fleet: &mut Fleet) {
    fleet.bare.kill();
    let fleet = &*fleet;
    // More than the one that is left takes at the same time.
    let (calls, tasks) = tokio::join!(
        join_all([false, true, false, true].map(|stream| fleet.call(stream))),
        join_all([fleet.native(), fleet.native()]),
    );
    for replica in calls.iter().chain(&tasks) {
        assert_eq!(replica, DAEMON, "the other one is dead");
    }
    fleet.until_slots(SLOTS).await;
    let replicas = fleet.pool().await["replicas"].clone();
    assert_eq!(replicas[0]["healthy"], true, "{replicas:#}");
    assert_eq!(replicas[1]["healthy"], false, "{replicas:#}");
    assert!(replicas[1]["last_error"].is_string(), "{replicas:#}");
    assert_eq!(fleet.call(true).await, DAEMON);
}
