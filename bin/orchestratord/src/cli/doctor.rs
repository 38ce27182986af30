//! `orchestratord doctor`: what this machine has and lacks, in plain words.

use std::process::ExitCode;

use provision_kit::dirs::CacheDirs;
use tokio::net::TcpListener;

use super::{Context, report};
use crate::app::bootstrap::{self, StartError};
use crate::app::config::{Config, Loaded};

pub(super) async fn doctor(context: &Context) -> ExitCode {
    match examine(context).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => report::error(&error),
    }
}

/// Says whether everything needed is here.
async fn examine(context: &Context) -> Result<bool, StartError> {
    let loaded = context.source.load().map_err(StartError::Setup)?;
    let (cache, runtime) = bootstrap::directories(&loaded.config)?;
    report::line(format!("orchestratord {}", env!("CARGO_PKG_VERSION")));
    report::line(format!("cache        {}", cache.root().display()));
    report::line(format!("runtime      {}", runtime.root().display()));
    report::line(configuration(&loaded));
    report::line(port(&loaded.config).await);
    let ready = provisioning(&loaded.config, &cache, &runtime).await;
    report::line("");
    report::line(if ready {
        "This machine can serve: `orchestratord` starts the daemon."
    } else {
        "Something needed is missing; see the lines above."
    });
    Ok(ready)
}

fn configuration(loaded: &Loaded) -> String {
    match &loaded.origin {
        Some((path, _)) => format!("config       {}", path.display()),
        None => "config       none: everything is at its default".to_owned(),
    }
}

async fn port(config: &Config) -> String {
    match TcpListener::bind(config.listen).await {
        Ok(_) => format!("port         {} is free", config.listen),
        Err(error) => format!(
            "port         {} cannot be had ({error}): a daemon may be running; else choose another with --listen",
            config.listen
        ),
    }
}

/// A build without provisioning provides nothing by itself.
#[cfg(not(feature = "provisioning"))]
#[allow(clippy::unused_async, reason = "the same shape in both builds")]
async fn provisioning(_: &Config, _: &CacheDirs, _: &provision_kit::dirs::RuntimeDirs) -> bool {
    report::line("engine       this build provisions none");
    false
}

#[cfg(feature = "provisioning")]
async fn provisioning(
    config: &Config,
    cache: &CacheDirs,
    runtime: &provision_kit::dirs::RuntimeDirs,
) -> bool {
    use provisioners_engine_provisioner::preflight;

    let installs = config
        .pools
        .values()
        .all(|pool| pool.provision.allow_package_installs);
    let found = preflight(cache, installs).await;
    report::line("");
    report::line("To build an engine from source:");
    report::line(found.to_string().trim_end());
    models(config, cache, runtime).await;
    let engines = engines_at_hand(cache);
    report::line("");
    match engines.as_slice() {
        [] => report::line("Engines at hand: none; the first start provides one"),
        engines => {
            report::line("Engines at hand:");
            for engine in engines {
                report::line(format!("found    {}", engine.display()));
            }
        }
    }
    // An engine at hand needs no tools to build one.
    found.can_build() || !engines.is_empty()
}

#[cfg(feature = "provisioning")]
async fn models(config: &Config, cache: &CacheDirs, runtime: &provision_kit::dirs::RuntimeDirs) {
    use std::sync::Arc;

    use provision_kit::progress::Silent;
    use provisioners_model_provisioner::ModelProvisioner;

    report::line("");
    let provisioner =
        ModelProvisioner::new(config.models.clone(), cache, runtime, Arc::new(Silent));
    let listed = match provisioner {
        Ok(provisioner) => provisioner.list().await,
        Err(error) => Err(error),
    };
    match listed {
        Ok(models) if models.is_empty() => {
            report::line("Models at hand: none; the first start fetches what it needs");
        }
        Ok(models) => {
            report::line("Models at hand:");
            for model in models {
                let names: Vec<_> = model.references.iter().map(String::as_str).collect();
                let mib = model.stamp.size_bytes / (1 << 20);
                report::line(format!(
                    "found    {} ({mib} MiB, {})",
                    names.join(", "),
                    model.digest
                ));
            }
        }
        Err(error) => report::line(format!(
            "Models at hand: {}",
            provision_kit::chain::one_line(&error)
        )),
    }
}

/// Engines that were provided here before, and the one on PATH.
#[cfg(feature = "provisioning")]
fn engines_at_hand(cache: &CacheDirs) -> Vec<std::path::PathBuf> {
    let system = provisioners_engine_provisioner::machine::find_on_path("llama-server");
    let entries = std::fs::read_dir(cache.engines()).into_iter().flatten();
    let cached = entries.filter_map(Result::ok).map(|entry| entry.path());
    let whole = cached.filter(|dir| dir.join("manifest.json").exists());
    system
        .into_iter()
        .chain(whole.map(|dir| dir.join("llama-server")))
        .collect()
}
