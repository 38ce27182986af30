//! The way from a command to a daemon that runs: where it is, with which token
//! it is asked, and what its answers mean.

mod stream;

use std::path::PathBuf;
use std::time::Duration;

use llama_orch_types::Hinted;
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Context;
use super::serve::Listening;
use crate::api::error::ErrorBody;
use crate::app::bootstrap::StartError;
use crate::app::config::Config;
use crate::app::env;
use crate::services::event_log::Failure;

/// How long the daemon may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// For requests that say nothing beyond their address.
pub(super) const NO_BODY: Option<&()> = None;

/// Why the daemon was not asked, or what it refused.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("the configuration does not say where the daemon is")]
    Setup(#[source] StartError),
    #[error("no daemon runs here: there is no {}", .path.display())]
    NoDaemon { path: PathBuf },
    #[error("{} does not say where the daemon is", .path.display())]
    Presence {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
    #[error("the daemon at {url} did not answer")]
    Ask {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    #[error("the daemon at {url} says nothing any more")]
    Silent { url: String },
    #[error("the daemon at {url} wants another token")]
    Refused { url: String },
    #[error("the daemon at {url} answered with {status} and not as this version does")]
    Unknown { url: String, status: StatusCode },
    #[error("{}", .0.message)]
    Failure(Box<Failure>),
}

impl Hinted for ClientError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Setup(error) => error.hint(),
            Self::NoDaemon { .. } | Self::Presence { .. } => Some(
                "run this where the daemon was started, give it the same --config or --runtime-dir, or name it with --url"
                    .to_owned(),
            ),
            Self::Ask { .. } | Self::Silent { .. } => Some("see whether it runs, or name it with --url".to_owned()),
            Self::Refused { .. } => Some(format!(
                "set {} to the token that is in force, or send the daemon SIGHUP",
                env::TOKEN
            )),
            Self::Unknown { .. } => None,
            Self::Failure(failure) => failure.hint.clone(),
        }
    }
}

/// The daemon to be asked.
pub(super) struct Daemon {
    url: String,
    client: reqwest::Client,
    /// The tokens that may be the right one: a reload can change it.
    tokens: Vec<String>,
}

impl Daemon {
    /// The one at `url`, or the one that uses the configured runtime directory.
    pub(super) fn find(context: &Context, url: Option<&str>) -> Result<Self, ClientError> {
        let loaded = context.source.load();
        let (url, config) = match (url, loaded) {
            (Some(url), loaded) => {
                let url = url.trim_end_matches('/').to_owned();
                (url, loaded.map(|loaded| loaded.config).unwrap_or_default())
            }
            (None, Ok(loaded)) => (listening(&loaded.config)?, loaded.config),
            // A wrong file ends here: it says where the daemon is.
            (None, Err(error)) => return Err(ClientError::Setup(StartError::Setup(error))),
        };
        let from_env = std::env::var(env::TOKEN).ok();
        // One that cannot be read is left to the daemon to complain about.
        let from_file = config.token(None).ok().flatten();
        let from_file = from_file.map(|token| token.reveal().to_owned());
        // Without a proxy: the daemon is on this machine or named.
        let client = reqwest::Client::builder()
            .no_proxy()
            .timeout(ANSWER_LIMIT)
            .build()
            .map_err(|source| ClientError::Ask {
                url: url.clone(),
                source,
            })?;
        Ok(Self {
            url,
            client,
            tokens: from_env.into_iter().chain(from_file).collect(),
        })
    }

    /// Asks `path` with each token until one is right.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let tokens = self.tokens.iter().map(Some);
        let none = self.tokens.is_empty().then_some(None);
        for token in tokens.chain(none) {
            let request = self.request(method.clone(), path, token, body);
            let failed = |source| self.failed(source);
            let response = request.send().await.map_err(failed)?;
            let status = response.status();
            if status == StatusCode::UNAUTHORIZED {
                continue;
            }
            let bytes = response.bytes().await.map_err(failed)?;
            let unknown = |_| ClientError::Unknown {
                url: self.url.clone(),
                status,
            };
            return if status.is_success() {
                serde_json::from_slice(&bytes).map_err(unknown)
            } else {
                let body: ErrorBody = serde_json::from_slice(&bytes).map_err(unknown)?;
                Err(ClientError::Failure(Box::new(body.error)))
            };
        }
        Err(ClientError::Refused {
            url: self.url.clone(),
        })
    }
}

impl Daemon {
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        token: Option<&String>,
        body: Option<&impl Serialize>,
    ) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        request
    }

    fn failed(&self, source: reqwest::Error) -> ClientError {
        ClientError::Ask {
            url: self.url.clone(),
            // It would name the whole route.
            source: source.without_url(),
        }
    }
}

/// The user's text as one part of a path: it names no other route.
pub(super) fn encoded(text: &str) -> String {
    let byte = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(byte).collect()
}

/// Where the daemon listens that uses the configured runtime directory.
fn listening(config: &Config) -> Result<String, ClientError> {
    let path = Listening::path(config).map_err(ClientError::Setup)?;
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Err(ClientError::NoDaemon { path });
    };
    // What a power cut may leave of it.
    if text.trim_matches(['\0', ' ', '\n']).is_empty() {
        return Err(ClientError::NoDaemon { path });
    }
    let listening: Listening =
        serde_json::from_str(&text).map_err(|source| ClientError::Presence { path, source })?;
    Ok(reachable(&listening.url))
}

/// A daemon that listens on every address is reached on the loopback one.
fn reachable(url: &str) -> String {
    url.replace("//0.0.0.0:", "//127.0.0.1:")
        .replace("//[::]:", "//[::1]:")
}
