//! `orchestratord config check` and `orchestratord config schema`.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Subcommand;
use provision_kit::progress::Silent;

use super::{Context, Listen, report};
use crate::app::bootstrap::{Plan, StartError, directories};
use crate::app::config::{Config, shown_model};

#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Read the configuration and say whether it can be used.
    Check(Listen),
    /// Print the JSON schema of the configuration file.
    Schema,
}

pub(super) fn config(context: &Context, command: &ConfigCommand) -> ExitCode {
    match command {
        ConfigCommand::Check(_) => match check(context) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => report::error(&error),
        },
        ConfigCommand::Schema => {
            report::line(format!("{:#}", schemars::schema_for!(Config).as_value()));
            ExitCode::SUCCESS
        }
    }
}

fn check(context: &Context) -> Result<(), StartError> {
    let plan = Plan::read(context.source.clone(), Arc::new(Silent))?;
    let config = &plan.loaded.config;
    let (cache, runtime) = directories(config)?;
    let origin = plan.loaded.origin.as_ref();
    report::line(match origin {
        Some((path, _)) => format!("{}: ok", path.display()),
        None => "no configuration file: everything is at its default".to_owned(),
    });
    report::line(format!("listen       {}", config.listen));
    report::line(format!(
        "token        {}",
        if plan.token.is_some() { "set" } else { "none" }
    ));
    report::line(format!("cache_dir    {}", cache.root().display()));
    report::line(format!("runtime_dir  {}", runtime.root().display()));
    for (id, pool) in &config.pools {
        report::line(format!(
            "pool {id}: engine {}, model {}, {} slot(s), queue of {}",
            pool.engine,
            shown_model(&pool.model),
            pool.expected_slots(),
            pool.queue_capacity
        ));
    }
    Ok(())
}
