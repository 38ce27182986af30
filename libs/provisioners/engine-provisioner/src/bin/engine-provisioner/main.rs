//! `engine-provisioner`: provides llama-server as a config file says and, given a model, runs it.

mod config;
mod model;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use llama_orch_types::{Hinted, PoolId};
use provision_kit::config::read_strict;
use provision_kit::dirs::{CacheDirs, RuntimeDirs};
use provisioners_engine_provisioner::{EngineProvisioner, LaunchSpec, handoff_path, preflight};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::Config;

/// Provides llama-server (llama.cpp's HTTP server): finds, fetches or builds it.
///
/// Without a model in the config it prints the path of the binary. With one it starts the engine,
/// writes the handoff file, prints the URL, and stays until Ctrl-C.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "\
Example config (YAML or JSON; every key has a default):

  provision:
    mode: source            # system, cache, release or source; without it all are tried
    version: b11434
  model: /models/model.gguf # leave out to provide the binary only
  profile: deterministic    # or throughput
  ctx: 4096                 # tokens for each slot
  flags: [\"--threads 2\"]

Files: the binary, logs and PID files lie under `cache_dir` (~/.cache/llama-orch); the handoff file \
and provenance under `runtime_dir` (.runtime). Progress goes to standard error, the result to \
standard output."
)]
struct Arguments {
    /// The config file.
    #[arg(long, value_name = "PATH", required_unless_present = "doctor")]
    config: Option<PathBuf>,
    /// The pool to run, instead of the config's.
    #[arg(long, value_name = "ID")]
    pool: Option<PoolId>,
    /// Say what would be tried, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Say what this machine has and lacks for providing an engine.
    #[arg(long)]
    doctor: bool,
}

type Failure = Box<dyn Hinted>;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        // A line that cannot be written is lost; saying so on the same file would panic.
        .log_internal_errors(false)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                // Progress says the rest already.
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("error")),
        )
        .init();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            terminal_ui::report::print_with(&error, None);
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(code) => code,
        Err(failure) => {
            let hint = failure.hint();
            terminal_ui::report::print_with(&*failure, hint);
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Result<ExitCode, Failure> {
    let mut config: Config = match &arguments.config {
        Some(path) => read_strict(path).map_err(boxed)?,
        None => Config::default(),
    };
    if let Some(pool) = arguments.pool {
        config.pool = Some(pool);
    }
    let cache = match &config.cache_dir {
        Some(path) => CacheDirs::new(absolute(path)),
        None => CacheDirs::new(CacheDirs::default_root().map_err(boxed)?),
    };
    if arguments.doctor {
        let report = preflight(&cache, config.provision.allow_package_installs).await;
        print(&report.to_string());
        return Ok(if report.can_build() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
    let runtime = config
        .runtime_dir
        .as_ref()
        .map_or_else(RuntimeDirs::default, RuntimeDirs::new);
    let reporter = terminal_ui::progress::on_stderr();
    let provisioner = EngineProvisioner::new(cache.clone(), runtime.clone(), reporter.clone());
    if arguments.dry_run {
        print(
            &provisioner
                .plan(&config.provision)
                .await
                .map_err(boxed)?
                .to_string(),
        );
        return Ok(ExitCode::SUCCESS);
    }
    // The signals are ours from the start: an interrupted build ends its compilers.
    let mut signals = Signals::listen().map_err(|error| boxed(SignalFailure(error)))?;
    let work = async {
        let installation = provisioner.ensure(&config.provision).await.map_err(boxed)?;
        let Some(reference) = &config.model else {
            print(&format!("{}\n", installation.binary.display()));
            return Ok(None);
        };
        let model = model::provide(reference, &cache, &runtime, reporter).await?;
        let spec = LaunchSpec {
            ctx: config.ctx,
            slots: config.slots(),
            profile: config.profile,
            threads: config.threads,
            gpu_layers: config.gpu_layers,
            flags: config.flags.clone(),
            ..LaunchSpec::new(
                config.pool.clone().unwrap_or_else(PoolId::default_pool),
                model,
            )
        };
        provisioner
            .start(&installation, spec)
            .await
            .map(Some)
            .map_err(boxed)
    };
    let engine = tokio::select! {
        engine = work => engine?,
        () = signals.next() => {
            // The work was dropped; its compilers end before we do.
            provision_kit::process::all_ended().await;
            terminal_ui::say("interrupted; a build goes on from here next time");
            return Ok(ExitCode::from(130));
        }
    };
    let Some(mut engine) = engine else {
        return Ok(ExitCode::SUCCESS);
    };
    let handoff = handoff_path(&runtime, &engine.context().pool_id);
    terminal_ui::say(format!(
        "ready; the handoff is {}; Ctrl-C stops the engine",
        handoff.display()
    ));
    print(&format!("{}\n", engine.context().url));
    tokio::select! {
        exit = engine.wait_exit() => {
            let status = exit.status.map_or_else(|| "unknown".to_owned(), |status| status.to_string());
            terminal_ui::say(format!("error: the engine ended by itself ({status})\n{}", exit.log_tail.join("\n")));
            Ok(ExitCode::FAILURE)
        }
        () = signals.next() => {
            let report = engine.stop().await;
            let how = if report.killed { "killed" } else { "stopped" };
            terminal_ui::say(format!("{how} after {:.1} s", report.took.as_secs_f32()));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// The signals that mean "end".
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen for signals")]
struct SignalFailure(#[source] std::io::Error);

impl Hinted for SignalFailure {}

fn boxed(error: impl Hinted + 'static) -> Failure {
    Box::new(error)
}

fn absolute(path: &Path) -> PathBuf {
    // Fails for an empty path only, and that fails at its first use, with its name.
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The program's result. A reader that has gone away is no error.
fn print(text: &str) {
    let _ = write!(std::io::stdout(), "{text}");
}
