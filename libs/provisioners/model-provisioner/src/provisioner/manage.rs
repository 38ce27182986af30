//! Looks after the models at hand: which there are, whether they are sound,
//! and how they go again.

use std::fs::File;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use llama_orch_types::Digest;
use provision_kit::chain::one_line;
use provision_kit::fs::remove_file_if_there;
use provision_kit::lock::FileLock;
use provision_kit::part::remove_sidecars;
use provision_kit::progress::{Reporter, Step, StepKind, Unit};
use serde::Serialize;

use super::{ModelProvisioner, blocking};
use crate::error::ModelError;
use crate::fetch::Expected;
use crate::lookup;
use crate::reference::ModelRef;
use crate::store::ModelRecord;
use crate::wanted::Wanted;

/// What a reference stands for, before anything is fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The reference without what may be secret in it.
    pub id: String,
    /// The same for all references that are known to want the same bytes.
    pub key: String,
    /// Whether the reference holds what `id` leaves out.
    pub has_secret: bool,
}

/// A model at hand, and how it stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelEntry {
    #[serde(flatten)]
    pub record: ModelRecord,
    /// Whether its file belongs to the store; else it is somebody's own file.
    pub stored: bool,
    /// Whether any program of this machine uses it now. Always false of files
    /// that lie elsewhere: they are never removed.
    pub in_use: bool,
    /// The profiles that pin these bytes.
    pub profiles: Vec<String>,
}

/// What went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    pub digest: Digest,
    /// What it was called.
    pub names: Vec<String>,
    /// The model, its record, and what was kept to mend it with.
    pub bytes_freed: u64,
    /// A file outside the store, which stays: it is only forgotten.
    pub kept_file: Option<std::path::PathBuf>,
}

/// What was seen of a model's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "condition")]
pub enum Condition {
    /// It is what it was when it came.
    Sound,
    /// It is not.
    Spoilt { actual: Digest },
    /// It was not, and was fetched again, in part or whole.
    Mended { actual: Digest },
}

/// A model whose whole file was read again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verified {
    /// As it is recorded now.
    #[serde(flatten)]
    pub record: ModelRecord,
    /// How many bytes were read.
    pub bytes: u64,
    #[serde(flatten)]
    pub condition: Condition,
}

/// Ends work on another thread when its future is dropped.
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl ModelProvisioner {
    /// Another one of the same models that tells its progress to `reporter`.
    /// What it provides is in use until it is dropped itself.
    #[must_use]
    pub fn beside(&self, reporter: Arc<dyn Reporter>) -> Self {
        Self {
            config: self.config.clone(),
            profiles: self.profiles.clone(),
            gate: self.gate.clone(),
            leases: Arc::new(crate::lease::Leases::new(self.locks.clone())),
            mended: super::Mended::default(),
            fetcher: self.fetcher.clone(),
            locks: self.locks.clone(),
            downloads: self.downloads.clone(),
            provenance: self.provenance.clone(),
            reporter,
        }
    }

    /// What a reference stands for. Touches neither disk nor network; fails as
    /// [`ModelProvisioner::ensure`] would before it did.
    pub fn identify(&self, reference: &str) -> Result<Identity, ModelError> {
        let wanted = Wanted::resolve(reference, &self.profiles, self.config.verify)?;
        Ok(Identity {
            has_secret: reference.parse::<ModelRef>()?.has_secret(),
            id: wanted.id,
            key: wanted.key,
        })
    }

    /// The models at hand and how they stand, most recently used first.
    pub async fn entries(&self) -> Result<Vec<ModelEntry>, ModelError> {
        let (gate, leases) = (self.gate.clone(), Arc::clone(&self.leases));
        let profiles = self.profiles.clone();
        blocking(move || {
            let entry = |record: ModelRecord| {
                let stored = gate.store.is_stored(&record);
                // Where no lock can be made nobody can remove a model either.
                let in_use = stored && leases.is_in_use(record.digest).unwrap_or(false);
                let profiles = lookup::profiles_of(record.digest, &profiles);
                ModelEntry {
                    record,
                    stored,
                    in_use,
                    profiles,
                }
            };
            Ok(gate.store.list()?.into_iter().map(entry).collect())
        })
        .await
    }

    /// The model at hand that is called so; [`lookup`] says by what.
    pub async fn entry(&self, name: &str) -> Result<ModelEntry, ModelError> {
        let mut entries = self.entries().await?;
        // Of the same bytes in two places, those that are ours.
        entries.sort_by_key(|entry| !entry.stored);
        let records: Vec<ModelRecord> = entries.iter().map(|it| it.record.clone()).collect();
        let path = &lookup::select(&records, &self.profiles, name)?.path;
        let found = entries.into_iter().find(|it| it.record.path == *path);
        found.ok_or(ModelError::GivenUp)
    }

    /// Whether this reference, as a configuration names it, means the model.
    pub fn is_called(&self, record: &ModelRecord, reference: &str) -> bool {
        lookup::is_called(record, &self.profiles, reference.trim())
    }

    /// Removes a model of the store with all that is known about it, unless
    /// anybody uses it. A file that lies elsewhere is forgotten and stays.
    pub async fn remove(&self, name: &str) -> Result<Removed, ModelError> {
        let entry = self.entry(name).await?;
        let record = entry.record;
        let names = lookup::names(&record, &self.profiles);
        let keys = self.keys(&record);
        let (store, leases) = (self.gate.store.clone(), Arc::clone(&self.leases));
        let (downloads, locks) = (self.downloads.clone(), self.locks.clone());
        blocking(move || {
            let digest = record.digest;
            if !entry.stored {
                store.forget(&record.path)?;
                return Ok(Removed {
                    digest,
                    names,
                    bytes_freed: 0,
                    kept_file: Some(record.path),
                });
            }
            let Some(_right) = leases.take_for_removal(digest)? else {
                let id = names.into_iter().next().unwrap_or(digest.to_string());
                return Err(ModelError::InUse { id });
            };
            let mut bytes_freed = store.remove(digest)?;
            for key in keys {
                let part = downloads.join(format!("model-{key}.part"));
                // What somebody is at work on is theirs.
                if part.exists()
                    && let Ok(Some(_held)) =
                        FileLock::try_acquire(&locks.join(format!("model-{key}.lock")))
                {
                    bytes_freed += std::fs::metadata(&part).map_or(0, |facts| facts.len());
                    remove_file_if_there(&part)?;
                    remove_sidecars(&part)?;
                }
            }
            tracing::info!(%digest, bytes = bytes_freed, "removed a model");
            Ok(Removed {
                digest,
                names,
                bytes_freed,
                kept_file: None,
            })
        })
        .await
    }

    /// What locks and part files of this model may be called.
    fn keys(&self, record: &ModelRecord) -> Vec<String> {
        let known = record.references.iter();
        let known = known.filter_map(|it| Some(self.identify(it).ok()?.key));
        std::iter::once(record.digest.hex()).chain(known).collect()
    }

    /// Reads all of a model's file again and compares. What is seen is marked:
    /// a spoilt model is not used again before it was looked at. With `repair`
    /// a spoilt one is mended from where it came, if it is the store's.
    pub async fn verify(&self, name: &str, repair: bool) -> Result<Verified, ModelError> {
        let entry = self.entry(name).await?;
        let _held = self.held(&entry).await?;
        let step = Step::start(
            &self.reporter,
            StepKind::ModelFetch,
            format!("verifying the model {}", lookup::shortened(name)),
            Unit::Bytes,
            Some(entry.record.stamp.size_bytes),
        );
        let (mut step, record, actual, bytes) = self.hash(entry.record, step).await?;
        if actual == record.digest {
            step.finish();
            let condition = Condition::Sound;
            return Ok(Verified {
                record,
                bytes,
                condition,
            });
        }
        if !repair || !entry.stored {
            step.fail("the file is not any more what it was");
            let condition = Condition::Spoilt { actual };
            return Ok(Verified {
                record,
                bytes,
                condition,
            });
        }
        match self.repair(&record, actual, &mut step).await {
            Ok(record) => {
                step.finish();
                Ok(Verified {
                    record,
                    bytes,
                    condition: Condition::Mended { actual },
                })
            }
            Err(error) => {
                step.fail(one_line(&error));
                Err(error)
            }
        }
    }

    /// Keeps the model from being removed.
    async fn held(&self, entry: &ModelEntry) -> Result<Option<File>, ModelError> {
        if !entry.stored {
            return Ok(None);
        }
        let (leases, digest) = (Arc::clone(&self.leases), entry.record.digest);
        let held = blocking(move || Ok(leases.hold(digest)?)).await;
        match held {
            Ok(Some(held)) => Ok(Some(held)),
            Ok(None) => Err(ModelError::BeingRemoved {
                id: digest.to_string(),
            }),
            // Where no lock can be made nobody can remove a model either.
            Err(ModelError::File(error)) if !error.retriable() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn hash(
        &self,
        record: ModelRecord,
        mut step: Step,
    ) -> Result<(Step, ModelRecord, Digest, u64), ModelError> {
        let gate = self.gate.clone();
        let stop = Arc::new(AtomicBool::new(false));
        let _stopped = StopOnDrop(Arc::clone(&stop));
        let total = Some(record.stamp.size_bytes);
        blocking(move || {
            let seen = gate.look_again(&record, |done| {
                step.set(done, total);
                if stop.load(Ordering::Relaxed) {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            match seen {
                Ok(Some((record, actual, bytes))) => Ok((step, record, actual, bytes)),
                Ok(None) => Err(ModelError::GivenUp),
                Err(error) => {
                    step.fail(one_line(&error));
                    Err(error)
                }
            }
        })
        .await
    }

    /// Mends a spoilt model from any source that is known of it.
    async fn repair(
        &self,
        record: &ModelRecord,
        actual: Digest,
        step: &mut Step,
    ) -> Result<ModelRecord, ModelError> {
        let changed = || ModelError::Changed {
            path: record.path.clone(),
            expected: record.digest,
            actual,
            repair: None,
        };
        let Some(wanted) = self.known_sources(record) else {
            return Err(changed());
        };
        let _lock = self.lock(&wanted, step).await?;
        let provided = self.mend(&wanted, changed(), step).await?;
        if provided.record.digest != record.digest {
            return Err(changed());
        }
        if let Err(error) = self.write_provenance(&wanted, &provided).await {
            step.note(super::recording::unrecorded(&error));
        }
        Ok(provided.record)
    }

    /// Everywhere these bytes are known to have been, best first.
    fn known_sources(&self, record: &ModelRecord) -> Option<Wanted> {
        let mut sources: Vec<ModelRef> = Vec::new();
        let pinned: Vec<_> = self.profiles.iter().collect();
        let pinned = pinned
            .into_iter()
            .filter(|profile| profile.digest == record.digest);
        let name = pinned.clone().next().map(|profile| &profile.name);
        let id = name.unwrap_or(&record.source).clone();
        let written = std::iter::once(&record.source).chain(&record.references);
        let written = written.filter_map(|it| it.parse::<ModelRef>().ok());
        let pinned = pinned.flat_map(|profile| profile.sources.clone());
        for source in pinned.chain(written) {
            let is_profile = matches!(source, ModelRef::Profile { .. });
            if !is_profile && !sources.contains(&source) {
                sources.push(source);
            }
        }
        (!sources.is_empty()).then(|| Wanted {
            id,
            expected: Expected {
                digest: Some(record.digest),
                size: Some(record.stamp.size_bytes),
                has_alternative: false,
            },
            sources,
            key: record.digest.hex(),
        })
    }
}
