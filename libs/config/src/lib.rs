//! What can be configured, and what each setting must satisfy.
//!
//! Everything has a default: with no file at all the daemon serves the model
//! `haiku` on the loopback interface. Keys are strict; ranges are checked
//! while reading ([`read`]), so that an error names file, line and key. What
//! only shows when settings are seen together is checked by [`Loaded::check`].

pub mod difference;
mod limits;
mod loaded;
mod memory;
mod names;
mod read;
mod remote;
mod source;
mod supervision;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

#[cfg(feature = "provisioning")]
use llama_orch_types::{Digest, ModelMetadata};
use llama_orch_types::{EngineKind, PoolId};
#[cfg(feature = "provisioning")]
use provisioners_engine_provisioner::{EngineConfig, LaunchSpec, Profile, Purpose};
#[cfg(feature = "provisioning")]
use provisioners_model_provisioner::{ModelProvisionerConfig, ModelRef};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::limits::Limits;
pub use self::loaded::{DEFAULT_FILE, Loaded, Place, SetupError, Unfit};
pub use self::memory::{GroupConfig, LoadPolicy, MemoryConfig, Serves};
use self::read::{address, engine_kind, ranged, ranged_option};
pub use self::remote::EndpointConfig;
pub use self::source::Source;
pub use self::supervision::{LivenessConfig, RestartConfig};

/// The environment variable with the bearer token that clients must send.
pub const TOKEN_VARIABLE: &str = "ORCHD_TOKEN";

/// The whole configuration. It is also written, as JSON, to see what differs
/// between two ([`difference`]); what is secret is left out there.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port to listen on. An address that other machines can
    /// reach needs a token.
    #[serde(deserialize_with = "address")]
    #[schemars(with = "String")]
    pub listen: SocketAddr,
    #[serde(skip_serializing)]
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
    /// How much memory their engines may take together.
    pub memory: MemoryConfig,
    pub tasks: TasksConfig,
    /// What clients may make the daemon hold, and for how long.
    pub limits: Limits,
    /// How long running tasks may go on after a stop signal, or on an engine that
    /// is replaced, in seconds (0 to 3600).
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
            memory: MemoryConfig::default(),
            tasks: TasksConfig::default(),
            limits: Limits::default(),
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

    /// The text itself, to be sent.
    pub fn reveal(&self) -> &str {
        &self.0
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
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
    /// How many bytes of finished tasks are kept at the most, about (0 to 1 TiB);
    /// the oldest are forgotten first.
    #[serde(deserialize_with = "ranged::<_, u64, 0, 1_099_511_627_776>")]
    #[schemars(range(min = 0, max = 1_099_511_627_776_u64))]
    pub keep_bytes: u64,
    /// How long the engine may take for a short prompt before the first token, in
    /// seconds (1 to 86400); a long prompt is given more by its length, at the
    /// speed measured on this engine. One that takes longer, or that tells of no
    /// progress in the prompt for so long, counts as hung.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub first_token_seconds: u64,
    /// How long the engine may take between two tokens, in seconds (1 to 86400);
    /// more in a context of more than 4096 tokens.
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
            keep_bytes: 256 * 1024 * 1024,
            first_token_seconds: 300,
            next_token_seconds: 60,
            max_body_bytes: 4 * 1024 * 1024,
        }
    }
}

/// One model served by one engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PoolConfig {
    /// Which family of engine: `llamacpp`, which is provided and started here, or
    /// `openai`, which runs elsewhere (`endpoints`).
    #[serde(deserialize_with = "engine_kind")]
    #[schemars(with = "String")]
    pub engine: EngineKind,
    /// A profile's name (`haiku`) or a model reference: `hf:owner/repo/file.gguf`,
    /// `https://…`, a path, or `pip:package==version/path/inside.gguf`.
    pub model: String,
    /// Further names by which clients may ask for this pool's model.
    pub aliases: Vec<String>,
    /// When the engine is loaded: `eager` or `on_demand`.
    pub load: LoadPolicy,
    /// After so many seconds without a task (1 to 31536000) the engine is unloaded,
    /// until the next one comes. Default: never.
    #[serde(deserialize_with = "ranged_option::<_, u64, 1, 31_536_000>")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub idle_ttl_seconds: Option<u64>,
    /// Once loaded it is never unloaded for want of memory or of tasks.
    pub pin: bool,
    /// What the engine is started for: `text`, `embeddings` or `rerank`.
    pub serves: Serves,
    /// Where the engine runs, for `engine: openai`: one or several replicas.
    pub endpoints: Vec<EndpointConfig>,
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
    /// How long the engine may go without progress while it loads the model, in
    /// seconds (1 to 86400): no line in its log, nothing read, no memory filled.
    /// A load that gets on may take as long as it takes.
    #[serde(deserialize_with = "ranged::<_, u64, 1, 86_400>")]
    #[schemars(range(min = 1, max = 86_400))]
    pub load_timeout_seconds: u64,
    pub restart: RestartConfig,
    pub liveness: LivenessConfig,
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
            aliases: Vec::new(),
            load: LoadPolicy::default(),
            idle_ttl_seconds: None,
            pin: false,
            serves: Serves::default(),
            endpoints: Vec::new(),
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
            load_timeout_seconds: 120,
            restart: RestartConfig::default(),
            liveness: LivenessConfig::default(),
            #[cfg(feature = "provisioning")]
            provision: EngineConfig::default(),
        }
    }
}

/// A model as it is shown, which is as it is configured, but for the query of
/// an address: that may be a signature, and is replaced by a part of its digest.
pub fn shown_model(reference: &str) -> String {
    match reference.split_once('?') {
        Some((address, _)) if address.contains("://") => without_query(reference, address),
        _ => reference.to_owned(),
    }
}

#[cfg(feature = "provisioning")]
fn without_query(reference: &str, address: &str) -> String {
    let parsed = reference.parse::<ModelRef>();
    parsed.map_or_else(|_| format!("{address}?…"), |parsed| parsed.to_string())
}

#[cfg(not(feature = "provisioning"))]
fn without_query(_: &str, address: &str) -> String {
    format!("{address}?…")
}

impl PoolConfig {
    /// How many tasks run side by side when everything is well.
    pub fn expected_slots(&self) -> u32 {
        match self.engine {
            EngineKind::Openai => {
                let slots = self.endpoints.iter().map(|endpoint| endpoint.slots);
                slots.fold(0, u32::saturating_add)
            }
            EngineKind::Llamacpp | EngineKind::Mock => self.slots,
        }
    }

    /// Whether an engine of this configuration is one of the other: they
    /// differ at most in what concerns the queue and the engine's watchers.
    pub fn same_engine(&self, other: &Self) -> bool {
        let like_other = Self {
            aliases: other.aliases.clone(),
            load: other.load,
            idle_ttl_seconds: other.idle_ttl_seconds,
            pin: other.pin,
            queue_capacity: other.queue_capacity,
            batch_ageing_seconds: other.batch_ageing_seconds,
            default_max_tokens: other.default_max_tokens,
            load_timeout_seconds: other.load_timeout_seconds,
            restart: other.restart.clone(),
            liveness: other.liveness.clone(),
            ..self.clone()
        };
        like_other == *other
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
            shape: None,
        };
        LaunchSpec {
            ctx: self.ctx,
            slots: self.slots,
            profile: self.effective_profile(),
            purpose: self.purpose(),
            threads: self.threads,
            gpu_layers: self.gpu_layers,
            flags: self.flags.clone(),
            ..LaunchSpec::new(id.clone(), model)
        }
    }

    /// What its engine is started for.
    pub fn purpose(&self) -> Purpose {
        match self.serves {
            Serves::Text => Purpose::Text,
            Serves::Embeddings => Purpose::Embeddings,
            Serves::Rerank => Purpose::Rerank,
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
impl Config {
    /// The token in force: the variable's, else the file's, else the one in
    /// the configuration.
    pub fn token(&self, from_env: Option<String>) -> Result<Option<Token>, SetupError> {
        let parse = |text: String, origin: String| {
            Token::try_from(text).map_err(|problem| SetupError::Token { origin, problem })
        };
        if let Some(text) = from_env {
            return parse(text, TOKEN_VARIABLE.to_owned()).map(Some);
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
