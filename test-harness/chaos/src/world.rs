//! What all faults and clients share: the daemon, the book of tasks, the
//! journal, and the ways to wait for better times.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use test_harness_fake_engine::{Script, install};

use crate::args::{EngineChoice, Options};
use crate::client::{Manner, Submitted, Task};
use crate::error::{Failing, HarnessError, Verdict};
use crate::guests::Tally;
use crate::journal::Journal;
use crate::keeper::{Keeper, Up};
use crate::ledger::{Broken, Facts, Ledger};
use crate::procs::{self, Process};
use crate::rng::Rng;
use crate::setup::{POOL, Setup};
use crate::source::ModelSource;

/// How long a daemon may take to end once it was asked to.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// How long after the daemon's death a process of its may live.
pub const DEATH_LIMIT: Duration = Duration::from_secs(2);
/// How long help may take to show.
const HELP_AGAIN: Duration = Duration::from_secs(4);
/// A pool that says it tries again by itself within this time is waited for.
const PATIENCE_MS: u64 = 6000;

/// What the daemon can be asked for.
#[allow(
    clippy::struct_excessive_bools,
    reason = "one for each thing, and they are independent"
)]
#[derive(Debug, Clone, Copy, Default)]
pub struct Offers {
    pub drain: bool,
    pub reload: bool,
    pub resume: bool,
    /// `on_worker_reset: resume`.
    pub resume_tasks: bool,
    /// SIGHUP applies a changed configuration.
    pub hangup: bool,
}

/// How long it took from a cancel until the engine's slot was seen free, in
/// milliseconds.
#[derive(Debug, Clone, Default)]
pub struct Freed {
    pub decoding: Vec<u64>,
    /// The engine was still reading the prompt.
    pub in_prompt: Vec<u64>,
}

#[derive(Debug)]
pub struct World {
    own: Weak<World>,
    pub options: Options,
    pub setup: Arc<Setup>,
    pub keeper: Keeper,
    pub source: ModelSource,
    pub journal: Journal,
    pub http: reqwest::Client,
    config: Mutex<Value>,
    ledger: Mutex<Ledger>,
    broken: Mutex<Vec<Broken>>,
    /// The journal's last lines when the first promise was broken.
    story: Mutex<Vec<String>>,
    offers: Mutex<Offers>,
    freed: Mutex<Freed>,
    tally: Mutex<Tally>,
    paused: AtomicBool,
    /// Clients begin nothing any more.
    closing: AtomicBool,
    over: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks leaves a value half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While it lives, the clients that run all along begin nothing new.
#[derive(Debug)]
pub struct Quiet<'a>(&'a World);

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        self.0.paused.store(false, Ordering::Release);
    }
}

impl World {
    pub async fn make(options: Options, dir: PathBuf) -> Result<Arc<Self>, HarnessError> {
        let setup = Arc::new(Setup::make(&options, &dir).await?);
        let source = ModelSource::serve(&setup.engine.model)
            .await
            .map_err(HarnessError::Source)?;
        let config = setup.config(&source.url())?;
        let journal = dir.join("journal.txt");
        let journal =
            Journal::create(&journal).map_err(HarnessError::file("cannot write", &journal))?;
        // One connection for each request: none may break under another's feet.
        let http = reqwest::Client::builder()
            .no_proxy()
            .pool_max_idle_per_host(0)
            .build();
        let world = Arc::new_cyclic(|own| Self {
            own: own.clone(),
            keeper: Keeper::new(Arc::clone(&setup)),
            setup,
            options,
            source,
            journal,
            http: http.unwrap_or_default(),
            config: Mutex::new(config),
            ledger: Mutex::default(),
            broken: Mutex::default(),
            story: Mutex::default(),
            offers: Mutex::default(),
            freed: Mutex::default(),
            tally: Mutex::default(),
            paused: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        world.write_config(|_| ())?;
        Ok(world)
    }

    pub fn arc(&self) -> Arc<Self> {
        // Whoever calls this holds the world, so it is there.
        self.own.upgrade().expect("a world that is in use exists")
    }

    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    pub fn offers(&self) -> Offers {
        *lock(&self.offers)
    }

    pub fn is_scripted(&self) -> bool {
        self.options.engine == EngineChoice::Scripted
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    pub fn set_over(&self) {
        self.over.store(true, Ordering::Release);
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire) || self.closing.load(Ordering::Acquire)
    }

    /// From now on the clients only finish what they began.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }

    /// A slot was seen free so many milliseconds after a cancel.
    pub fn note_freed(&self, ms: u64, in_prompt: bool) {
        let mut freed = lock(&self.freed);
        if in_prompt {
            freed.in_prompt.push(ms);
        } else {
            freed.decoding.push(ms);
        }
    }

    pub fn freed(&self) -> Freed {
        lock(&self.freed).clone()
    }

    /// Notes how a guest's call ended.
    pub fn tally(&self, note: impl FnOnce(&mut Tally)) {
        note(&mut lock(&self.tally));
    }

    pub fn guests(&self) -> Tally {
        lock(&self.tally).clone()
    }

    pub fn broken(&self, invariant: &'static str, detail: impl Into<String>) {
        self.ledger().break_promise(invariant, detail);
    }

    /// Moves what the ledger found to the run's list, and into the journal.
    pub fn collect_broken(&self) -> usize {
        let found = self.ledger().take_broken();
        let mut broken = lock(&self.broken);
        for one in found {
            self.journal
                .write(format!("BROKEN {}: {}", one.invariant, one.detail));
            if broken.is_empty() {
                *lock(&self.story) = self.journal.last_lines();
            }
            broken.push(one);
        }
        broken.len()
    }

    /// What led to the first broken promise; empty if none was broken.
    pub fn story(&self) -> Vec<String> {
        lock(&self.story).clone()
    }

    pub fn all_broken(&self) -> Vec<Broken> {
        self.collect_broken();
        lock(&self.broken).clone()
    }

    /// Changes the configuration file.
    pub fn write_config(&self, change: impl FnOnce(&mut Value)) -> Result<(), HarnessError> {
        let text = {
            let mut config = lock(&self.config);
            change(&mut config);
            format!("{config:#}")
        };
        let path = self.setup.config_file();
        std::fs::write(&path, text).map_err(HarnessError::file("cannot write", &path))
    }

    /// Whether the daemon was told how long a client may be silent.
    pub fn has_limits(&self) -> bool {
        lock(&self.config)["limits"].is_object()
    }

    /// The script for the engine's next start.
    pub fn script(&self, script: &Script) {
        if let Some(dir) = &self.setup.engine.script_dir {
            install(dir, script);
        }
    }

    /// How long the pool may take to serve again.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(if self.is_scripted() { 45 } else { 90 })
    }

    pub async fn start(&self) -> Result<Up, Failing> {
        let started = self.keeper.start().await;
        let up = started.map_err(|why| Failing::broken("the daemon starts", why))?;
        self.journal
            .write(format!("daemon {} serves at {}", up.generation, up.url));
        self.learn_offers(&up).await;
        Ok(up)
    }

    async fn learn_offers(&self, up: &Up) {
        let Some(reply) = self.ask(up, "GET", "/openapi.json", None).await else {
            return;
        };
        let has =
            |route: &str| reply.body["paths"][format!("/v2/pools/{{id}}/{route}")].is_object();
        *lock(&self.offers) = Offers {
            drain: has("drain"),
            reload: has("reload"),
            resume: has("resume"),
            resume_tasks: reply.body.to_string().contains("on_worker_reset"),
            hangup: self.setup.knows_reload(),
        };
    }

    /// Ends the daemon in order. It must manage that in time and with success.
    pub async fn stop(&self) -> Result<(), Failing> {
        let Some(up) = self.keeper.up() else {
            return Err(Failing::broken("the daemon is up", "it was to be stopped"));
        };
        let below = procs::descendants(up.pid);
        let begun = Instant::now();
        let status = self.keeper.stop(STOP_LIMIT).await;
        self.journal.write(format!(
            "daemon {} stopped in {:?}: {status:?}",
            up.generation,
            begun.elapsed()
        ));
        match status {
            Some(status) if status.success() => self.nothing_lives(&below, DEATH_LIMIT).await,
            status => {
                let detail = format!("{status:?} after {:?}", begun.elapsed());
                Err(Failing::broken("the daemon stops in order", detail))
            }
        }
    }

    /// Waits until none of these processes lives, and none that bears this
    /// run's mark.
    pub async fn nothing_lives(&self, known: &[Process], limit: Duration) -> Result<(), Failing> {
        let begun = Instant::now();
        loop {
            let mut left = procs::marked(&self.setup.mark);
            left.extend(known.iter().filter(|process| process.lives()).cloned());
            if left.is_empty() {
                return Ok(());
            }
            if begun.elapsed() > limit {
                for process in &left {
                    crate::keeper::signal(process.pid, nix::sys::signal::Signal::SIGKILL);
                }
                let detail = format!("{limit:?} after the daemon's end: {left:?}");
                return Err(Failing::broken("no process outlives the daemon", detail));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Engines of the main pool that run now, whether they are ready or not.
    pub fn engines(&self) -> Vec<Process> {
        self.serving_from(&self.setup.engine.binary)
    }

    /// Engines of the guests' pools that run now.
    pub fn guest_engines(&self) -> Vec<Process> {
        let binary = self.setup.engine.guests.as_deref();
        binary.map_or_else(Vec::new, |binary| self.serving_from(binary))
    }

    fn serving_from(&self, binary: &Path) -> Vec<Process> {
        let Some(up) = self.keeper.up() else {
            return Vec::new();
        };
        let mut below = procs::descendants(up.pid);
        below.retain(|process| process.executable().as_deref() == Some(binary) && process.serves());
        below
    }

    /// The pool as shown, and noted in the ledger.
    pub async fn pool(&self, up: &Up) -> Option<Value> {
        let reply = self
            .ask(up, "GET", &format!("/v2/pools/{POOL}"), None)
            .await?;
        if reply.status != 200 {
            self.broken("the pool can be looked at", reply.body.to_string());
            return None;
        }
        self.ledger().pool(&reply.body, Instant::now());
        Some(reply.body)
    }

    /// The engine that serves now: its process by the pool's own word.
    pub async fn serving_engine(&self) -> Result<Process, Failing> {
        let limit = Instant::now() + self.patience();
        loop {
            if let Some(up) = self.keeper.up()
                && let Some(view) = self.pool(&up).await
                && view["state"] == "ready"
                && let Some(pid) = view["replica"]["pid"].as_u64()
                && let Some(process) = Process::of(pid as u32)
            {
                return Ok(process);
            }
            if Instant::now() > limit {
                return Err(Failing::broken(
                    "the pool serves again",
                    "no engine was to be seen",
                ));
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }

    /// Waits until the pool is ready and has answered a task.
    pub async fn settle(&self) -> Result<Duration, Failing> {
        let begun = Instant::now();
        let mut last = Value::Null;
        let mut helped = None;
        while begun.elapsed() < self.patience() {
            if let Some(up) = self.keeper.up() {
                if let Some(view) = self.pool(&up).await {
                    if view["state"] == "ready" && self.probe().await {
                        return Ok(begun.elapsed());
                    }
                    if helped.is_none_or(|at: Instant| at.elapsed() > HELP_AGAIN)
                        && self.help_up(&up, &view).await?
                    {
                        helped = Some(Instant::now());
                    }
                    last = view;
                }
            } else {
                // One fault at a time: whoever ended it has left it ended.
                self.start().await?;
            }
            tokio::time::sleep(Duration::from_millis(40)).await;
        }
        let detail = format!("not within {:?}: {last}", begun.elapsed());
        // So that the next fault finds a daemon that serves.
        let _ = self.stop().await;
        let _ = self.start().await;
        Err(Failing::broken("the pool serves again", detail))
    }

    /// A pool that stays where it is until somebody asks is asked. Whether
    /// that was so.
    async fn help_up(&self, up: &Up, view: &Value) -> Result<bool, Failing> {
        let state = view["state"].as_str().unwrap_or("");
        let in_state = view["in_state_ms"].as_u64().unwrap_or(0);
        let why = view["last_error"]["message"].as_str().unwrap_or("");
        let stays = match state {
            "failed" => {
                if why.is_empty() {
                    self.broken("a failed pool says why", view.to_string());
                }
                let again = view["last_error"]["retry_after_ms"].as_u64();
                again.is_none_or(|ms| ms > PATIENCE_MS) || in_state > PATIENCE_MS * 2
            }
            "draining" | "stopping" | "stopped" => in_state > PATIENCE_MS,
            _ => false,
        };
        if !stays {
            return Ok(false);
        }
        if self.offers().resume {
            self.journal
                .write(format!("the pool is {state}, resume it: {why}"));
            let path = format!("/v2/pools/{POOL}/resume");
            self.ask(up, "POST", &path, Some(&json!({}))).await;
        } else {
            self.journal.write(format!(
                "the pool is {state}, start the daemon again: {why}"
            ));
            self.stop().await?;
            self.start().await?;
        }
        Ok(true)
    }

    /// Whether a small task is answered.
    async fn probe(&self) -> bool {
        let mut rng = Rng::new(1);
        let (mut body, facts) = self.task_body(&mut rng, 2);
        body["priority"] = json!("interactive");
        match self.submit(&body, facts).await {
            Submitted::Admitted(task) => {
                let ending = self.follow(&task, &Manner::default()).await;
                matches!(ending.as_deref(), Some("stop" | "length"))
            }
            Submitted::Refused { .. } | Submitted::Gone => false,
        }
    }

    /// Waits until no client's task is queued or running.
    pub async fn quiet(&self) -> Result<Quiet<'_>, Failing> {
        self.paused.store(true, Ordering::Release);
        let quiet = Quiet(self);
        let limit = Instant::now() + Duration::from_secs(20);
        while Instant::now() < limit {
            if let Some(up) = self.keeper.up()
                && let Some(view) = self.pool(&up).await
            {
                let busy = view["running"].as_u64().unwrap_or(1)
                    + view["queue"]["interactive"].as_u64().unwrap_or(1)
                    + view["queue"]["batch"].as_u64().unwrap_or(1);
                if busy == 0 {
                    return Ok(quiet);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Err(Failing::broken(
            "tasks come to an end",
            "the pool was still busy after 20 s",
        ))
    }

    /// A task that is sure to be admitted, sooner or later.
    pub async fn admitted(&self, body: &Value, facts: Facts) -> Result<Task, Failing> {
        let limit = Instant::now() + self.patience();
        let mut last = String::new();
        while Instant::now() < limit {
            match self.submit(body, facts).await {
                Submitted::Admitted(task) => return Ok(task),
                Submitted::Refused { code, .. } => last = code,
                Submitted::Gone => "the daemon went away".clone_into(&mut last),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Err(Failing::broken("tasks are admitted again", last))
    }

    /// A task that streams now: it has given `tokens` tokens already, and is
    /// read on by somebody else.
    pub async fn streaming(
        &self,
        rng: &mut Rng,
        tokens: u64,
        length: u64,
    ) -> Result<Task, Failing> {
        for _ in 0..20 {
            let (body, facts) = self.task_body(rng, length);
            let task = self.admitted(&body, facts).await?;
            let (world, followed) = (self.arc(), task.clone());
            // Ends with the task, which has a limit.
            tokio::spawn(async move { world.follow(&followed, &Manner::default()).await });
            loop {
                let (open, seen) = {
                    let ledger = self.ledger();
                    (ledger.is_open(&task.key), ledger.tokens(&task.key))
                };
                if seen >= tokens && open {
                    return Ok(task);
                }
                if !open {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        Err(Failing::broken(
            "tasks stream",
            "none of twenty was caught in mid-stream",
        ))
    }

    /// How many tasks ended with each error so far.
    /// How many tasks have failed in this daemon, by code, as it counts itself: a
    /// client may read of a failure long after it came.
    pub async fn failures(&self, up: &Up) -> Result<BTreeMap<String, u64>, Failing> {
        let reply = self.ask(up, "GET", "/metrics", None).await;
        let reply = reply.ok_or_else(|| {
            Failing::broken("the daemon always answers", "/metrics gives nothing")
        })?;
        Ok(failed_tasks(reply.body.as_str().unwrap_or_default()))
    }

    /// No task may have failed since, except for its own deadline.
    pub async fn none_failed_since(&self, up: &Up, before: &BTreeMap<String, u64>) -> Verdict {
        let now = self.failures(up).await?;
        let more: Vec<String> = now
            .iter()
            .filter(|(code, _)| code.as_str() != "DEADLINE_UNMET")
            .filter_map(|(code, count)| {
                let more = count - before.get(code).copied().unwrap_or(0);
                (more > 0).then(|| format!("{more} {code}"))
            })
            .collect();
        if more.is_empty() {
            return Ok(String::new());
        }
        Err(Failing::broken(
            "no admitted task is lost by it",
            more.join(", "),
        ))
    }
}

fn failed_tasks(metrics: &str) -> BTreeMap<String, u64> {
    let mut failed = BTreeMap::new();
    let lines = metrics.lines();
    for line in lines.filter(|line| line.starts_with("orchestratord_tasks_total{")) {
        let outcome = line.split("outcome=\"").nth(1);
        let outcome = outcome.and_then(|rest| rest.split('"').next());
        let count = line
            .rsplit(' ')
            .next()
            .and_then(|count| count.parse::<u64>().ok());
        let (Some(outcome), Some(count)) = (outcome, count) else {
            continue;
        };
        // Codes are written in capitals, other outcomes are not.
        if outcome
            .chars()
            .all(|letter| letter.is_ascii_uppercase() || letter == '_')
        {
            *failed.entry(outcome.to_owned()).or_insert(0) += count;
        }
    }
    failed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_are_counted() {
        let metrics = "# TYPE orchestratord_tasks_total counter\n\
            orchestratord_tasks_total{pool=\"a\",outcome=\"completed\"} 7\n\
            orchestratord_tasks_total{pool=\"a\",outcome=\"WORKER_RESET\"} 2\n\
            orchestratord_tasks_total{pool=\"b\",outcome=\"WORKER_RESET\"} 1\n";
        assert_eq!(
            failed_tasks(metrics),
            BTreeMap::from([("WORKER_RESET".to_owned(), 3)])
        );
    }
}
