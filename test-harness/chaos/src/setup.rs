//! A run's directory, engine, model and configuration.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Map, Value, json};
use test_harness_e2e_haiku::binary::{Build, orchestratord};
use test_harness_e2e_haiku::daemon::Daemon;
use test_harness_e2e_haiku::engine::sha256;
use test_harness_e2e_haiku::settings::Settings;
use test_harness_fake_engine::Script;

use crate::args::{EngineChoice, Options};
use crate::error::HarnessError;

/// The pool that clients use.
pub const POOL: &str = "main";
/// The pool that comes and goes.
pub const SIDE_POOL: &str = "side";
/// Pools on demand, of which one may be loaded at a time; with the scripted engine.
pub const GUESTS: [&str; 2] = ["guest-a", "guest-b"];
/// The queue's bound to begin with.
pub const CAPACITY: u64 = 12;
pub const SLOTS: u64 = 2;
/// Variables that would make a daemon something other than the run says.
const VARIABLES: [&str; 7] = [
    "ORCHD_CONFIG",
    "ORCHD_LISTEN",
    "ORCHD_TOKEN",
    "ORCHD_LLAMACPP_URL",
    "ORCHD_LLAMACPP_POOL",
    "ORCHD_LLAMACPP_REPLICA",
    "RUST_LOG",
];

/// What stands behind the daemon.
#[derive(Debug, Clone)]
pub struct Engine {
    pub binary: PathBuf,
    /// The good model file, never touched.
    pub model: PathBuf,
    pub digest: String,
    pub size: u64,
    /// Where the scripted engine's script lies.
    pub script_dir: Option<PathBuf>,
    /// The scripted engine of the guests' pools, whose script stays healthy.
    pub guests: Option<PathBuf>,
}

/// Everything a daemon of this run is started with.
#[derive(Debug)]
pub struct Setup {
    pub dir: PathBuf,
    pub daemon: PathBuf,
    pub engine: Engine,
    /// Stands in the environment of the daemon and all that it starts.
    pub mark: String,
}

impl Setup {
    pub async fn make(options: &Options, dir: &Path) -> Result<Self, HarnessError> {
        let daemon = options
            .daemon
            .clone()
            .unwrap_or_else(|| orchestratord(Build::Default));
        let engine = match options.engine {
            EngineChoice::Scripted => scripted(dir)?,
            EngineChoice::Real => real().await?,
        };
        let name = dir.file_name().map(|name| name.to_string_lossy());
        Ok(Self {
            dir: dir.to_owned(),
            daemon,
            engine,
            mark: name.unwrap_or_default().into_owned(),
        })
    }

    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    pub fn runtime(&self) -> PathBuf {
        self.dir.join("runtime")
    }

    pub fn config_file(&self) -> PathBuf {
        self.dir.join("orchestratord.json")
    }

    pub fn stored_model(&self) -> PathBuf {
        self.cache().join("models/sha256").join(&self.engine.digest)
    }

    pub fn model_records(&self) -> PathBuf {
        self.cache().join("models/records")
    }

    pub fn pid_file(&self) -> PathBuf {
        self.cache().join("run").join(format!("{POOL}.pid"))
    }

    pub fn handoff(&self) -> PathBuf {
        self.runtime().join(format!("engines/llamacpp-{POOL}.json"))
    }

    pub fn announcement(&self) -> PathBuf {
        self.runtime().join("orchestratord.json")
    }

    /// The configuration to begin with.
    pub fn config(&self, source: &str) -> Result<Value, HarnessError> {
        let scripted = self.engine.script_dir.is_some();
        let (first, next) = if scripted { (5, 3) } else { (20, 4) };
        let mut config = json!({
            "listen": "127.0.0.1:0",
            "cache_dir": self.cache(),
            "runtime_dir": self.runtime(),
            "drain_seconds": 3,
            "models": {
                "verify": "required",
                "stall_timeout_seconds": 1,
                "profiles": { "chaos": {
                    "digest": format!("sha256:{}", self.engine.digest),
                    "size_bytes": self.engine.size,
                    "sources": [source],
                }},
            },
            "tasks": {
                "keep_seconds": 120,
                "keep_at_most": 4000,
                "first_token_seconds": first,
                "next_token_seconds": next,
                "max_body_bytes": 256 * 1024,
            },
            "pools": { POOL: self.pool() },
        });
        let schema = self.schema()?;
        if let Some(binary) = &self.engine.guests {
            for name in GUESTS {
                let mut pool = self.pool();
                pool["provision"]["path"] = json!(binary);
                pool["load"] = json!("on_demand");
                pool["idle_ttl_seconds"] = json!(1);
                config["pools"][name] = pool;
            }
            let group = json!({ "pools": GUESTS, "at_most": 1 });
            config["memory"] = json!({ "min_dwell_seconds": 1, "groups": { "guests": group } });
        }
        for (name, wanted) in [("restart", &RESTART[..]), ("liveness", &LIVENESS[..])] {
            if let Some(section) = section(&schema, name, wanted) {
                config["pools"][POOL][name] = section;
            }
        }
        if let Some(limits) = section(&schema, "limits", &LIMITS) {
            config["limits"] = limits;
        }
        Ok(config)
    }

    pub fn pool(&self) -> Value {
        json!({
            "model": "chaos",
            "provision": { "mode": "system", "path": self.engine.binary },
            "threads": 1,
            "slots": SLOTS,
            "ctx": 2048,
            "queue_capacity": CAPACITY,
            "batch_ageing_seconds": 2,
            "load_timeout_seconds": 30,
        })
    }

    /// `orchestratord config schema`.
    fn schema(&self) -> Result<Value, HarnessError> {
        let output = self.command(&["config", "schema"]).output();
        let output = output.map_err(|source| HarnessError::Spawn {
            path: self.daemon.clone(),
            source,
        })?;
        serde_json::from_slice(&output.stdout).map_err(HarnessError::Schema)
    }

    /// Whether the daemon knows `orchestratord reload`, and so takes SIGHUP for it.
    pub fn knows_reload(&self) -> bool {
        let mut command = self.command(&["reload", "--help"]);
        let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
        status.is_ok_and(|status| status.success())
    }

    /// The daemon's command line and environment.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.daemon);
        command.args(arguments);
        self.environment(&mut command);
        command
    }

    pub fn environment(&self, command: &mut Command) {
        command
            .current_dir(&self.dir)
            .env("CHAOS_RUN", &self.mark)
            .stdin(Stdio::null());
        for variable in VARIABLES {
            command.env_remove(variable);
        }
    }
}

/// Short waits between restarts, and a breaker that trips seldom and briefly,
/// where the daemon lets its users say so.
const RESTART: [(&str, u64); 5] = [
    ("first_delay_ms", 50),
    ("last_delay_ms", 500),
    ("crashes", 10),
    ("window_seconds", 30),
    ("cool_down_seconds", 3),
];

/// Hangs are to be noticed soon.
const LIVENESS: [(&str, u64); 2] = [("check_seconds", 1), ("probe_seconds", 3)];

/// Clients that fall silent are to be let go soon.
const LIMITS: [(&str, u64); 3] = [
    ("header_seconds", 2),
    ("body_stall_seconds", 2),
    ("reader_stall_seconds", 5),
];

/// A section of the configuration, as far as the daemon knows it.
fn section(schema: &Value, name: &str, wanted: &[(&str, u64)]) -> Option<Value> {
    let section = resolve(schema, find_property(schema, name)?);
    let known = section["properties"].as_object()?;
    let mut filled = Map::new();
    for (name, value) in wanted {
        if let Some(property) = known.get(*name) {
            let property = resolve(schema, property);
            let least = property["minimum"].as_u64().unwrap_or(0);
            let most = property["maximum"].as_u64().unwrap_or(u64::MAX);
            filled.insert((*name).to_owned(), json!(value.clamp(&least, &most)));
        }
    }
    Some(Value::Object(filled))
}

fn find_property<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let object = value.as_object()?;
    if let Some(found) = object.get("properties").and_then(|all| all.get(name)) {
        return Some(found);
    }
    object.values().find_map(|inner| find_property(inner, name))
}

fn resolve<'a>(schema: &'a Value, value: &'a Value) -> &'a Value {
    let reference = value["$ref"].as_str().or_else(|| {
        let any = value["anyOf"].as_array().or(value["allOf"].as_array())?;
        any.iter().find_map(|one| one["$ref"].as_str())
    });
    reference
        .and_then(|reference| schema.pointer(reference.strip_prefix('#')?))
        .unwrap_or(value)
}

/// A healthy scripted engine.
pub fn healthy() -> Script {
    Script {
        numbered: true,
        first_token_ms: 5,
        token_ms: 4,
        load_ms: 40,
        ..Script::default()
    }
}

fn scripted(dir: &Path) -> Result<Engine, HarnessError> {
    let script_dir = dir.join("engine");
    let binary = test_harness_fake_engine::install(&script_dir, &healthy());
    let model = dir.join("good.gguf");
    fs::write(&model, small_model()).map_err(HarnessError::file("cannot write", &model))?;
    let engine = describe(binary, model, Some(script_dir))?;
    let guests = test_harness_fake_engine::install(&dir.join("guests"), &healthy());
    Ok(Engine {
        guests: Some(guests),
        ..engine
    })
}

/// The engine and the model that this machine's daemon provides.
async fn real() -> Result<Engine, HarnessError> {
    let daemon = Daemon::ready(&Settings::real("chaos")).await;
    let engine = daemon.engine().await;
    let arguments = engine.arguments();
    let binary = fs::read_link(engine.executable());
    let model = arguments
        .iter()
        .skip_while(|argument| *argument != "--model")
        .nth(1)
        .map(PathBuf::from);
    daemon.stop().await;
    let (Ok(binary), Some(model)) = (binary, model) else {
        return Err(HarnessError::NoEngine(arguments.join(" ")));
    };
    describe(binary, model, None)
}

fn describe(
    binary: PathBuf,
    model: PathBuf,
    script_dir: Option<PathBuf>,
) -> Result<Engine, HarnessError> {
    let digest = sha256(&model).map_err(HarnessError::file("cannot hash", &model))?;
    let size = fs::metadata(&model).map_err(HarnessError::file("cannot look at", &model))?;
    Ok(Engine {
        binary,
        digest: digest.trim_start_matches("sha256:").to_owned(),
        size: size.len(),
        model,
        script_dir,
        guests: None,
    })
}

/// A file that is a model by its header, with a few megabytes after it, so
/// that a transfer can be cut, stalled and spoilt half-way.
fn small_model() -> Vec<u8> {
    const STRING: u32 = 8;
    const UINT32: u32 = 4;
    const BYTES: u32 = 6 * 1024 * 1024;
    let mut out = b"GGUF".to_vec();
    let text = |out: &mut Vec<u8>, text: &str| {
        out.extend((text.len() as u64).to_le_bytes());
        out.extend(text.as_bytes());
    };
    out.extend(3u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    text(&mut out, "general.architecture");
    out.extend(STRING.to_le_bytes());
    text(&mut out, "llama");
    text(&mut out, "llama.context_length");
    out.extend(UINT32.to_le_bytes());
    out.extend(8192u32.to_le_bytes());
    let mut noise = crate::rng::Rng::new(1);
    out.extend((0..BYTES / 8).flat_map(|_| noise.number().to_le_bytes()));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_filled_as_far_as_it_is_known() {
        let schema = json!({
            "properties": {"pools": {"additionalProperties": {"$ref": "#/$defs/Pool"}}},
            "$defs": {
                "Pool": {"properties": {"restart": {"$ref": "#/$defs/Restart"}}},
                "Restart": {"properties": {
                    "first_delay_ms": {"minimum": 200, "maximum": 5000},
                    "crashes": {"maximum": 5},
                    "other": {},
                }},
            },
        });
        let expected = json!({"first_delay_ms": 200, "crashes": 5});
        assert_eq!(section(&schema, "restart", &RESTART), Some(expected));
        assert_eq!(section(&schema, "liveness", &LIVENESS), None);
    }
}
