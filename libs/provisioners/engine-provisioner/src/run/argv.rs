//! The engine's command line: a pure function of what is to be started.
//!
//! Every flag has one *setting*: `-c` and `--ctx-size` are one, and so are `--cont-batching` and
//! `--no-cont-batching`. A setting may be given once. Some settings are ours alone (where to
//! listen, which model), some belong to the profile, some to fields of the pool's config, and the
//! rest to the user.

use llama_orch_types::Hinted;

use super::spec::{LaunchSpec, Profile, Purpose};

/// Other spellings of a flag, as llama-server b11434 and older ones know them, and the one that is
/// used here. `--no-…` forms are listed where they are no plain `--no-` before the name.
const SPELLINGS: &[(&str, &[&str])] = &[
    ("--n-gpu-layers", &["-ngl", "--ngl", "--gpu-layers"]),
    ("--ctx-size", &["-c"]),
    ("--threads", &["-t"]),
    ("--threads-batch", &["-tb"]),
    ("--batch-size", &["-b"]),
    ("--ubatch-size", &["-ub"]),
    ("--parallel", &["-np"]),
    ("--cont-batching", &["-cb"]),
    ("--no-cont-batching", &["-nocb"]),
    ("--webui", &["--ui"]),
    ("--no-webui", &["--no-ui"]),
    ("--model", &["-m"]),
    ("--alias", &["-a"]),
    ("--n-predict", &["-n", "--predict"]),
    ("--flash-attn", &["-fa"]),
    ("--kv-unified", &["-kvu"]),
    ("--no-kv-unified", &["-no-kvu"]),
    ("--kv-offload", &["-kvo"]),
    ("--no-kv-offload", &["-nkvo"]),
    ("--no-repack", &["-nr"]),
    ("--cache-ram", &["-cram"]),
    ("--cache-type-k", &["-ctk"]),
    ("--cache-type-v", &["-ctv"]),
    ("--ctx-checkpoints", &["-ctxcp", "--swa-checkpoints"]),
    ("--fit", &["-fit"]),
    ("--seed", &["-s"]),
    ("--temp", &["--temperature"]),
    ("--device", &["-dev"]),
    ("--split-mode", &["-sm"]),
    ("--tensor-split", &["-ts"]),
    ("--main-gpu", &["-mg"]),
    ("--override-tensor", &["-ot"]),
    ("--timeout", &["-to"]),
    ("--verbose", &["-v", "--log-verbose"]),
    ("--log-verbosity", &["-lv", "--verbosity"]),
    ("--hf-repo", &["-hf", "-hfr"]),
    ("--hf-file", &["-hff"]),
    ("--hf-token", &["-hft"]),
    ("--model-url", &["-mu"]),
    ("--docker-repo", &["-dr"]),
    ("--help", &["-h", "--usage"]),
    ("--cache-list", &["-cl"]),
    ("--embeddings", &["--embedding"]),
    ("--reranking", &["--rerank"]),
    ("--cpu-moe", &["-cmoe"]),
    ("--n-cpu-moe", &["-ncmoe"]),
];

/// Settings that are never the user's, and why.
const OURS: &[(&str, &str)] = &[
    ("--host", "the engine listens on 127.0.0.1"),
    ("--port", "a free port is chosen at each start"),
    ("--reuse-port", "no two engines may share a port"),
    ("--model", "the pool's `model` says it"),
    ("--hf-repo", "the pool's `model` says it"),
    ("--hf-file", "the pool's `model` says it"),
    ("--hf-token", "a secret on a command line is seen by all"),
    ("--model-url", "the pool's `model` says it"),
    ("--docker-repo", "the pool's `model` says it"),
    ("--models-dir", "a pool serves one model"),
    ("--models-preset", "a pool serves one model"),
    ("--api-key", "a secret on a command line is seen by all"),
    ("--api-key-file", "the adapter sends no key"),
    ("--api-prefix", "the adapter knows no prefix"),
    ("--ssl-key-file", "the engine is reached over loopback only"),
    (
        "--ssl-cert-file",
        "the engine is reached over loopback only",
    ),
    ("--help", "the engine would print and end"),
    ("--version", "the engine would print and end"),
    ("--cache-list", "the engine would print and end"),
    ("--list-devices", "the engine would print and end"),
    ("--completion-bash", "the engine would print and end"),
];

/// Flags that begin with `no-` and turn over no other: `--no-host` is about the memory that weights
/// are kept in, and `--host` about where to listen.
const NO_NEGATIONS: [&str; 1] = ["--no-host"];

/// A flag that cannot stand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FlagError {
    #[error("`{flag}` is given twice: by {first} and by {second}")]
    GivenTwice {
        flag: String,
        first: String,
        second: String,
    },
    #[error("`{flag}` ({first}) contradicts `{other}` ({second})")]
    Contradiction {
        flag: String,
        first: String,
        other: String,
        second: String,
    },
    #[error("`{flag}` ({place}) is not to be set: {reason}")]
    NotYours {
        flag: String,
        place: String,
        reason: &'static str,
    },
    #[error("`{word}` ({place}) is no flag and follows none")]
    StrayWord { word: String, place: String },
    #[error("slots is {slots}, but profile deterministic decodes one task at a time")]
    TooManySlots { slots: u32 },
    #[error("{field} is 0")]
    Zero { field: &'static str },
    #[error("{ctx} tokens for each of {slots} slots are more than an engine can count")]
    TooLarge { ctx: u32, slots: u32 },
}

impl Hinted for FlagError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::GivenTwice { first, second, .. } => format!("remove it from {second} or {first}"),
            Self::Contradiction { first, .. } => {
                format!("remove it from {first}, or choose another `profile`")
            }
            Self::NotYours { place, .. } | Self::StrayWord { place, .. } => {
                format!("remove it from {place}")
            }
            Self::TooManySlots { .. } => {
                "set `slots: 1`, or `profile: throughput` for several at once".to_owned()
            }
            Self::Zero { field } => format!("set {field} to 1 or more, or leave it out"),
            Self::TooLarge { .. } => "lower `ctx` or `slots`".to_owned(),
        })
    }
}

/// A flag with its values and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Flag {
    name: String,
    values: Vec<String>,
    place: String,
}

impl Flag {
    fn new(name: &str, values: &[&str], place: impl Into<String>) -> Self {
        Self {
            name: name.to_owned(),
            values: values.iter().map(|&value| value.to_owned()).collect(),
            place: place.into(),
        }
    }

    /// What the flag sets: its name without the `no-`.
    fn setting(&self) -> String {
        match self.name.strip_prefix("--no-") {
            Some(rest) if !NO_NEGATIONS.contains(&self.name.as_str()) => format!("--{rest}"),
            _ => self.name.clone(),
        }
    }

    fn text(&self) -> String {
        let words = std::iter::once(&self.name).chain(&self.values);
        words.map(String::as_str).collect::<Vec<_>>().join(" ")
    }
}

/// The engine's arguments, without the program's name.
pub fn render_argv(spec: &LaunchSpec, port: u16) -> Result<Vec<String>, FlagError> {
    check_numbers(spec)?;
    let mut flags = own_flags(spec, port);
    flags.extend(profile_flags(spec));
    flags.extend(field_flags(spec));
    let user = user_flags(&spec.flags)?;
    for (index, flag) in user.iter().enumerate() {
        if let Some((_, reason)) = OURS.iter().find(|(name, _)| *name == flag.name) {
            return Err(FlagError::NotYours {
                flag: flag.name.clone(),
                place: flag.place.clone(),
                reason,
            });
        }
        let mut earlier = flags.iter().chain(&user[..index]);
        if let Some(other) = earlier.find(|other| other.setting() == flag.setting()) {
            return Err(clash(other, flag));
        }
    }
    for default in soft_flags(spec) {
        if !user.iter().any(|flag| flag.setting() == default.setting()) {
            flags.push(default);
        }
    }
    flags.extend(user);
    let words = |flag: Flag| std::iter::once(flag.name).chain(flag.values);
    Ok(flags.into_iter().flat_map(words).collect())
}

fn clash(first: &Flag, second: &Flag) -> FlagError {
    if first.name == second.name && first.values == second.values {
        FlagError::GivenTwice {
            flag: second.name.clone(),
            first: first.place.clone(),
            second: second.place.clone(),
        }
    } else {
        FlagError::Contradiction {
            flag: second.text(),
            first: second.place.clone(),
            other: first.text(),
            second: first.place.clone(),
        }
    }
}

fn check_numbers(spec: &LaunchSpec) -> Result<(), FlagError> {
    for (field, value) in [
        ("slots", Some(spec.slots)),
        ("ctx", Some(spec.ctx_per_slot())),
        ("threads", spec.threads),
    ] {
        if value == Some(0) {
            return Err(FlagError::Zero { field });
        }
    }
    if spec.profile == Profile::Deterministic && spec.slots != 1 {
        return Err(FlagError::TooManySlots { slots: spec.slots });
    }
    // The engine counts tokens in 32 signed bits.
    let (ctx, slots) = (spec.ctx_per_slot(), spec.slots);
    if ctx
        .checked_mul(slots)
        .is_none_or(|total| i32::try_from(total).is_err())
    {
        return Err(FlagError::TooLarge { ctx, slots });
    }
    Ok(())
}

fn own_flags(spec: &LaunchSpec, port: u16) -> Vec<Flag> {
    let ours = |name, values: &[&str]| Flag::new(name, values, "the engine provisioner");
    vec![
        ours("--model", &[&spec.model.path.to_string_lossy()]),
        ours("--host", &["127.0.0.1"]),
        ours("--port", &[&port.to_string()]),
        // The model is a file here already, and an engine that fetches something is not pinned.
        ours("--offline", &[]),
        // The log is a file.
        ours("--log-colors", &["off"]),
    ]
}

/// What the profile stands for; the user cannot turn it over.
fn profile_flags(spec: &LaunchSpec) -> Vec<Flag> {
    let place = format!("profile {}", spec.profile);
    let flag = |name, values: &[&str]| Flag::new(name, values, place.as_str());
    let slots = spec.slots.to_string();
    let mut flags = vec![
        flag("--parallel", &[&slots]),
        // The context below is divided evenly among the slots, so that each has its own whole one
        // and no task's length takes from another's.
        flag("--no-kv-unified", &[]),
        flag("--no-webui", &[]),
        flag("--metrics", &[]),
        flag("--slots", &[]),
    ];
    match spec.profile {
        Profile::Deterministic => flags.extend([
            flag("--no-cont-batching", &[]),
            // Without it the engine moves layers between GPU and CPU by how much memory happens to
            // be free at start, and other kernels give other bytes. It also saves a second look at
            // the model.
            flag("--fit", &["off"]),
            // No store of earlier prompts' states beside the slot: what a task gets depends on the
            // slot's last task at most, and memory does not grow with use.
            flag("--cache-ram", &["0"]),
        ]),
        Profile::Throughput => flags.push(flag("--cont-batching", &[])),
    }
    flags
}

/// What the pool's config says in fields of its own.
fn field_flags(spec: &LaunchSpec) -> Vec<Flag> {
    // The engine's figure is for all slots together. It rounds each slot's share up to a multiple
    // of 256 tokens. A product too large for the engine is refused in `check_numbers`.
    let total = u64::from(spec.ctx_per_slot()) * u64::from(spec.slots);
    let mut flags = vec![Flag::new("--ctx-size", &[&total.to_string()], "`ctx`")];
    if let Some(threads) = spec.threads {
        flags.push(Flag::new("--threads", &[&threads.to_string()], "`threads`"));
    }
    if let Some(layers) = spec.gpu_layers {
        let layers = layers.to_string();
        flags.push(Flag::new("--n-gpu-layers", &[&layers], "`gpu_layers`"));
    }
    match spec.purpose {
        Purpose::Text => {}
        Purpose::Embeddings => flags.push(Flag::new("--embeddings", &[], "`serves`")),
        // It brings embeddings with it, pooled for ranking.
        Purpose::Rerank => flags.push(Flag::new("--reranking", &[], "`serves`")),
    }
    flags
}

/// What is set unless the user sets it.
fn soft_flags(spec: &LaunchSpec) -> Vec<Flag> {
    // Its answers name the model; without this they show the file's path, to every client.
    let name = Flag::new("--alias", &[spec.pool_id.as_str()], "the default");
    let batch = match (spec.purpose, spec.profile) {
        // An input that does not fit into one batch is refused, and so that none that
        // fits the context is, a batch holds a whole one.
        (Purpose::Embeddings | Purpose::Rerank, _) => spec.ctx_per_slot(),
        // The engine looks for a client's disconnect between batches only: with its default of
        // 2048 tokens a cancelled long prompt runs on for seconds; on a CPU, batches of 128 are as
        // fast as larger ones. Equal sizes also make the shape of every computation depend on the
        // prompt alone.
        (Purpose::Text, Profile::Deterministic) => 128,
        (Purpose::Text, Profile::Throughput) => return vec![name],
    };
    let batch = batch.to_string();
    let sizes =
        ["--batch-size", "--ubatch-size"].map(|flag| Flag::new(flag, &[&batch], "the default"));
    std::iter::once(name).chain(sizes).collect()
}

/// The user's words as flags, in the one spelling of each. A word may hold a flag alone or with its
/// value (`--threads 4`, `--threads=4`). A value that looks like a flag is one: the engine would
/// take it for one too.
fn user_flags(words: &[String]) -> Result<Vec<Flag>, FlagError> {
    let mut flags: Vec<Flag> = Vec::new();
    for (index, word) in words.iter().enumerate() {
        let place = format!("`flags[{index}]`");
        let mut rest = word.trim();
        while is_flag(rest) {
            let split = rest.find(|c: char| c == '=' || c.is_whitespace());
            let (name, value) = split.map_or((rest, ""), |at| (&rest[..at], rest[at + 1..].trim()));
            flags.push(Flag::new(canonical(name), &[], place.as_str()));
            rest = value;
        }
        if rest.is_empty() {
            continue;
        }
        let Some(flag) = flags.last_mut() else {
            return Err(FlagError::StrayWord {
                word: rest.to_owned(),
                place,
            });
        };
        flag.values.push(rest.to_owned());
    }
    Ok(flags)
}

/// A word is a flag if it begins with a dash and is no negative number.
fn is_flag(word: &str) -> bool {
    word.len() > 1 && word.starts_with('-') && word.parse::<f64>().is_err()
}

fn canonical(name: &str) -> &str {
    SPELLINGS
        .iter()
        .find(|(_, others)| others.contains(&name))
        .map_or(name, |(canonical, _)| canonical)
}

#[cfg(test)]
#[path = "argv_tests.rs"]
mod tests;
