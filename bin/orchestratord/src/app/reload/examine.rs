//! A configuration is read again, and what it would change is found out. None
//! of it has an effect.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use llama_orch_types::ErrorCode;

use super::report::{ReloadReport, ReloadStage};
use super::{Reloader, failure_of};
use crate::app::bootstrap::{Plan, StartError};
use crate::app::config::difference::Difference;
use crate::app::config::{Config, Loaded, Place, Token};
use crate::services::event_log::Failure;

/// How long the configuration and the token may take to be read.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// A new configuration that can be used.
pub(super) struct Examined {
    /// What is in force afterwards.
    pub(super) config: Config,
    pub(super) file: Option<PathBuf>,
    pub(super) token: Option<Token>,
    pub(super) difference: Difference,
    pub(super) report: ReloadReport,
}

/// Why a configuration is not taken over, and where in it the mistake is.
pub(super) struct Refused {
    pub(super) failure: Failure,
    pub(super) place: Option<Place>,
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self {
            failure,
            place: None,
        }
    }
}

impl Reloader {
    /// Reads and checks; changes no pool.
    pub(super) async fn examine(&mut self) -> Result<Examined, Refused> {
        let (source, reporter) = (self.source.clone(), Arc::clone(&self.reporter));
        // On a thread that may wait: the file may lie anywhere.
        let read = tokio::task::spawn_blocking(move || Plan::read(source, reporter));
        let plan = match tokio::time::timeout(READ_LIMIT, read).await {
            Ok(Ok(plan)) => plan.map_err(|error| unusable(&error))?,
            Ok(Err(_)) => {
                return Err(Failure::internal("reading the configuration broke off").into());
            }
            Err(_) => {
                let limit = READ_LIMIT.as_secs();
                let message = format!("the configuration could not be read within {limit} s");
                return Err(Failure::new(ErrorCode::InvalidParams, message).into());
            }
        };
        let Loaded { config, origin } = plan.loaded;
        if let (Some(file), None) = (&self.file, &origin) {
            let message = format!("the configuration file {} is gone", file.display());
            let failure = Failure::new(ErrorCode::InvalidParams, message)
                .with_hint("an empty file stands for the defaults");
            let place = Some(Place {
                file: Some(file.clone()),
                line: None,
                key: String::new(),
            });
            return Err(Refused { failure, place });
        }
        self.learn_settings();
        let difference = Difference::between(&self.config, &config);
        let in_force = Loaded {
            config: difference.apply_to(&self.config, &config),
            origin,
        };
        // What needs a restart stays as it is, and the rest must fit to that.
        in_force
            .check(plan.token.is_some(), plan.real_only)
            .map_err(|error| unusable(&StartError::Setup(error)))?;
        let mut report = ReloadReport::of(&difference, &self.config, &config);
        report.state = ReloadStage::Planned;
        report.token_changed = plan.token != *self.state.token.get();
        let file = in_force.origin.map(|(path, _)| path);
        report.config = file.as_ref().map(|path| path.display().to_string());
        Ok(Examined {
            config: in_force.config,
            file,
            token: plan.token,
            difference,
            report,
        })
    }

    /// A pool's own reload may have given it other settings than the file said.
    /// Those are what a new file is compared with.
    fn learn_settings(&mut self) {
        // What a pool that is on its way will have is known here alone.
        let settled = self
            .pools
            .iter()
            .filter(|(id, _)| !self.aims.contains_key(*id));
        for (id, live) in settled {
            if let Some(known) = self.config.pools.get_mut(id) {
                known.clone_from(&live.handle.settings().config);
            }
        }
    }
}

fn unusable(error: &StartError) -> Refused {
    let failure = Failure {
        code: ErrorCode::InvalidParams,
        ..failure_of(error)
    };
    let place = match error {
        StartError::Setup(error) => error.place(),
        _ => None,
    };
    Refused { failure, place }
}
