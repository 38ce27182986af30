//! Requests to one server, and how their failures are told apart.

use std::time::Duration;

use bytes::Bytes;
use provision_kit::chain::one_line;
use reqwest::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER,
};
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use worker_adapters_adapter_api::{TimeoutPhase, WorkerError};
use worker_adapters_llamacpp_http::body;

use crate::settings::{Endpoint, Waits};
use crate::wire;

const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
/// How much of a failure's body is read.
const FAILURE_LIMIT: usize = 64 << 10;

/// A client for one server. Connections are kept and used again.
#[derive(Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    pub(crate) endpoint: Endpoint,
    pub(crate) waits: Waits,
}

impl Client {
    pub(crate) fn new(mut endpoint: Endpoint, waits: Waits) -> Result<Self, WorkerError> {
        let length = endpoint.url.trim_end_matches('/').len();
        endpoint.url.truncate(length);
        let mut headers = HeaderMap::new();
        if let Some(bearer) = &endpoint.bearer {
            let value = HeaderValue::from_str(&format!("Bearer {}", bearer.reveal()));
            let mut value = value.map_err(|_| WorkerError::InvalidParams {
                message: format!(
                    "the token for {} holds characters that no HTTP header may hold",
                    endpoint.url
                ),
            })?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = reqwest::Client::builder()
            .default_headers(headers)
            // The server is where the configuration says; nothing may redirect the
            // token elsewhere.
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .tcp_nodelay(true)
            .connect_timeout(waits.connect)
            .build()
            .map_err(|error| WorkerError::Unreachable {
                url: endpoint.url.clone(),
                source: error.without_url().into(),
            })?;
        Ok(Self {
            http,
            endpoint,
            waits,
        })
    }

    /// Sends a task. The server may answer only with its first token, so the caller
    /// sets the limit on the time.
    pub(crate) async fn open(
        &self,
        path: &'static str,
        body: Bytes,
        correlation_id: Option<HeaderValue>,
    ) -> Result<Response, WorkerError> {
        let mut request = self.post(path, body);
        if let Some(id) = correlation_id {
            request = request.header(CORRELATION_ID, id);
        }
        self.send(path, request).await
    }

    /// A question with a short answer.
    pub(crate) async fn get(&self, path: &str) -> Result<Vec<u8>, WorkerError> {
        let request = self.request(Method::GET, path).timeout(self.waits.response);
        let response = self.send(path, request).await?;
        self.body(response).await
    }

    /// The same with a body, answered within `limit`.
    pub(crate) async fn ask(
        &self,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Vec<u8>, WorkerError> {
        let request = self.post(path, body).timeout(limit);
        let response = self.send(path, request).await?;
        self.body(response).await
    }

    /// The response if its status is a success, otherwise what it means.
    async fn send(&self, path: &str, request: RequestBuilder) -> Result<Response, WorkerError> {
        let mut response = request.send().await.map_err(|error| self.failure(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let after = response.headers().get(RETRY_AFTER);
        let after = after.and_then(|after| after.to_str().ok()?.trim().parse().ok());
        let mut body = Vec::new();
        let read = async {
            while let Ok(Some(chunk)) = response.chunk().await {
                let room = FAILURE_LIMIT - body.len();
                body.extend_from_slice(&chunk[..chunk.len().min(room)]);
                if body.len() == FAILURE_LIMIT {
                    break;
                }
            }
        };
        // What has not come by then is not waited for: the status says enough.
        let _ = tokio::time::timeout(self.waits.response, read).await;
        Err(wire::refusal(
            &self.endpoint,
            path,
            status.as_u16(),
            after,
            &body,
        ))
    }

    pub(crate) async fn body(&self, response: Response) -> Result<Vec<u8>, WorkerError> {
        body::whole(response, |error| self.failure(error)).await
    }

    /// What a broken request or a broken answer means.
    pub(crate) fn failure(&self, error: reqwest::Error) -> WorkerError {
        let error = error.without_url();
        match (error.is_connect(), error.is_timeout()) {
            (true, true) => WorkerError::Timeout {
                phase: TimeoutPhase::Connect,
                after: self.waits.connect,
            },
            (true, false) => WorkerError::Unreachable {
                url: self.endpoint.url.clone(),
                source: error.into(),
            },
            (false, true) => WorkerError::Timeout {
                phase: TimeoutPhase::Response,
                after: self.waits.response,
            },
            (false, false) => WorkerError::Reset {
                reason: one_line(&error),
            },
        }
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.endpoint.url))
    }

    fn post(&self, path: &str, body: Bytes) -> RequestBuilder {
        self.request(Method::POST, path)
            .header(CONTENT_TYPE, "application/json")
            .body(body)
    }
}

pub(crate) fn encode(body: &impl Serialize) -> Result<Bytes, WorkerError> {
    serde_json::to_vec(body)
        .map(Bytes::from)
        .map_err(|error| WorkerError::InvalidParams {
            message: format!("the request cannot be written as JSON: {error}"),
        })
}
