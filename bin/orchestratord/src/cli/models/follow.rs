//! A daemon's work, shown as if it were done here.

use std::sync::Arc;

use futures::future::join_all;
use provision_kit::progress::{Reporter, Step, StepKind, Unit};
use reqwest::Method;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::ModelsError;
use super::way::Pulled;
use crate::api::catalog::pulls::PullRequest;
use crate::api::catalog::verify::VerifyRequest;
use crate::api::catalog::view::VerifiedView;
use crate::app::config::shown_model;
use crate::cli::Context;
use crate::cli::client::{ClientError, Daemon, NO_BODY};
use crate::services::event_log::Failure;
use crate::services::pulls::PullView;
use crate::services::watched::{Progress, WorkState};
use crate::ui::progress_reporter;

/// A daemon, and where its progress is shown.
pub(super) struct Follower {
    pub(super) daemon: Daemon,
    reporter: Arc<dyn Reporter>,
    /// Whether the daemon has the files that are here.
    is_here: bool,
}

impl Follower {
    pub(super) fn new(context: &Context, daemon: Daemon, is_here: bool) -> Self {
        let reporter = progress_reporter(context.log_format, &context.bars);
        Self {
            daemon,
            reporter,
            is_here,
        }
    }

    /// Has all of them pulled and, unless somebody will not wait, watches.
    pub(super) async fn pull_all(
        &self,
        references: &[String],
        no_wait: bool,
    ) -> Vec<Result<Pulled, ModelsError>> {
        let mut begun = Vec::new();
        for reference in references {
            let request = PullRequest {
                model: if self.is_here {
                    from_anywhere(reference)
                } else {
                    reference.clone()
                },
            };
            let pull =
                self.daemon
                    .ask::<PullView>(Method::POST, "/v2/catalog/pulls", Some(&request));
            begun.push(pull.await.map_err(ModelsError::from));
        }
        let all = begun.into_iter().map(async |pull| {
            let pull = pull?;
            if no_wait {
                return Ok(pulled(pull));
            }
            self.watch(&pull).await
        });
        join_all(all).await
    }

    async fn watch(&self, pull: &PullView) -> Result<Pulled, ModelsError> {
        let what = format!("model {}", pull.model);
        let mut step = self.step(what, pull.progress.total_bytes);
        if let Some(ahead) = pull.queue_position {
            step.note(format!(
                "{} waits until others are done; {ahead} go first",
                pull.model
            ));
        }
        let ended: Result<Option<PullView>, ModelsError> = self
            .end_of(Method::GET, &pull.events, NO_BODY, &mut step)
            .await;
        match ended {
            Ok(Some(end)) if end.progress.state == WorkState::Done => {
                step.finish();
                Ok(pulled(end))
            }
            Ok(Some(end)) => {
                step.fail("cancelled");
                Err(ModelsError::Cancelled { model: end.model })
            }
            Ok(None) => {
                step.fail("the daemon ended");
                let model = pull.model.clone();
                Err(ModelsError::LeftAlone { model })
            }
            Err(error) => {
                step.fail(error.to_string());
                Err(error)
            }
        }
    }

    pub(super) async fn verify(
        &self,
        path: &str,
        name: &str,
        repair: bool,
    ) -> Result<VerifiedView, ModelsError> {
        let name = shown_model(name);
        let mut step = self.step(format!("verifying the model {name}"), None);
        let request = VerifyRequest { repair };
        let ended = self.end_of(Method::POST, path, Some(&request), &mut step);
        match ended.await {
            Ok(Some(verified)) => {
                step.finish();
                Ok(verified)
            }
            Ok(None) => {
                step.fail("the daemon ended");
                Err(ModelsError::NotRead { model: name })
            }
            Err(error) => {
                step.fail(error.to_string());
                Err(error)
            }
        }
    }

    fn step(&self, what: String, total: Option<u64>) -> Step {
        Step::start(
            &self.reporter,
            StepKind::ModelFetch,
            what,
            Unit::Bytes,
            total,
        )
    }

    /// Follows a stream to its end; `None` if it ends before the work does.
    async fn end_of<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl serde::Serialize>,
        step: &mut Step,
    ) -> Result<Option<T>, ModelsError> {
        let mut events = self.daemon.events(method, path, body).await?;
        let mut said = None;
        while let Some((name, data)) = events.next().await? {
            match name.as_str() {
                "progress" => {
                    let progress: Progress = self.read(data)?;
                    if progress.state == WorkState::Running {
                        step.set(progress.bytes, progress.total_bytes);
                    }
                    if progress.note != said {
                        if let Some(note) = &progress.note {
                            step.note(note);
                        }
                        said = progress.note;
                    }
                }
                "done" => return Ok(Some(self.read(data)?)),
                "error" => {
                    let failure: Failure = self.read(data)?;
                    return Err(ModelsError::Failure(Box::new(failure)));
                }
                // A newer daemon may have more to say.
                _ => {}
            }
        }
        Ok(None)
    }

    fn read<T: DeserializeOwned>(&self, data: Value) -> Result<T, ClientError> {
        serde_json::from_value(data).map_err(|_| ClientError::Unknown {
            url: self.daemon.url().to_owned(),
            status: reqwest::StatusCode::OK,
        })
    }
}

/// A file's path as a daemon finds it, which works in another directory; any
/// other reference as it is.
fn from_anywhere(reference: &str) -> String {
    let reference = reference.trim();
    let (scheme, path) = match reference.strip_prefix("file:") {
        Some(path) => ("file:", path),
        None => ("", reference),
    };
    let before_colon = path.split(':').next().unwrap_or_default();
    let is_path = !scheme.is_empty()
        || path.starts_with('.')
        || before_colon.contains('/')
        || before_colon == path && path.to_ascii_lowercase().ends_with(".gguf");
    if !is_path || path.is_empty() || path.starts_with(['/', '~']) {
        return reference.to_owned();
    }
    let absolute = std::path::absolute(path);
    let absolute = absolute.ok().and_then(|it| it.to_str().map(str::to_owned));
    absolute.map_or_else(|| reference.to_owned(), |it| format!("{scheme}{it}"))
}

fn pulled(pull: PullView) -> Pulled {
    Pulled {
        model: pull.model,
        pull_id: Some(pull.pull_id),
        result: pull.result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_so_that_a_daemon_elsewhere_finds_them() {
        let here = std::env::current_dir().unwrap();
        let here = here.to_str().unwrap();
        for (given, sent) in [
            ("./m.gguf", format!("{here}/m.gguf")),
            ("m.GGUF", format!("{here}/m.GGUF")),
            ("../a/m", format!("{here}/../a/m")),
            ("a/m", format!("{here}/a/m")),
            ("file:m.gguf", format!("file:{here}/m.gguf")),
        ] {
            assert_eq!(from_anywhere(given), sent);
        }
        for same in [
            "haiku",
            "/m.gguf",
            "~/m.gguf",
            "file:/m.gguf",
            "file:///m.gguf",
            "file:",
            "hf:o/r/m.gguf",
            "https://host/m.gguf",
            "pip:p==1/m.gguf",
        ] {
            assert_eq!(from_anywhere(same), same);
        }
    }
}
