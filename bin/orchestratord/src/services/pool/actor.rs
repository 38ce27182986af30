//! The one owner of a pool's queue and running tasks.
//!
//! Commands come in, decisions are made here and nowhere else, and the result
//! is published. Nothing in here waits for the engine: a running task is a
//! future of its own in a [`JoinSet`], and its end is one more thing to handle.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use adapter_host::AdapterHost;
use llama_orch_types::{ProvisionedContext, TaskId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;

use super::lifecycle::{Event, Lifecycle};
use super::meters::{Gauges, TaskMeters};
use super::residence::Residence;
use super::work::Running;
use super::{
    Command, Leaving, LogTail, Order, PoolSettings, PoolSnapshot, ReloadView, Submission,
    Transition, Wanted,
};
use crate::app::config::{LoadPolicy, PoolConfig};
use crate::services::admission::{AdmissionQueue, Priority};
use crate::services::dispatch::{Finished, NotFreed};
use crate::services::estimates::ServiceTimes;
use crate::services::event_log::Failure;
use crate::services::preparation::PreparationBoard;

/// Notes of runs that may wait for the actor: each run sends one at the most.
const NOTES: usize = 64;

/// How much of what has come is taken before it is published.
const AT_ONCE: usize = 64;

pub(super) struct Actor {
    pub(super) settings: Arc<PoolSettings>,
    pub(super) host: AdapterHost,
    pub(super) board: Arc<PreparationBoard>,
    pub(super) lifecycle: Lifecycle,
    pub(super) transitions: Arc<Vec<Transition>>,
    pub(super) last_error: Option<Failure>,
    pub(super) last_error_at: Option<SystemTime>,
    /// The configuration that a reload brings, until it is adopted.
    pub(super) candidate: Option<Arc<PoolConfig>>,
    pub(super) reload: Option<ReloadView>,
    pub(super) context: Option<Arc<ProvisionedContext>>,
    /// How many tasks the engine takes now, where that changes while it runs.
    pub(super) capacity: Option<u32>,
    pub(super) engine_log: LogTail,
    /// Engines that were ready so far.
    pub(super) engines: u64,
    /// When tasks on an engine that was replaced end.
    pub(super) retire_until: Option<tokio::time::Instant>,
    pub(super) queue: AdmissionQueue<Submission>,
    pub(super) running: HashMap<TaskId, Running>,
    pub(super) runs: JoinSet<Finished>,
    pub(super) times: ServiceTimes,
    pub(super) residence: Residence,
    /// Tasks taken to an engine so far.
    pub(super) dispatched: u64,
    pub(super) doubt: u64,
    /// No task is taken to the engine before.
    pub(super) hold: Option<tokio::time::Instant>,
    pub(super) distrust: Option<String>,
    /// For runs: a cancelled task's slot is not seen free.
    pub(super) not_freed: mpsc::Sender<NotFreed>,
    /// Who waits for the pool's end.
    pub(super) drained: Vec<oneshot::Sender<()>>,
    pub(super) leaving: Option<Leaving>,
    pub(super) ended: bool,
    pub(super) orders: watch::Sender<Order>,
    pub(super) gauges: Gauges,
    pub(super) meters: Arc<TaskMeters>,
}

pub(super) fn spawn(
    settings: Arc<PoolSettings>,
    host: AdapterHost,
    board: Arc<PreparationBoard>,
    commands: mpsc::Receiver<Command>,
) -> (watch::Receiver<PoolSnapshot>, watch::Receiver<Order>) {
    let on_demand = settings.config.load == LoadPolicy::OnDemand;
    let wanted = if on_demand {
        Wanted::Rest
    } else {
        Wanted::Start {
            config: Arc::clone(&settings.config),
            prove: false,
        }
    };
    let now = Instant::now();
    let (orders, ordered) = watch::channel(Order { serial: 1, wanted });
    let (not_freed, notes) = mpsc::channel(NOTES);
    let actor = Actor {
        queue: AdmissionQueue::new(settings.queue_capacity, settings.batch_ageing),
        gauges: Gauges::of(&settings.id),
        meters: Arc::new(TaskMeters::of(&settings.id)),
        lifecycle: Lifecycle::new(settings.policy(), on_demand, now),
        settings,
        host,
        board,
        transitions: Arc::default(),
        last_error: None,
        last_error_at: None,
        candidate: None,
        reload: None,
        context: None,
        capacity: None,
        engine_log: LogTail::default(),
        engines: 0,
        retire_until: None,
        running: HashMap::new(),
        runs: JoinSet::new(),
        times: ServiceTimes::default(),
        residence: Residence::new(now),
        dispatched: 0,
        hold: None,
        distrust: None,
        doubt: 0,
        not_freed,
        drained: Vec::new(),
        leaving: None,
        ended: false,
        orders,
    };
    let (publish, snapshot) = watch::channel(actor.snapshot());
    // Owned by the handles: it ends with the last of them, or when drained.
    tokio::spawn(actor.run(commands, notes, publish));
    (snapshot, ordered)
}

impl Actor {
    async fn run(
        mut self,
        mut commands: mpsc::Receiver<Command>,
        mut notes: mpsc::Receiver<NotFreed>,
        publish: watch::Sender<PoolSnapshot>,
    ) {
        while !self.ended {
            self.publish(&publish);
            let next_deadline = self.queue.next_deadline().map(Into::into);
            let phase_end = self.lifecycle.deadline().map(Into::into);
            let unloads_at = self.unloads_at().map(Into::into);
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.handle(command, &publish),
                    None => break,
                },
                Some(note) = notes.recv() => self.not_freed(note),
                Some(finished) = self.runs.join_next() => match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => self.bury(&error),
                },
                () = at(next_deadline), if next_deadline.is_some() => {}
                () = at(self.hold), if self.hold.is_some() => self.hold = None,
                () = at(phase_end), if phase_end.is_some() => self.take(Event::TimeUp, "the wait is over"),
                () = at(self.retire_until), if self.retire_until.is_some() => self.end_retiring(),
                () = at(unloads_at), if unloads_at.is_some() => self.end_idleness(),
            }
            self.settle();
            self.take_what_is_there(&mut commands, &publish);
        }
        self.publish(&publish);
        for reply in self.drained {
            let _ = reply.send(());
        }
    }

    /// What follows from whatever happened. It is not put off: a task that comes next
    /// finds the slots and the queue as they are after the one before.
    fn settle(&mut self) {
        self.settle_drain();
        self.settle_residence();
        if !self.ended {
            self.end_expired();
            self.dispatch();
        }
    }

    /// Where many come at once they are published once: what is published has a price
    /// that does not depend on how much has changed.
    fn take_what_is_there(
        &mut self,
        commands: &mut mpsc::Receiver<Command>,
        publish: &watch::Sender<PoolSnapshot>,
    ) {
        for _ in 0..AT_ONCE {
            if self.ended {
                return;
            }
            if let Ok(command) = commands.try_recv() {
                self.handle(command, publish);
            } else if let Some(finished) = self.runs.try_join_next() {
                match finished {
                    Ok(finished) => self.finish(finished),
                    Err(error) => self.bury(&error),
                }
            } else {
                return;
            }
            self.settle();
        }
    }

    fn handle(&mut self, command: Command, publish: &watch::Sender<PoolSnapshot>) {
        match command {
            Command::Submit(submission, reply) => {
                let admitted = self.admit(*submission);
                let _ = reply.send(admitted);
            }
            Command::Cancel(id, reply) => self.cancel(id, reply),
            Command::Position(id, reply) => {
                let position = self.queue.position(id, Instant::now());
                let _ = reply.send(position.map(|ahead| (ahead, self.until_start(ahead))));
            }
            Command::Report(serial, change) => self.report(serial, *change),
            Command::Request(request, reply) => {
                let answer = self.request(request);
                // Whoever asked sees at once what came of it.
                self.publish(publish);
                let _ = reply.send(answer);
            }
            Command::ShutDown(why, limit, reply) => {
                let until = Instant::now() + limit;
                self.drained.push(reply);
                let why = *self.leaving.get_or_insert(why);
                self.take(Event::Shutdown { until }, why.as_str());
            }
        }
    }

    pub(super) fn label(&self) -> String {
        self.settings.id.to_string()
    }

    fn snapshot(&self) -> PoolSnapshot {
        let restarts = self.lifecycle.restarts();
        PoolSnapshot {
            settings: Arc::clone(&self.settings),
            phase: self.lifecycle.phase(),
            since: self.lifecycle.since(),
            next_try: self.lifecycle.next_try(),
            transitions: Arc::clone(&self.transitions),
            restarts,
            reload: self.reload.clone(),
            engine_log: self.engine_log.clone(),
            last_error: self.last_error.clone(),
            last_error_at: self.last_error_at,
            context: self.context.clone(),
            queued_interactive: self.queue.len_of(Priority::Interactive),
            queued_batch: self.queue.len_of(Priority::Batch),
            running: self.running.len(),
            retiring: self.running.len() - self.running_here(),
            dispatched: self.dispatched,
            engines: self.engines,
            slots: self.slots(),
            engine_exits: restarts.crash + restarts.hang,
            distrust: self.distrust.clone(),
            doubt: self.doubt,
            leaving: self.leaving,
            times: self.times,
            idle_since: self.residence.idle_since,
            unloads_at: self.unloads_at(),
            loaded_since: self.residence.loaded_since,
            load_took: self.residence.load_took,
            loads: self.residence.loads,
            unloading: self.lifecycle.unloading(),
        }
    }

    fn publish(&self, publish: &watch::Sender<PoolSnapshot>) {
        let snapshot = self.snapshot();
        self.gauges.show(&snapshot);
        publish.send_replace(snapshot);
    }
}

/// Waits until the deadline; for ever where there is none.
async fn at(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
