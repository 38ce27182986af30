//! The supervisor of a pool whose engine runs elsewhere (`engine: openai`): nothing is
//! fetched and no process started. It checks the replicas, and the pool is ready while
//! at least one is well.
//!
//! ```text
//! Start ─► checks ─► one is well ─► bind ─► Ready ─► none is well ─► Exited
//!             │ none for `load_timeout_seconds`                         │
//!             ▼                                                         ▼
//!         NotStarted ── the checks go on, for ever ──► Ready      the same again
//! ```
//!
//! The adapter stays bound while no replica is well, so that it can be seen how they
//! are. Streams hold the adapter that they began with.

use std::sync::Arc;
use std::time::Duration;

use adapter_host::AdapterHost;
use llama_orch_types::{EngineKind, ErrorCode, ProvisionedContext, ProvisioningMode, ReplicaId};
use provision_kit::chain::one_line;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::WorkerAdapter;
use worker_adapters_openai_http::{Endpoint, Replicas, Waits};

use crate::app::config::{PoolConfig, SetupError};
use crate::services::event_log::Failure;
use crate::services::pool::lifecycle::RestartCause;
use crate::services::pool::{Bound, Change, LogTail, Order, PoolHandle, Wanted};

/// How long the replicas of a new configuration may take until one is well, while those
/// of the old one serve.
const REPLACE_LIMIT: Duration = Duration::from_secs(15);
/// For the token that proves a new configuration.
const PROVE_LIMIT: Duration = Duration::from_secs(30);
/// How often it is seen whether tasks on replaced replicas are over.
const RETIRED_EVERY: Duration = Duration::from_millis(500);

/// Follows the pool's orders until told to stop.
pub async fn supervise(pool: PoolHandle, host: AdapterHost, stop: CancellationToken) {
    let mut remote = Remote {
        orders: pool.orders(),
        pool,
        host,
        serial: 0,
        kept: None,
        retiring: Vec::new(),
    };
    let mut orders = remote.orders.clone();
    loop {
        let order = orders.borrow_and_update().clone();
        tokio::select! {
            () = stop.cancelled() => break,
            () = remote.follow(order) => {}
        }
        tokio::select! {
            () = stop.cancelled() => break,
            changed = orders.changed() => if changed.is_err() { break },
            () = remote.attend() => {}
        }
    }
    remote.unbind();
}

struct Remote {
    pool: PoolHandle,
    host: AdapterHost,
    orders: watch::Receiver<Order>,
    /// The order that is being followed.
    serial: u64,
    kept: Option<Kept>,
    /// Replicas that were replaced, with tasks on them.
    retiring: Vec<Replicas>,
}

/// The replicas that the pool is to have.
struct Kept {
    config: Arc<PoolConfig>,
    replicas: Replicas,
    /// One must have completed something before the pool is ready.
    prove: bool,
    /// One for all reports: by it the pool knows the engine again. None while no
    /// replica is well.
    context: Option<Arc<ProvisionedContext>>,
    /// What the pool was told of how many tasks they take.
    capacity: Option<u32>,
    /// None is well until then: the start has failed. None once that was said.
    give_up: Option<Instant>,
    /// The pool was told that the start has failed.
    failed: bool,
    /// The last complaint that the pool was told.
    complaint: String,
}

impl Kept {
    fn new(config: Arc<PoolConfig>, replicas: Replicas, prove: bool) -> Self {
        let limit = Duration::from_secs(config.load_timeout_seconds);
        Self {
            config,
            replicas,
            prove,
            context: None,
            capacity: None,
            give_up: Some(Instant::now() + limit),
            failed: false,
            complaint: String::new(),
        }
    }

    fn bound(&self) -> Option<Bound> {
        Some(Bound {
            context: Arc::clone(self.context.as_ref()?),
            log: LogTail::default(),
            config: Some(Arc::clone(&self.config)),
        })
    }
}

impl Remote {
    async fn report(&self, change: Change) {
        self.pool.report(self.serial, change).await;
    }

    fn unbind(&self) {
        self.host.unbind(self.pool.id(), &ReplicaId::first());
    }

    async fn follow(&mut self, order: Order) {
        self.serial = order.serial;
        match order.wanted {
            Wanted::Rest => {
                self.unbind();
                self.kept = None;
                // Their tasks are over, or were given up.
                self.retiring.clear();
                self.report(Change::Stopped).await;
            }
            Wanted::Start { config, prove } => self.start(config, prove).await,
            Wanted::Replace(config) if self.serves() => self.replace(config).await,
            Wanted::Keep | Wanted::Replace(_) => {
                let change = match self.kept.as_ref().and_then(Kept::bound) {
                    Some(bound) => Change::Ready(bound),
                    None => self.gone(),
                };
                self.report(change).await;
                if let Some(kept) = &mut self.kept {
                    kept.capacity = None;
                }
            }
        }
    }

    fn serves(&self) -> bool {
        self.kept
            .as_ref()
            .is_some_and(|kept| kept.context.is_some())
    }

    async fn start(&mut self, config: Arc<PoolConfig>, prove: bool) {
        self.report(Change::Starting).await;
        let same = self.kept.as_ref().is_some_and(|kept| {
            // After a failed start the token files are read anew.
            !kept.failed && kept.config.same_engine(&config)
        });
        if same && let Some(kept) = self.kept.take() {
            // What is known of the replicas is not forgotten.
            self.kept = Some(Kept::new(config, kept.replicas, prove));
            return;
        }
        match self.replicas(&config) {
            Ok(replicas) => {
                let kept = Kept::new(config, replicas, prove);
                let context = self.context(&kept.config, None);
                self.host
                    .bind_adapter(context, Arc::new(kept.replicas.clone()));
                self.kept = Some(kept);
            }
            Err(failure) => {
                self.unbind();
                self.kept = None;
                self.not_started(failure).await;
            }
        }
    }

    /// Binds other replicas, if one of them is well, while the old ones serve.
    async fn replace(&mut self, config: Arc<PoolConfig>) {
        let serial = self.serial;
        let mut orders = self.orders.clone();
        let overtaken = orders.wait_for(|order| order.serial > serial);
        let outcome = tokio::select! {
            // Followed in the next round.
            _ = overtaken => return,
            outcome = self.prepare(&config) => outcome,
        };
        match outcome {
            Ok((replicas, context)) => {
                let adapter = Arc::new(replicas.clone());
                self.host.bind_adapter(context.clone(), adapter);
                let mut kept = Kept::new(config, replicas, false);
                kept.context = Some(Arc::new(context));
                let bound = kept.bound();
                if let Some(old) = self.kept.replace(kept) {
                    self.retiring.push(old.replicas);
                }
                if let Some(bound) = bound {
                    self.report(Change::Replaced(bound)).await;
                }
            }
            Err(failure) => self.report(Change::NotReplaced(failure)).await,
        }
    }

    async fn prepare(
        &self,
        config: &Arc<PoolConfig>,
    ) -> Result<(Replicas, ProvisionedContext), Failure> {
        let replicas = self.replicas(config)?;
        let well = async {
            loop {
                replicas.check_due().await;
                if replicas.capacity() > 0 {
                    return;
                }
                sleep_until(replicas.next_check()).await;
            }
        };
        if timeout(REPLACE_LIMIT, well).await.is_err() {
            return Err(none_is_well(&replicas));
        }
        prove(&replicas).await?;
        let context = self.context_of(config, &replicas).await;
        Ok((replicas, context))
    }

    /// Checks the replicas whenever that is due, and tells the pool what comes of it.
    /// May be dropped; never ends by itself.
    async fn attend(&mut self) {
        loop {
            if let Some(kept) = &self.kept {
                kept.replicas.check_due().await;
                self.settle().await;
            }
            self.bury_retired().await;
            let pause = if self.retiring.is_empty() {
                None
            } else {
                Some(Instant::now() + RETIRED_EVERY)
            };
            let Some(kept) = &self.kept else {
                // Until there is another order.
                match pause {
                    Some(pause) => sleep_until(pause).await,
                    None => std::future::pending::<()>().await,
                }
                continue;
            };
            let next = kept.replicas.next_check();
            let next = [
                Some(next),
                pause,
                kept.give_up.filter(|_| kept.context.is_none()),
            ];
            let next = next
                .into_iter()
                .flatten()
                .min()
                .unwrap_or_else(Instant::now);
            tokio::select! {
                () = sleep_until(next) => {}
                () = kept.replicas.changed() => {}
            }
        }
    }

    async fn bury_retired(&mut self) {
        let before = self.retiring.len();
        self.retiring.retain(|replicas| replicas.running() > 0);
        if before > 0 && self.retiring.is_empty() {
            self.report(Change::Retired).await;
        }
    }

    /// Tells the pool what has changed.
    async fn settle(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        let capacity = kept.replicas.capacity();
        match (&kept.context, capacity) {
            (None, 0) => self.still_waits().await,
            (None, _) => self.come_up().await,
            (Some(_), 0) => {
                kept.context = None;
                kept.give_up = None;
                let change = self.gone();
                self.report(change).await;
            }
            (Some(_), _) if kept.capacity != Some(capacity) => {
                self.report(Change::Capacity(capacity)).await;
                if let Some(kept) = &mut self.kept {
                    kept.capacity = Some(capacity);
                }
            }
            (Some(_), _) => {}
        }
    }

    /// A replica is well.
    async fn come_up(&mut self) {
        let Some(kept) = &self.kept else { return };
        if kept.prove
            && let Err(failure) = prove(&kept.replicas).await
        {
            // Not again before the next order.
            self.kept = None;
            return self.not_started(failure).await;
        }
        let context = self.context_of(&kept.config, &kept.replicas).await;
        self.host
            .bind_adapter(context.clone(), Arc::new(kept.replicas.clone()));
        let Some(kept) = &mut self.kept else { return };
        kept.context = Some(Arc::new(context));
        kept.capacity = None;
        kept.prove = false;
        if let Some(bound) = kept.bound() {
            self.report(Change::Ready(bound)).await;
        }
    }

    async fn still_waits(&mut self) {
        let Some(kept) = &mut self.kept else { return };
        let failure = none_is_well(&kept.replicas);
        if kept.give_up.is_some_and(|at| at <= Instant::now()) {
            kept.give_up = None;
            kept.failed = true;
            return self.not_started(failure).await;
        }
        if kept.give_up.is_some() && kept.complaint != failure.message {
            kept.complaint.clone_from(&failure.message);
            self.report(Change::Trouble(failure)).await;
        }
    }

    async fn not_started(&self, failure: Failure) {
        let log = Vec::new();
        self.report(Change::NotStarted { failure, log }).await;
    }

    fn gone(&self) -> Change {
        let failure = match &self.kept {
            Some(kept) => none_is_well(&kept.replicas),
            None => Failure::new(ErrorCode::PoolUnavailable, "the pool has no replica"),
        };
        Change::Exited {
            cause: RestartCause::Crash,
            failure,
        }
    }

    /// With the tokens that the files hold now.
    fn replicas(&self, config: &PoolConfig) -> Result<Replicas, Failure> {
        let unusable = |error: &dyn std::error::Error| {
            Failure::new(ErrorCode::PoolUnavailable, one_line(error))
        };
        let endpoint = |endpoint: &crate::app::config::EndpointConfig| {
            if let Some(file) = endpoint.open_to_others() {
                tracing::warn!(
                    pool = %self.pool.id(), file = %file.display(),
                    "other users of this machine may read the token file: chmod 600"
                );
            }
            Ok::<_, SetupError>(Endpoint {
                url: endpoint.url.trim_end_matches('/').to_owned(),
                model: config.model.clone(),
                bearer: endpoint.bearer()?,
                token_file: endpoint.token_file.clone(),
                slots: endpoint.slots,
            })
        };
        let endpoints: Result<Vec<Endpoint>, SetupError> =
            config.endpoints.iter().map(endpoint).collect();
        let endpoints = endpoints.map_err(|error| unusable(&error))?;
        let settings = self.host.settings();
        let waits = Waits {
            first_token: settings.first_token_timeout,
            next_token: settings.next_token_timeout,
            ..Waits::default()
        };
        Replicas::new(endpoints, waits).map_err(|error| unusable(&error))
    }

    async fn context_of(&self, config: &PoolConfig, replicas: &Replicas) -> ProvisionedContext {
        // Nothing of it is needed to send tasks.
        let props = replicas.props().await.ok();
        self.context(config, props.map(|props| (props.version, props.ctx)))
    }

    /// `says` is the engine's version and context length, as far as it tells them.
    fn context(&self, config: &PoolConfig, says: Option<(String, u32)>) -> ProvisionedContext {
        let (engine_version, ctx) = says.unwrap_or_else(|| ("unknown".to_owned(), 0));
        let urls: Vec<&str> = config
            .endpoints
            .iter()
            .map(|endpoint| endpoint.url.trim_end_matches('/'))
            .collect();
        ProvisionedContext {
            pool_id: self.pool.id().clone(),
            replica_id: ReplicaId::first(),
            url: urls.join(","),
            engine: EngineKind::Openai,
            engine_version,
            engine_digest: None,
            provisioning_mode: ProvisioningMode::Remote,
            model: None,
            slots: config.expected_slots(),
            ctx,
            flags: Vec::new(),
            pid: None,
        }
    }
}

async fn prove(replicas: &Replicas) -> Result<(), Failure> {
    let proved = replicas.probe(PROVE_LIMIT).await;
    proved.map_err(|error| Failure::from_worker(&error))
}

fn none_is_well(replicas: &Replicas) -> Failure {
    let complaint = replicas.complaint();
    Failure::new(
        ErrorCode::PoolUnavailable,
        format!("no replica takes tasks: {complaint}"),
    )
    .with_hint("see `replicas` in GET /v2/pools/{id}; they are asked again and again")
    .retriable()
}
