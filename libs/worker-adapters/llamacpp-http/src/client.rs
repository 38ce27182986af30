//! Single requests to the engine, and how their failures are told apart.

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use worker_adapters_adapter_api::{TimeoutPhase, WorkerError};

use crate::body;
use crate::http::{self, HttpError, Target};
use crate::incoming::Incoming;
use crate::settings::AdapterSettings;
use crate::wire::{self, ProbeAnswer, ProbeEmbedding, ProbeRequest};

/// The engine closes a quiet connection after five seconds. Letting go a
/// little earlier, no request meets a connection that is just being closed.
const IDLE_CONNECTION: Duration = Duration::from_secs(4);
/// Each quiet connection holds one of the engine's few threads.
const IDLE_CONNECTIONS: usize = 2;
/// Pauses before a request that the engine did not take is sent again.
const RETRY_PAUSES: [Duration; 2] = [Duration::from_millis(50), Duration::from_millis(250)];

/// What the engine is asked for a sign of life: any text that is a token.
const PROBE: ProbeRequest = ProbeRequest {
    prompt: "a",
    n_predict: 1,
    cache_prompt: false,
};
const PROBE_EMBEDDING: ProbeEmbedding = ProbeEmbedding { content: "a" };

/// A client for one engine process. Connections are kept and used again, but
/// for streams: those are read from connections of their own.
#[derive(Debug)]
pub(crate) struct EngineClient {
    http: reqwest::Client,
    /// How streams are read without a connection's task between; `None` where that
    /// takes more than plain HTTP.
    direct: Option<Target>,
    pub(crate) settings: AdapterSettings,
}

impl EngineClient {
    pub(crate) fn new(mut settings: AdapterSettings) -> Result<Self, WorkerError> {
        let length = settings.base_url.trim_end_matches('/').len();
        settings.base_url.truncate(length);
        let mut headers = HeaderMap::new();
        if let Some(bearer) = &settings.bearer {
            let mut value =
                HeaderValue::from_str(&format!("Bearer {}", bearer.expose())).map_err(|_| {
                    WorkerError::InvalidParams {
                        message: "the API key holds characters that no HTTP header may hold"
                            .to_owned(),
                    }
                })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let direct = Target::of(&settings.base_url, headers.get(AUTHORIZATION))
            .map(|target| target.with_delayed_acks(settings.delayed_acks));
        let mut builder = reqwest::Client::builder();
        if settings.base_url.starts_with("http://") {
            // Plain HTTP needs no certificates: to read a machine's takes longer than an engine's
            // first token, which waits for it.
            builder = builder.tls_certs_only([]);
        }
        let http = builder
            .default_headers(headers)
            // The engine is where the context says; no variable may redirect us.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true)
            .connect_timeout(settings.connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION)
            .pool_max_idle_per_host(IDLE_CONNECTIONS)
            .build()
            .map_err(|error| WorkerError::Unreachable {
                url: settings.base_url.clone(),
                source: error.without_url().into(),
            })?;
        Ok(Self {
            http,
            direct,
            settings,
        })
    }

    pub(crate) fn url(&self) -> &str {
        &self.settings.base_url
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, WorkerError> {
        let timeout = self.settings.response_timeout;
        self.get_within(path, timeout).await
    }

    pub(crate) async fn get_within<T: DeserializeOwned>(
        &self,
        path: &str,
        timeout: Duration,
    ) -> Result<T, WorkerError> {
        let request = self.request(Method::GET, path).timeout(timeout);
        self.json(request, path).await
    }

    /// A question that changes nothing, so it may be asked again.
    pub(crate) async fn ask<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, WorkerError> {
        let body = encode(body)?;
        self.retrying(|| self.ask_once(path, body.clone())).await
    }

    async fn ask_once<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Bytes,
    ) -> Result<T, WorkerError> {
        let request = self
            .post(path, body)
            .timeout(self.settings.response_timeout);
        self.json(request, path).await
    }

    /// Opens a completion's stream. The engine may answer only when it has its
    /// first token, so the caller sets the limit on the time.
    pub(crate) async fn open_completion(&self, body: Bytes) -> Result<Incoming, WorkerError> {
        let opened =
            self.retrying(|| async { self.open_stream("/completion", body.clone()).await? });
        opened.await
    }

    /// Opens the stream of a call's answer.
    pub(crate) async fn open_streamed_call(
        &self,
        path: &str,
        body: Bytes,
    ) -> Result<Incoming, WorkerError> {
        let opened = self.retrying(|| async {
            let opened = self.open_stream(path, body.clone()).await?;
            failed_itself(opened)
        });
        match opened.await? {
            Ok(incoming) => Ok(incoming),
            Err(reason) => Err(self.whose_fault(reason).await),
        }
    }

    /// The inner error is a refusal, the outer one a connection that failed. The
    /// engine closes the connection after a stream without saying so, and the next
    /// request on it would be lost: none is sent.
    async fn open_stream(
        &self,
        path: &str,
        body: Bytes,
    ) -> Result<Result<Incoming, WorkerError>, WorkerError> {
        let Some(target) = &self.direct else {
            let request = self.post(path, body).header(CONNECTION, "close");
            let sent = request.send().await.map_err(|error| self.failure(error))?;
            let accepted = self.accepted(sent).await;
            return Ok(accepted.map(|response| Incoming::indirect(response.bytes_stream())));
        };
        let answer = http::send(target, path, body, self.settings.connect_timeout);
        let answer = answer.await.map_err(|error| self.unanswered(error))?;
        if (200..300).contains(&answer.status) {
            return Ok(Ok(Incoming::direct(answer.body)));
        }
        let reading = answer.body.short(body::LIMIT);
        let body = tokio::time::timeout(self.settings.response_timeout, reading).await;
        let body = body.unwrap_or_default();
        Ok(Err(wire::refusal(answer.status, &body, self.url())))
    }

    /// What it means that a request over its own connection has no answer.
    fn unanswered(&self, error: HttpError) -> WorkerError {
        match error {
            HttpError::ConnectTimeout => WorkerError::Timeout {
                phase: TimeoutPhase::Connect,
                after: self.settings.connect_timeout,
            },
            HttpError::Connect(_) => WorkerError::Unreachable {
                url: self.settings.base_url.clone(),
                source: error.into(),
            },
            error => WorkerError::Reset {
                reason: chain(&error),
            },
        }
    }

    /// A completion that streams nothing; tried once.
    async fn complete_within(&self, body: Bytes, limit: Duration) -> Result<Vec<u8>, WorkerError> {
        let request = self
            .post("/completion", body)
            .header(CONNECTION, "close")
            .timeout(limit);
        let sent = request.send().await.map_err(|error| self.failure(error))?;
        self.body(self.accepted(sent).await?).await
    }

    /// Opens a call's answer in one piece. `keep` is whether its connection may be
    /// used again: one that goes away is how the engine learns that a client of a
    /// generating call has gone.
    pub(crate) async fn open_call(
        &self,
        path: &str,
        body: Bytes,
        keep: bool,
    ) -> Result<Response, WorkerError> {
        let opened = self.retrying(|| async {
            let mut request = self.post(path, body.clone());
            if !keep {
                request = request.header(CONNECTION, "close");
            }
            let sent = request.send().await.map_err(|error| self.failure(error))?;
            failed_itself(self.accepted(sent).await)
        });
        match opened.await? {
            Ok(response) => Ok(response),
            Err(reason) => Err(self.whose_fault(reason).await),
        }
    }

    /// The engine says that it failed itself where a client's request is at fault as
    /// well: seen of b11434 with `tools` that are no list, with an image for a model
    /// that sees none, and with Anthropic's `messages` left out. An engine that
    /// still generates a token is sound, and no client may cost it its life.
    async fn whose_fault(&self, reason: String) -> WorkerError {
        let limit = self.settings.first_token_timeout / 2;
        match self.probe(limit).await {
            Ok(()) => WorkerError::InvalidParams { message: reason },
            Err(error) => {
                tracing::debug!(%error, "the engine failed a call, and a probe after it");
                WorkerError::Reset { reason }
            }
        }
    }

    /// Has the engine generate one token that nobody reads. One that only embeds or
    /// ranks refuses that, and is asked for an embedding.
    pub(crate) async fn probe(&self, limit: Duration) -> Result<(), WorkerError> {
        let asked = async {
            match self.complete_within(encode(&PROBE)?, limit).await {
                Err(WorkerError::InvalidParams { .. }) => {
                    let body = encode(&PROBE_EMBEDDING)?;
                    let request = self.post("/embedding", body).timeout(limit);
                    self.json::<IgnoredAny>(request, "/embedding").await?;
                    Ok(())
                }
                body => match serde_json::from_slice(&body?) {
                    Ok(ProbeAnswer { stop: true }) => Ok(()),
                    Ok(_) => Err(WorkerError::Protocol {
                        what: "a probe's answer that does not end".to_owned(),
                    }),
                    Err(error) => Err(WorkerError::Protocol {
                        what: format!("a probe's answer that cannot be read: {error}"),
                    }),
                },
            }
        };
        tokio::time::timeout(limit, asked)
            .await
            .map_err(|_| WorkerError::Timeout {
                phase: TimeoutPhase::Response,
                after: limit,
            })?
    }

    /// The status of `/health`; every status is an answer.
    pub(crate) async fn health_status(&self) -> Result<StatusCode, WorkerError> {
        let request = self
            .request(Method::GET, "/health")
            .timeout(self.settings.response_timeout);
        let response = request.send().await.map_err(|error| self.failure(error))?;
        Ok(response.status())
    }

    /// What a broken request or a broken answer means.
    pub(crate) fn failure(&self, error: reqwest::Error) -> WorkerError {
        let error = error.without_url();
        let settings = &self.settings;
        match (error.is_connect(), error.is_timeout()) {
            (true, true) => WorkerError::Timeout {
                phase: TimeoutPhase::Connect,
                after: settings.connect_timeout,
            },
            (true, false) => WorkerError::Unreachable {
                url: settings.base_url.clone(),
                source: error.into(),
            },
            (false, true) => WorkerError::Timeout {
                phase: TimeoutPhase::Response,
                after: settings.response_timeout,
            },
            (false, false) => WorkerError::Reset {
                reason: chain(&error),
            },
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}{path}", self.url()))
    }

    fn post(&self, path: &str, body: Bytes) -> RequestBuilder {
        self.request(Method::POST, path)
            .header(CONTENT_TYPE, "application/json")
            .body(body)
    }

    async fn json<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        path: &str,
    ) -> Result<T, WorkerError> {
        let sent = request.send().await.map_err(|error| self.failure(error))?;
        let body = self.body(self.accepted(sent).await?).await?;
        serde_json::from_slice(&body).map_err(|error| WorkerError::Protocol {
            what: format!("{path}: {error}"),
        })
    }

    /// The response if its status is a success, otherwise what it means.
    async fn accepted(&self, response: Response) -> Result<Response, WorkerError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let limit = self.settings.response_timeout;
        let body = tokio::time::timeout(limit, self.body(response)).await;
        let body = body.ok().and_then(Result::ok).unwrap_or_default();
        Err(wire::refusal(status.as_u16(), &body, self.url()))
    }

    /// The whole body of a response, within the limit on its size.
    pub(crate) async fn body(&self, response: Response) -> Result<Vec<u8>, WorkerError> {
        body::whole(response, |error| self.failure(error)).await
    }

    /// Tries again, a bounded number of times, what the engine never took:
    /// the connection was refused, or the model was still loading.
    async fn retrying<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, WorkerError>
    where
        F: Future<Output = Result<T, WorkerError>>,
    {
        for pause in RETRY_PAUSES {
            match attempt().await {
                Err(error @ (WorkerError::Unreachable { .. } | WorkerError::Loading { .. })) => {
                    tracing::debug!(%error, pause_ms = pause.as_millis(), "asking the engine again");
                    tokio::time::sleep(pause).await;
                }
                outcome => return outcome,
            }
        }
        attempt().await
    }
}

/// Sets apart the engine's word that it failed by its own fault, as the inner error.
fn failed_itself<T>(opened: Result<T, WorkerError>) -> Result<Result<T, String>, WorkerError> {
    match opened {
        Err(WorkerError::Reset { reason }) => Ok(Err(reason)),
        outcome => outcome.map(Ok),
    }
}

pub(crate) fn encode(body: &impl Serialize) -> Result<Bytes, WorkerError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|error| WorkerError::InvalidParams {
            message: format!("the request cannot be written as JSON: {error}"),
        })
}

/// An error and its causes in one line, for texts that keep no source.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
