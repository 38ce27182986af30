//! The one owner of all pulls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use llama_orch_types::ErrorCode;
use provision_kit::chain::one_line;
use provision_kit::progress::Reporter;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::kept::{Kept, KeptPull};
use super::view::{Pull, PullView, PulledModel};
use super::{AT_ONCE, Fetch, Identity, QUEUED_AT_MOST};
use crate::runtimes::apart;
use crate::services::event_log::Failure;
use crate::services::watched::WorkState;
use crate::services::watched::measured;
use crate::services::watched::meter::Meter;

/// How long a finished pull can be looked at.
const KEEP_FOR: Duration = Duration::from_hours(1);

/// How many finished pulls are kept at most.
const KEEP_AT_MOST: usize = 100;

/// When a client whose pull found no room shall come back.
const COME_BACK: Duration = Duration::from_secs(10);

/// What the owner is asked.
#[derive(Debug)]
pub(super) enum Command {
    GoOn(oneshot::Sender<()>),
    Begin {
        reference: String,
        reply: oneshot::Sender<Result<PullView, Failure>>,
    },
    List(oneshot::Sender<Vec<PullView>>),
    Show {
        id: String,
        reply: oneshot::Sender<Option<(Arc<Pull>, PullView)>>,
    },
    Cancel {
        id: String,
        reply: oneshot::Sender<Option<PullView>>,
    },
}

type Outcome = Result<PulledModel, Failure>;

/// A pull and what only its owner knows.
#[derive(Debug)]
struct Entry {
    pull: Arc<Pull>,
    /// As it was asked for, secrets included.
    reference: String,
    identity: Identity,
    /// While it runs.
    job: Option<AbortHandle>,
    ended: Option<Instant>,
}

impl Entry {
    fn state(&self) -> WorkState {
        self.pull.work.standing().progress.state
    }
}

#[derive(Debug)]
pub(super) struct Owner {
    inbox: mpsc::Receiver<Command>,
    fetch: Arc<dyn Fetch>,
    kept: Kept,
    /// What was written last; nothing is written twice.
    written: Vec<KeptPull>,
    reporter: Arc<dyn Reporter>,
    /// The oldest first; bounded by what may run and wait and what is kept.
    entries: Vec<Entry>,
    jobs: JoinSet<Outcome>,
}

impl Owner {
    pub(super) fn new(
        inbox: mpsc::Receiver<Command>,
        fetch: Arc<dyn Fetch>,
        kept: Kept,
        reporter: Arc<dyn Reporter>,
    ) -> Self {
        Self {
            inbox,
            fetch,
            kept,
            written: Vec::new(),
            reporter,
            entries: Vec::new(),
            jobs: JoinSet::new(),
        }
    }

    pub(super) async fn run(mut self, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(command) = self.inbox.recv() => self.heed(command).await,
                Some(ended) = self.jobs.join_next_with_id(), if !self.jobs.is_empty() => {
                    self.settle(ended).await;
                }
            }
        }
        // What is not over stays in the file, and goes on in the next process.
        self.jobs.shutdown().await;
        for entry in &self.entries {
            entry.pull.work.abandon();
        }
    }

    async fn heed(&mut self, command: Command) {
        self.forget_old(Instant::now());
        // Whoever asked may have gone away; then nobody is told.
        match command {
            Command::GoOn(reply) => {
                self.go_on().await;
                let _ = reply.send(());
            }
            Command::Begin { reference, reply } => {
                let _ = reply.send(self.begin(reference).await);
            }
            Command::List(reply) => {
                let all = (0..self.entries.len()).map(|at| self.view(at)).collect();
                let _ = reply.send(all);
            }
            Command::Show { id, reply } => {
                let found = self.find(&id);
                let found = found.map(|at| (Arc::clone(&self.entries[at].pull), self.view(at)));
                let _ = reply.send(found);
            }
            Command::Cancel { id, reply } => {
                let found = self.find(&id);
                if let Some(at) = found {
                    self.cancel(at).await;
                }
                let _ = reply.send(found.map(|at| self.view(at)));
            }
        }
    }

    fn find(&self, id: &str) -> Option<usize> {
        self.entries.iter().position(|entry| entry.pull.id == id)
    }

    fn view(&self, at: usize) -> PullView {
        let entry = &self.entries[at];
        let standing = entry.pull.work.standing();
        let position = (standing.progress.state == WorkState::Queued)
            .then(|| self.count(WorkState::Queued, at) as u64);
        entry.pull.view(&standing, position)
    }

    /// How many of the first `until` entries are in this state.
    fn count(&self, state: WorkState, until: usize) -> usize {
        let first = self.entries[..until].iter();
        first.filter(|entry| entry.state() == state).count()
    }

    async fn begin(&mut self, reference: String) -> Result<PullView, Failure> {
        let identity = self.fetch.identify(&reference)?;
        let same = |entry: &Entry| entry.identity.key == identity.key && !entry.state().is_over();
        if let Some(at) = self.entries.iter().position(same) {
            return Ok(self.view(at));
        }
        // One that finds a free place does not wait.
        let waiting = self.count(WorkState::Queued, self.entries.len());
        if waiting >= QUEUED_AT_MOST {
            return Err(queue_full());
        }
        let id = Uuid::now_v7().to_string();
        self.add(id, reference, identity, Timestamp::now());
        let at = self.entries.len() - 1;
        self.fill();
        // A pull that is promised is one that a restart goes on with.
        self.write_down().await;
        Ok(self.view(at))
    }

    fn add(&mut self, id: String, reference: String, identity: Identity, created_at: Timestamp) {
        self.entries.push(Entry {
            pull: Arc::new(Pull::new(id, identity.model.clone(), created_at)),
            reference,
            identity,
            job: None,
            ended: None,
        });
    }

    async fn go_on(&mut self) {
        let kept = self.kept.clone();
        let unfinished = tokio::task::spawn_blocking(move || kept.load()).await;
        // A reader that broke off has read nothing.
        let unfinished = unfinished.unwrap_or_default();
        self.written.clone_from(&unfinished);
        for pull in unfinished.into_iter().take(AT_ONCE + QUEUED_AT_MOST) {
            if self.find(&pull.pull_id).is_some() {
                continue;
            }
            match self.fetch.identify(&pull.reference) {
                Ok(identity) => {
                    tracing::info!(
                        model = identity.model,
                        pull = pull.pull_id,
                        "a pull that was interrupted goes on"
                    );
                    self.add(pull.pull_id, pull.reference, identity, pull.created_at);
                }
                Err(failure) => {
                    tracing::warn!(
                        pull = pull.pull_id,
                        failure = failure.message,
                        "a pull that was interrupted cannot go on"
                    );
                }
            }
        }
        self.fill();
        self.write_down().await;
    }

    /// Starts as many of those that wait as may run.
    fn fill(&mut self) {
        for entry in &mut self.entries {
            if self.jobs.len() >= AT_ONCE {
                return;
            }
            if entry.state() != WorkState::Queued {
                continue;
            }
            entry.pull.work.begin();
            let (fetch, pull) = (Arc::clone(&self.fetch), Arc::clone(&entry.pull));
            let meter = Meter::new(Arc::clone(&self.reporter));
            let reference = entry.reference.clone();
            entry.job = Some(self.jobs.spawn(async move {
                let reporter = meter.clone();
                let fetching = async move { fetch.fetch(&reference, reporter).await };
                measured(&pull.work, &meter, apart(fetching)).await
            }));
        }
    }

    async fn settle(&mut self, ended: Result<(tokio::task::Id, Outcome), JoinError>) {
        let (job, outcome) = match ended {
            Ok((job, outcome)) => (job, outcome),
            Err(error) => {
                let broken = Failure::internal("the pull broke off");
                (error.id(), Err(broken))
            }
        };
        let of_job = |entry: &&mut Entry| entry.job.as_ref().is_some_and(|it| it.id() == job);
        if let Some(entry) = self.entries.iter_mut().find(of_job) {
            entry.job = None;
            entry.ended.get_or_insert_with(Instant::now);
            let model = &entry.pull.model;
            match &outcome {
                // One that was cancelled is over already, and stays so.
                _ if entry.pull.work.standing().progress.state.is_over() => {}
                Ok(_) => tracing::info!(model, "pulled"),
                Err(failure) => tracing::warn!(model, failure = failure.message, "not pulled"),
            }
            entry.pull.work.end(outcome);
        }
        self.fill();
        self.write_down().await;
    }

    async fn cancel(&mut self, at: usize) {
        let entry = &mut self.entries[at];
        if entry.state().is_over() {
            return;
        }
        entry.pull.work.cancel();
        entry.ended = Some(Instant::now());
        // Its place is free when its job has ended.
        if let Some(job) = &entry.job {
            job.abort();
        }
        tracing::info!(model = entry.pull.model, "a pull was cancelled");
        self.write_down().await;
    }

    /// Writes down what is not over. A pull is as good without: it only would
    /// not outlive this process.
    async fn write_down(&mut self) {
        let unfinished = self.entries.iter().filter(|entry| !entry.state().is_over());
        let pulls: Vec<KeptPull> = unfinished
            .filter(|entry| !entry.identity.has_secret)
            .map(|entry| KeptPull {
                pull_id: entry.pull.id.clone(),
                reference: entry.reference.clone(),
                created_at: entry.pull.work.created_at,
            })
            .collect();
        if pulls == self.written {
            return;
        }
        let (kept, list) = (self.kept.clone(), pulls.clone());
        match tokio::task::spawn_blocking(move || kept.save(list)).await {
            Ok(Ok(())) => self.written = pulls,
            Ok(Err(error)) => {
                tracing::warn!(error = %one_line(&error), "the list of unfinished pulls was not written");
            }
            // The daemon ends.
            Err(_) => {}
        }
    }

    fn forget_old(&mut self, now: Instant) {
        let ended = self.entries.iter().filter(|entry| entry.ended.is_some());
        let mut surplus = ended.count().saturating_sub(KEEP_AT_MOST);
        self.entries.retain(|entry| {
            // A job that still ends is not forgotten: it has a place.
            let Some(ended) = entry.ended.filter(|_| entry.job.is_none()) else {
                return true;
            };
            let is_surplus = surplus > 0;
            surplus = surplus.saturating_sub(1);
            !is_surplus && now.saturating_duration_since(ended) < KEEP_FOR
        });
    }
}

fn queue_full() -> Failure {
    let mut failure = Failure::new(
        ErrorCode::QueueFull,
        format!("{QUEUED_AT_MOST} pulls wait already, as many as may"),
    )
    .retry_after(COME_BACK)
    .with_hint("come back after `retry_after_ms`; DELETE /v2/catalog/pulls/{id} cancels one");
    failure.policy_label = Some("pulls_queued".to_owned());
    failure
}
