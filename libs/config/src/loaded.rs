//! A configuration with the text it came from: what only shows when settings
//! are seen together, and where in the file they stand.

use std::fmt;
use std::path::{Path, PathBuf};

#[cfg(feature = "provisioning")]
use llama_orch_types::Hinted;
use llama_orch_types::{EngineKind, PoolId};
#[cfg(feature = "provisioning")]
use provision_kit::chain::one_line;
use provision_kit::config::{ConfigError, parse_strict};
#[cfg(feature = "provisioning")]
use provisioners_engine_provisioner::Profile;
#[cfg(feature = "provisioning")]
use provisioners_model_provisioner::{ModelError, ModelProvisionerConfig, ModelRef, Profiles};

use super::{Config, PoolConfig};

/// The file that is read when it is there and none is named.
pub const DEFAULT_FILE: &str = "orchestratord.yaml";

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    #[error("could not read the configuration")]
    Read(#[source] ConfigError),
    #[error("could not read the configuration file {}", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{place}: {problem}")]
    Rule {
        place: Place,
        problem: String,
        hint: String,
    },
    #[error("{}", match .named { Some(name) => format!("there is no pool `{name}`"), None => "there are several pools and none is named".to_owned() })]
    NoPool {
        named: Option<String>,
        known: String,
    },
    #[error("could not read the token file {}", .path.display())]
    TokenFile {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} holds no usable token: {problem}", .origin)]
    Token {
        origin: String,
        problem: &'static str,
    },
}

impl llama_orch_types::Hinted for SetupError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Read(error) => error.hint(),
            Self::File { .. } => {
                Some("name an existing file with --config, or leave the option out".to_owned())
            }
            Self::Rule { hint, .. } => Some(hint.clone()),
            Self::NoPool { known, .. } => {
                Some(format!("name one with --pool; the pools are: {known}"))
            }
            Self::TokenFile { .. } | Self::Token { .. } => Some(
                "put one random word into the file, for example from `openssl rand -hex 32`"
                    .to_owned(),
            ),
        }
    }
}

impl SetupError {
    /// Where in the configuration the mistake is, as far as it is known.
    pub fn place(&self) -> Option<Place> {
        let in_file = |file: &Path| Place {
            file: Some(file.to_owned()),
            line: None,
            key: String::new(),
        };
        match self {
            Self::Read(ConfigError::Read { path, .. }) | Self::File { path, .. } => {
                Some(in_file(path))
            }
            Self::Read(ConfigError::UnknownKey { place, key, .. }) => Some(Place::read(place, key)),
            Self::Read(ConfigError::UnknownValue { place, .. }) => Some(Place::read(place, "")),
            Self::Read(ConfigError::Invalid { place, message }) => {
                Some(Place::read(place, key_in(message).unwrap_or_default()))
            }
            Self::Rule { place, .. } => Some(place.clone()),
            Self::NoPool { .. } | Self::TokenFile { .. } | Self::Token { .. } => None,
        }
    }
}

/// The key that a message about one begins with.
fn key_in(message: &str) -> Option<&str> {
    let named = message.strip_prefix("the key ").unwrap_or(message);
    let (key, _) = named.strip_prefix('`')?.split_once('`')?;
    Some(key)
}

/// Where a setting stands: file, line where it is known, and key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub file: Option<PathBuf>,
    /// Counts from 1.
    pub line: Option<usize>,
    /// Empty if it is not known.
    pub key: String,
}

impl Place {
    /// From `file:line:column`, or a file alone.
    fn read(place: &str, key: &str) -> Self {
        let mut parts = place.rsplitn(3, ':');
        let column = parts.next().and_then(|column| column.parse::<usize>().ok());
        let line = parts.next().and_then(|line| line.parse().ok());
        let (file, line) = match (parts.next(), line, column) {
            (Some(file), Some(line), Some(_)) => (file, Some(line)),
            _ => (place, None),
        };
        Self {
            file: Some(file.into()),
            line,
            key: key.to_owned(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}:", file.display())?;
            if let Some(line) = self.line {
                write!(f, "{line}:")?;
            }
            f.write_str(" ")?;
        }
        write!(f, "`{}`", self.key)
    }
}

/// A configuration and the text it was read from.
#[derive(Debug, Clone, Default)]
pub struct Loaded {
    pub config: Config,
    /// The file and its text; none if everything is at its default.
    pub origin: Option<(PathBuf, String)>,
}

impl Loaded {
    /// Reads the named file, or `orchestratord.yaml` if it is there.
    pub fn read(named: Option<&Path>) -> Result<Self, SetupError> {
        let path = match named {
            Some(path) => path.to_owned(),
            None if Path::new(DEFAULT_FILE).exists() => PathBuf::from(DEFAULT_FILE),
            None => return Ok(Self::default()),
        };
        let text = std::fs::read_to_string(&path).map_err(|source| SetupError::File {
            path: path.clone(),
            source,
        })?;
        let config = parse_strict::<Config>(&text, &path).map_err(SetupError::Read)?;
        Ok(Self {
            config,
            origin: Some((path, text)),
        })
    }

    /// Names a setting, with its line if the file holds it.
    pub fn place(&self, keys: &[&str]) -> Place {
        let origin = self.origin.as_ref();
        let line = origin.and_then(|(_, text)| line_of(text, keys));
        Place {
            // A setting that the file does not hold came from elsewhere.
            file: origin
                .filter(|_| line.is_some())
                .map(|(path, _)| path.clone()),
            line,
            key: keys.join("."),
        }
    }

    pub(super) fn rule(
        &self,
        keys: &[&str],
        problem: impl Into<String>,
        hint: impl Into<String>,
    ) -> SetupError {
        SetupError::Rule {
            place: self.place(keys),
            problem: problem.into(),
            hint: hint.into(),
        }
    }

    /// Checks what only shows when settings are seen together.
    pub fn check(&self, has_token: bool, real_only: bool) -> Result<(), SetupError> {
        let config = &self.config;
        if !config.listen.ip().is_loopback() && !has_token {
            return Err(self.rule(
                &["listen"],
                format!(
                    "{} can be reached from other machines, and no token is set",
                    config.listen
                ),
                "set `auth.token_file` (or ORCHD_TOKEN), or listen on 127.0.0.1",
            ));
        }
        if config.pools.is_empty() {
            return Err(self.rule(
                &["pools"],
                "there must be at least one pool",
                "leave `pools` out for the default",
            ));
        }
        for (id, pool) in &config.pools {
            self.check_pool(id, pool, real_only)?;
        }
        self.check_aliases()?;
        config.memory.check(&config.pools).map_err(|misfit| {
            let keys: Vec<&str> = std::iter::once("memory")
                .chain(misfit.keys.iter().map(String::as_str))
                .collect();
            self.rule(&keys, misfit.problem, misfit.hint)
        })
    }

    fn check_pool(
        &self,
        id: &PoolId,
        pool: &PoolConfig,
        real_only: bool,
    ) -> Result<(), SetupError> {
        let at = |key| ["pools", id.as_str(), key];
        if pool.engine == EngineKind::Mock && real_only {
            return Err(self.rule(
                &at("engine"),
                "a scripted engine is refused while REQUIRE_REAL_LLAMA is set",
                "use `engine: llamacpp`, or unset REQUIRE_REAL_LLAMA",
            ));
        }
        if pool.engine == EngineKind::Mock && !cfg!(feature = "mock-adapter") {
            return Err(self.rule(
                &at("engine"),
                "this build has no scripted engine",
                "use `engine: llamacpp`; the scripted one exists only in builds with the feature mock-adapter",
            ));
        }
        if pool.engine == EngineKind::Openai && real_only {
            return Err(self.rule(
                &at("engine"),
                "an engine elsewhere is refused while REQUIRE_REAL_LLAMA is set: nobody here knows what answers there",
                "use `engine: llamacpp`, or unset REQUIRE_REAL_LLAMA",
            ));
        }
        let fits = pool.check_endpoints();
        #[cfg(feature = "provisioning")]
        let fits = fits.and_then(|()| pool.check_launch(id, &self.config.models));
        fits.map_err(|unfit| self.rule(&at(unfit.key), unfit.problem, unfit.hint))
    }
}

/// A setting that no engine can be started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    pub key: &'static str,
    pub problem: String,
    pub hint: String,
}

#[cfg(feature = "provisioning")]
impl PoolConfig {
    /// Finds what would only fail when the engine and the model have been
    /// provided.
    pub fn check_launch(&self, id: &PoolId, models: &ModelProvisionerConfig) -> Result<(), Unfit> {
        let unfit = |key, problem, hint: Option<String>| Unfit {
            key,
            problem,
            hint: hint.unwrap_or_default(),
        };
        if self.profile == Some(Profile::Deterministic) && self.slots > 1 {
            return Err(unfit(
                "slots",
                format!(
                    "the profile `deterministic` has one slot, not {}",
                    self.slots
                ),
                Some("set `slots: 1`, or `profile: throughput`".to_owned()),
            ));
        }
        self.check_endpoints()?;
        if self.engine != EngineKind::Llamacpp {
            return Ok(());
        }
        if let Err(error) = check_model(models, &self.model) {
            return Err(unfit("model", one_line(&error), error.hint()));
        }
        match provisioners_engine_provisioner::render_argv(&self.trial_launch(id), 1) {
            Ok(_) => Ok(()),
            Err(error) => Err(unfit("flags", one_line(&error), error.hint())),
        }
    }
}

/// Whether a model can be meant by this: a reference, or a profile that exists.
#[cfg(feature = "provisioning")]
fn check_model(config: &ModelProvisionerConfig, reference: &str) -> Result<(), ModelError> {
    let parsed: ModelRef = reference.parse()?;
    let profiles = Profiles::new(&config.profiles)?;
    match parsed {
        ModelRef::Profile { name } if profiles.get(&name).is_none() => {
            Err(ModelError::UnknownProfile {
                name,
                known: profiles.names().map(str::to_owned).collect(),
            })
        }
        _ => Ok(()),
    }
}
/// The line (from 1) of a key in block-style YAML, by indentation; `None`
/// where the text is written otherwise.
pub(super) fn line_of(text: &str, keys: &[&str]) -> Option<usize> {
    // The keys found so far, by their indentation: one is left when a line
    // stands no deeper.
    let mut found: Vec<usize> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let content = line.trim_start();
        if content.is_empty() || content.starts_with('#') {
            continue;
        }
        let indent = line.len() - content.len();
        while found.last().is_some_and(|parent| indent <= *parent) {
            found.pop();
        }
        let name = content
            .split(':')
            .next()
            .unwrap_or_default()
            .trim_matches(['"', '\'']);
        if keys.get(found.len()).is_some_and(|key| name == *key) {
            if found.len() + 1 == keys.len() {
                return Some(index + 1);
            }
            found.push(indent);
        }
    }
    None
}
