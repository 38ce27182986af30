//! The source of a git tag.

use std::path::Path;
use std::time::Duration;

use provision_kit::download::display_url;
use provision_kit::process::{self, CommandSpec, DeathSignal, ProcessError};

use crate::config::GitSource;
use crate::error::EngineError;
use crate::machine::distribution::{Distribution, Need};

/// Longest that git may take to fetch one commit's tree.
const GIT_LIMIT: Duration = Duration::from_mins(30);

/// Clones the tag's commit into `target/tree`, and checks which commit that is, where the source
/// says it. `what` is the source in words.
pub(super) async fn clone_tag(
    source: &GitSource,
    what: String,
    target: &Path,
) -> Result<(), EngineError> {
    let git = |arguments: &[&str]| {
        let spec = CommandSpec::new("git")
            .args(["-c", "advice.detachedHead=false"])
            .args(arguments)
            // Never ask anybody for a password.
            .env("GIT_TERMINAL_PROMPT", "0")
            // What it says is read.
            .env("LC_ALL", "C")
            .death_signal(DeathSignal::Terminate);
        process::output(spec, GIT_LIMIT)
    };
    let failed = |error| not_run(what.clone(), error);
    let place = target.join("tree");
    let place = place.to_string_lossy();
    let clone = [
        "clone",
        "--quiet",
        "--depth",
        "1",
        "--branch",
        &source.tag,
        "--",
        &source.url,
        &place,
    ];
    let output = git(&clone).await.map_err(failed)?;
    if !output.status.success() {
        // What git says may repeat the URL, query and all.
        let said = output.stderr.trim();
        return Err(EngineError::SourceGit {
            what,
            reason: said.replace(&source.url, &display_url(&source.url)),
        });
    }
    let Some(commit) = &source.commit else {
        return Ok(());
    };
    let output = git(&["-C", &place, "rev-parse", "HEAD"])
        .await
        .map_err(failed)?;
    match output.stdout.trim() {
        found if found == commit => Ok(()),
        found => Err(EngineError::SourceCommit {
            what,
            expected: commit.clone(),
            found: found.to_owned(),
        }),
    }
}

fn not_run(what: String, error: ProcessError) -> EngineError {
    if error.is_not_found() {
        return EngineError::NoGit {
            what,
            install: Distribution::here().install_command(Need::Git),
        };
    }
    EngineError::GitCommand {
        what,
        source: error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use llama_orch_types::Hinted as _;

    #[tokio::test]
    async fn a_missing_git_is_told_from_a_missing_network() {
        let missing = process::output(CommandSpec::new("/nowhere/git"), GIT_LIMIT)
            .await
            .unwrap_err();
        let error = not_run("git tag b1".into(), missing);
        assert!(matches!(error, EngineError::NoGit { .. }), "{error}");
        assert!(error.hint().unwrap().contains("git"));
        assert!(!error.retriable());
    }
}
