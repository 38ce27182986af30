//! Provides models: from a reference to a verified file and its facts.
//!
//! ```text
//! reference ─► profile or single source
//!    │ lock of this model (another process may be fetching it: then wait)
//!    ├─► in the store already? ── yes ──► still what was verified? ─► use it
//!    │                               └─ no ──► mended from the sources (`mend`)
//!    └─► sources in order ─► part file ─► digest, header, signature ─► rename ─► record
//! ```

pub(crate) mod manage;
mod mend;
mod recording;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use llama_orch_types::{Digest, ModelMetadata};
use provision_kit::chain::one_line;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provision_kit::leftovers;
use provision_kit::lock::{FileLock, LockError};
use provision_kit::pip::Pip;
use provision_kit::progress::{Reporter, Step, StepKind, Unit};

use crate::admit::{Gate, Hashed};
use crate::config::{HubSettings, ModelProvisionerConfig, VerifyPolicy};
use crate::error::ModelError;
use crate::evict::EvictionPlan;
use crate::eviction;
use crate::fetch::{Expected, FetchError, Fetcher, Obtained};
use crate::lease::Leases;
use crate::profile::Profiles;
use crate::provenance::{self, How, ModelProvenance};
use crate::reference::ModelRef;
use crate::store::{ModelRecord, Store};
use crate::verify::SignatureVerifier;
use crate::wanted::Wanted;
use mend::Mended;

pub use recording::Recording;

/// How long a model that is just being removed is waited for.
const REMOVAL_WAIT: Duration = Duration::from_secs(10);

/// Provides models. A model that was provided counts as in use, here and for
/// other processes, until this value is dropped.
#[derive(Debug)]
pub struct ModelProvisioner {
    config: ModelProvisionerConfig,
    profiles: Profiles,
    gate: Gate,
    leases: Arc<Leases>,
    mended: Mended,
    fetcher: Fetcher,
    locks: PathBuf,
    downloads: PathBuf,
    provenance: PathBuf,
    reporter: Arc<dyn Reporter>,
}

#[derive(Debug)]
struct Provided {
    record: ModelRecord,
    how: How,
}

impl ModelProvisioner {
    /// Fails for a profile that makes no sense. Touches neither disk nor
    /// network. The Hub's settings come from the environment.
    pub fn new(
        config: ModelProvisionerConfig,
        cache: &CacheDirs,
        runtime: &RuntimeDirs,
        reporter: Arc<dyn Reporter>,
    ) -> Result<Self, ModelError> {
        let profiles = Profiles::new(&config.profiles)?;
        Ok(Self {
            profiles,
            gate: Gate {
                store: Store::new(cache.models(), &cache.locks()),
                policy: config.verify,
                verifier: None,
                hashed: Hashed::default(),
            },
            leases: Arc::new(Leases::new(cache.locks())),
            mended: Mended::default(),
            fetcher: Fetcher::new(&config, cache.downloads()),
            locks: cache.locks(),
            downloads: cache.downloads(),
            provenance: runtime.provenance(),
            config,
            reporter,
        })
    }

    /// Replaces what the environment says about the Hub.
    #[must_use]
    pub fn with_hub(mut self, hub: HubSettings) -> Self {
        self.fetcher.hub = hub;
        self
    }

    /// Uses this pip instead of looking for the machine's.
    #[must_use]
    pub fn with_pip(mut self, pip: Pip) -> Self {
        self.fetcher.pip = Some(pip);
        self
    }

    /// Asks for a signature of every file that is let in.
    #[must_use]
    pub fn with_signature_verifier(mut self, verifier: Arc<dyn SignatureVerifier>) -> Self {
        self.gate.verifier = Some(verifier);
        self
    }

    /// First wait after a failed attempt; half a second where not set.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Duration) -> Self {
        self.fetcher.backoff = backoff;
        self
    }

    /// All profiles, by name.
    pub fn profiles(&self) -> &Profiles {
        &self.profiles
    }

    /// Makes sure that the model is on this machine and verified. The model
    /// counts as in use from then on.
    pub async fn ensure(&self, reference: &str) -> Result<ModelMetadata, ModelError> {
        let (model, _) = self.ensure_recording(reference, true).await?;
        Ok(model)
    }

    /// The same, but the records of the use of a model that was here already are written while
    /// the caller goes on.
    pub async fn ensure_ahead(
        &self,
        reference: &str,
    ) -> Result<(ModelMetadata, Recording), ModelError> {
        self.ensure_recording(reference, false).await
    }

    async fn ensure_recording(
        &self,
        reference: &str,
        recorded: bool,
    ) -> Result<(ModelMetadata, Recording), ModelError> {
        let wanted = Wanted::resolve(reference, &self.profiles, self.config.verify)?;
        let (downloads, locks) = (self.downloads.clone(), self.locks.clone());
        blocking(move || {
            clear_leftovers(&downloads, &locks);
            Ok(())
        })
        .await?;
        let description = format!("model {}", wanted.id);
        let mut step = Step::start(
            &self.reporter,
            StepKind::ModelFetch,
            description,
            Unit::Bytes,
            wanted.expected.size,
        );
        match self.provide(&wanted, &mut step).await {
            Ok((provided, mut recording)) => {
                if recorded {
                    let writing = std::mem::replace(&mut recording, Recording::done());
                    if let Some(trouble) = writing.trouble().await {
                        step.note(trouble);
                    }
                }
                step.finish();
                Ok((metadata(wanted.id, provided.record), recording))
            }
            Err(error) => {
                step.fail(one_line(&error));
                Err(error)
            }
        }
    }

    /// The models at hand, most recently used first.
    pub async fn list(&self) -> Result<Vec<ModelRecord>, ModelError> {
        let store = self.gate.store.clone();
        blocking(move || Ok(store.list()?)).await
    }

    /// What [`ModelProvisioner::evict`] would remove now.
    pub async fn plan_eviction(&self) -> Result<EvictionPlan, ModelError> {
        let (store, leases, limit) = (
            self.gate.store.clone(),
            Arc::clone(&self.leases),
            self.config.max_cache_bytes,
        );
        blocking(move || eviction::plan(&store, &leases, limit)).await
    }

    /// Removes the least recently used models beyond `max_cache_bytes`, never
    /// one that this or another process uses. Returns what went.
    pub async fn evict(&self) -> Result<EvictionPlan, ModelError> {
        let (store, leases, limit) = (
            self.gate.store.clone(),
            Arc::clone(&self.leases),
            self.config.max_cache_bytes,
        );
        blocking(move || eviction::evict(&store, &leases, limit)).await
    }

    async fn provide(
        &self,
        wanted: &Wanted,
        step: &mut Step,
    ) -> Result<(Provided, Recording), ModelError> {
        let (held, found) = match self.lock(wanted, step).await {
            Ok(held) => (Some(held), self.use_cached(wanted).await),
            // A cache that cannot be written to serves what it holds.
            Err(error) if error.cannot_be_made() => {
                tracing::debug!(error = %one_line(&error), "a model is looked for without a lock");
                let Some(found) = self.use_cached(wanted).await? else {
                    return Err(error.into());
                };
                (None, Ok(Some(found)))
            }
            Err(error) => return Err(error.into()),
        };
        let provided = match found {
            Ok(Some(provided)) => {
                let size = provided.record.stamp.size_bytes;
                step.set(size, Some(size));
                provided
            }
            Ok(None) => self.fetch_new(wanted, step).await?,
            Err(error) => self.mend(wanted, error, step).await?,
        };
        drop(held);
        if matches!(provided.how, How::Cached | How::InPlace) {
            let line = provenance_of(wanted, &provided);
            let (store, used) = (self.gate.store.clone(), provided.record.clone());
            let recording = Recording::begin(store, used, self.provenance.clone(), line);
            return Ok((provided, recording));
        }
        // The model is verified: a record that cannot be written does not change that.
        if let Err(error) = self.write_provenance(wanted, &provided).await {
            step.note(recording::unrecorded(&error));
        }
        self.enforce_limit(step).await;
        Ok((provided, Recording::done()))
    }

    /// The lock under which this model is provided.
    async fn lock(&self, wanted: &Wanted, step: &Step) -> Result<FileLock, LockError> {
        let lock = self.locks.join(format!("model-{}.lock", wanted.key));
        let timeout = Duration::from_secs(self.config.lock_timeout_seconds);
        FileLock::acquire(&lock, timeout, |holder| {
            let who = holder
                .pid
                .map(|pid| format!(" (pid {pid})"))
                .unwrap_or_default();
            step.note(format!(
                "somebody else{who} is providing this model; waiting"
            ));
        })
        .await
    }

    /// A model that is here already.
    async fn use_cached(&self, wanted: &Wanted) -> Result<Option<Provided>, ModelError> {
        let policy = self.config.verify;
        let digest = match wanted.expected.digest {
            Some(digest) if self.gate.store.path_of(digest).exists() => Some(digest),
            // Only `verify: off` takes other bytes for a pinned model.
            Some(_) if policy != VerifyPolicy::Off => None,
            _ => self.find(wanted).await?,
        };
        if let Some(digest) = digest {
            self.lease(digest, &wanted.id).await?;
            let claim = wanted.claim(&wanted.id);
            let gate = self.gate.clone();
            if let Some(record) = blocking(move || gate.admit_stored(&claim, digest)).await? {
                return Ok(Some(Provided {
                    record,
                    how: How::Cached,
                }));
            }
        }
        self.known_in_place(wanted).await
    }

    async fn find(&self, wanted: &Wanted) -> Result<Option<Digest>, ModelError> {
        let (store, id) = (self.gate.store.clone(), wanted.id.clone());
        let canonical = wanted
            .sources
            .first()
            .map(ToString::to_string)
            .unwrap_or_default();
        blocking(move || {
            let found = match store.find(&id)? {
                None => store.find(&canonical)?,
                found => found,
            };
            Ok(found.map(|record| record.digest))
        })
        .await
    }

    /// A source that is a file of this machine and was used before needs no
    /// network, wherever it stands in the list.
    async fn known_in_place(&self, wanted: &Wanted) -> Result<Option<Provided>, ModelError> {
        for source in &wanted.sources {
            let ModelRef::File { path } = source else {
                continue;
            };
            let (gate, claim, path) = (
                self.gate.clone(),
                wanted.claim(&source.to_string()),
                path.clone(),
            );
            let record = blocking(move || {
                let Ok(path) = crate::fetch::locate_file(&path) else {
                    return Ok(None);
                };
                if gate
                    .store
                    .record(crate::store::Place::Elsewhere(&path))
                    .is_none()
                {
                    return Ok(None);
                }
                gate.admit_in_place(&claim, &path).map(Some)
            })
            .await;
            match record {
                Ok(Some(record)) => {
                    return Ok(Some(Provided {
                        record,
                        how: How::InPlace,
                    }));
                }
                Ok(None) => {}
                // Another source may still serve; the same error comes up again if none does.
                Err(error) => {
                    tracing::warn!(%source, error = %one_line(&error), "a model file is passed over");
                }
            }
        }
        Ok(None)
    }

    async fn fetch_new(&self, wanted: &Wanted, step: &mut Step) -> Result<Provided, ModelError> {
        let expected = match self.config.verify {
            VerifyPolicy::Off => Expected::default(),
            _ => wanted.expected,
        };
        self.fetch_from_sources(wanted, expected, step).await
    }

    /// Where the model's bytes gather.
    fn part(&self, wanted: &Wanted) -> PathBuf {
        self.downloads.join(format!("model-{}.part", wanted.key))
    }

    /// Tries the sources in order.
    async fn fetch_from_sources(
        &self,
        wanted: &Wanted,
        mut expected: Expected,
        step: &mut Step,
    ) -> Result<Provided, ModelError> {
        let mut attempts = Vec::new();
        let part = self.part(wanted);
        for (index, source) in wanted.sources.iter().enumerate() {
            expected.has_alternative = index + 1 < wanted.sources.len();
            match self.fetcher.fetch(source, expected, &part, step).await {
                Ok(obtained) => match self.admit(wanted, source, obtained).await {
                    // A file of ours that is not what the profile says: the next source may be right.
                    Err(error @ ModelError::WrongDigest { .. }) if wanted.sources.len() > 1 => {
                        step.note(format!("{source} was passed over: {}", one_line(&error)));
                        attempts.push((source.to_string(), wrong_digest(error, source)));
                    }
                    other => return other,
                },
                Err(error) => {
                    if wanted.sources.len() > 1 {
                        step.note(format!("{source} was passed over: {}", one_line(&error)));
                    }
                    attempts.push((source.to_string(), error));
                }
            }
        }
        Err(all_failed(wanted, attempts))
    }

    async fn admit(
        &self,
        wanted: &Wanted,
        source: &ModelRef,
        obtained: Obtained,
    ) -> Result<Provided, ModelError> {
        let (gate, claim) = (self.gate.clone(), wanted.claim(&source.to_string()));
        match obtained {
            Obtained::Staged(fetched) => {
                self.lease(fetched.digest, &wanted.id).await?;
                let record = blocking(move || gate.admit_staged(&claim, &fetched)).await?;
                Ok(Provided {
                    record,
                    how: How::Fetched,
                })
            }
            Obtained::InPlace(path) => {
                let record = blocking(move || gate.admit_in_place(&claim, &path)).await?;
                Ok(Provided {
                    record,
                    how: How::InPlace,
                })
            }
        }
    }

    /// Says that the model is in use, before anybody looks at its file.
    async fn lease(&self, digest: Digest, id: &str) -> Result<(), ModelError> {
        let start = Instant::now();
        while !self.leases.take(digest)? {
            if start.elapsed() > REMOVAL_WAIT {
                return Err(ModelError::BeingRemoved { id: id.to_owned() });
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    async fn write_provenance(
        &self,
        wanted: &Wanted,
        provided: &Provided,
    ) -> Result<(), ModelError> {
        let line = provenance_of(wanted, provided);
        let directory = self.provenance.clone();
        blocking(move || Ok(provenance::append(&directory, &line)?)).await
    }

    /// A store that is too full is no reason to refuse the model at hand.
    async fn enforce_limit(&self, step: &Step) {
        if self.config.max_cache_bytes.is_none() {
            return;
        }
        match self.evict().await {
            Ok(plan) => {
                for model in &plan.remove {
                    step.note(format!(
                        "removed {} to stay under the cache's limit",
                        model.names.join(", ")
                    ));
                }
                if plan.bytes_over_limit > 0 {
                    step.note(format!(
                        "the models in use are {} bytes over `max_cache_bytes`",
                        plan.bytes_over_limit
                    ));
                }
            }
            Err(error) => step.note(format!("old models were not removed: {}", one_line(&error))),
        }
    }
}

/// Removes downloads that nobody went on with for two weeks, and what pip was
/// at work on when its process was killed, which nobody goes on with.
fn clear_leftovers(downloads: &Path, locks: &Path) {
    let now = SystemTime::now();
    leftovers::clear_downloads(downloads, now, |stem| {
        stem.starts_with("model-")
            .then(|| locks.join(format!("{stem}.lock")))
    });
    for (name, path) in leftovers::entries(downloads) {
        if let Some(stem) = name.strip_suffix(".pip")
            && stem.starts_with("model-")
        {
            leftovers::remove_unlocked(&path, &locks.join(format!("{stem}.lock")));
        }
    }
    leftovers::clear_staged(downloads, now);
}

/// A file in place that is the wrong one, as one source among several.
fn wrong_digest(error: ModelError, source: &ModelRef) -> FetchError {
    match error {
        ModelError::WrongDigest {
            expected,
            actual,
            path,
            ..
        } => FetchError::WrongDigest {
            file: path.display().to_string(),
            expected,
            actual,
            size: std::fs::metadata(&path).map_or(0, |metadata| metadata.len()),
        },
        _ => FetchError::NoSource {
            name: source.to_string(),
        },
    }
}

fn all_failed(wanted: &Wanted, mut attempts: Vec<(String, FetchError)>) -> ModelError {
    let id = wanted.id.clone();
    match attempts.pop() {
        Some((from, source)) if attempts.is_empty() => ModelError::Fetch { id, from, source },
        Some(last) => {
            attempts.push(last);
            ModelError::AllSources { id, attempts }
        }
        None => ModelError::AllSources { id, attempts },
    }
}

fn provenance_of(wanted: &Wanted, provided: &Provided) -> ModelProvenance {
    ModelProvenance {
        at: Timestamp::now(),
        reference: wanted.id.clone(),
        source: provided.record.source.clone(),
        digest: provided.record.digest,
        size_bytes: provided.record.stamp.size_bytes,
        how: provided.how,
        path: provided.record.path.clone(),
    }
}

fn metadata(id: String, record: ModelRecord) -> ModelMetadata {
    ModelMetadata {
        id,
        path: record.path,
        digest: record.digest,
        size_bytes: record.stamp.size_bytes,
        architecture: record.facts.architecture,
        quantization: record.facts.quantization,
        parameter_count: record.facts.parameter_count,
        ctx_max: record.facts.ctx_max,
        chat_template: record.facts.chat_template,
        shape: record.facts.shape,
    }
}

/// Does work on the disk away from the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ModelError> + Send + 'static,
) -> Result<T, ModelError> {
    provision_kit::blocking::blocking(work).await
}
