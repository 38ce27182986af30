//! The command line: parse, set up logs, run one command, report errors.

mod client;
mod config;
mod doctor;
mod models;
mod pools;
mod reload;
mod report;
mod run;
mod serve;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use indicatif::MultiProgress;

use self::config::ConfigCommand;
use crate::app::config::Source;
use crate::app::env;
use crate::runtimes::Serving;
use crate::ui::logging::{self, LogFormat};

/// Turns a bare machine into a working LLM endpoint.
///
/// Without a command it serves: the engine (llama.cpp's llama-server) and the
/// model are provided, the engine is started and supervised, and tasks are
/// taken over HTTP. Without any configuration it serves the small model
/// `haiku` on 127.0.0.1:8080.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    listen: Listen,
    #[command(flatten)]
    common: Common,
}

const EXAMPLES: &str = "\
Examples:
  orchestratord                                  serve with the defaults
  orchestratord --config orchestratord.yaml      serve what a file says
  orchestratord run \"Write a haiku about rain\"   one answer on the terminal
  orchestratord reload --dry-run                 what a changed file would do to a daemon
  orchestratord models pull haiku                fetch a model before anybody needs it
  orchestratord pools list                       what a daemon's pools do
  orchestratord doctor                           what this machine has and lacks
  orchestratord config schema                    every setting, as JSON schema

Then, from another terminal:
  curl -s 127.0.0.1:8080/v2/tasks -d '{\"messages\":[{\"role\":\"user\",\"content\":\"Hello\"}]}'
  curl -N 127.0.0.1:8080/v2/tasks/<task_id>/events";

#[derive(Debug, Args)]
struct Common {
    /// Configuration file (YAML or JSON). Default: orchestratord.yaml in the
    /// working directory, if it is there.
    #[arg(long, short, global = true, env = env::CONFIG, value_name = "PATH")]
    config: Option<PathBuf>,
    /// Where engines, models and logs are kept.
    #[arg(long, global = true, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
    /// Where handoff and provenance files are written.
    #[arg(long, global = true, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// How logs are written.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or a filter such as
    /// `info,orchestratord=debug`. RUST_LOG overrides it.
    #[arg(long, global = true, value_name = "LEVEL", value_parser = logging::check_level)]
    log_level: Option<String>,
}

/// For the commands that listen, or say something about it.
#[derive(Debug, Default, Args)]
struct Listen {
    /// Address to listen on; port 0 takes any free one.
    #[arg(long, env = env::LISTEN, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the configured pools over HTTP (what happens without a command).
    ///
    /// SIGINT and SIGTERM let running tasks finish and stop the engines; SIGHUP
    /// reads the configuration again, as `reload` does.
    Serve(Listen),
    /// Provide engine and model, answer one prompt on the terminal, and exit.
    Run(run::RunArgs),
    /// Have a running daemon read its configuration again and do what changed.
    ///
    /// The daemon reads the file that it was started with. Pools that did not
    /// change go on as they are. Ends with 1 if the file is wrong, in which
    /// case nothing changes, or if a pool failed or was rolled back.
    Reload(reload::ReloadArgs),
    /// See which models are on this machine; fetch, check and remove them.
    ///
    /// Goes through the daemon that runs here, if one does, else works on the
    /// store itself.
    Models(models::ModelsArgs),
    /// See what a running daemon's pools do; load, stop and unload them.
    Pools(pools::PoolsArgs),
    /// Say what this machine has and lacks.
    Doctor(Listen),
    /// Check or describe the configuration.
    #[command(subcommand)]
    Config(ConfigCommand),
}

/// What every command is given.
#[derive(Debug)]
struct Context {
    /// Where the configuration comes from.
    source: Source,
    log_format: LogFormat,
    bars: MultiProgress,
}

impl Cli {
    /// The configuration's file, and what the command line says over it.
    fn source(&self) -> Source {
        let listen = match &self.command {
            Some(
                Command::Serve(own)
                | Command::Doctor(own)
                | Command::Config(ConfigCommand::Check(own)),
            ) => own.listen,
            _ => None,
        };
        Source {
            file: self.common.config.clone(),
            listen: listen.or(self.listen.listen),
            cache_dir: self.common.cache_dir.clone(),
            runtime_dir: self.common.runtime_dir.clone(),
        }
    }
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    let source = cli.source();
    let command = cli.command.unwrap_or(Command::Serve(cli.listen));
    let bars = MultiProgress::new();
    let default_level = match command {
        // The Hub's client calls an attempt that has a fallback an error.
        Command::Serve(_) => "info,hf_hub=off",
        // The answer is what counts: only progress beside it. What goes wrong
        // is said once, at the end.
        Command::Run(_) | Command::Models(_) => {
            "warn,orchestratord=off,orchestratord::ui=info,hf_hub=off"
        }
        Command::Reload(_) | Command::Pools(_) | Command::Doctor(_) | Command::Config(_) => "error",
    };
    let level = cli.common.log_level.as_deref().unwrap_or(default_level);
    logging::set_up(cli.common.log_format, level, &bars);
    if let Command::Serve(_) = command {
        crate::begin_telemetry();
    }
    let context = Context {
        source,
        log_format: cli.common.log_format,
        bars,
    };
    let serving = match Serving::new() {
        Ok(serving) => serving,
        Err(error) => {
            report::aside(format!("error: could not start the runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    serving.run(dispatch(command, context))
}

async fn dispatch(command: Command, context: Context) -> ExitCode {
    match command {
        Command::Serve(_) => serve::serve(context).await,
        Command::Run(args) => run::run(context, args).await,
        Command::Reload(args) => reload::reload(&context, &args).await,
        Command::Models(args) => models::models(&context, &args).await,
        Command::Pools(args) => pools::pools(&context, &args).await,
        Command::Doctor(_) => doctor::doctor(&context).await,
        Command::Config(command) => config::config(&context, &command),
    }
}
