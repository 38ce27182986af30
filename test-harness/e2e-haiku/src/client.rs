//! Asks a daemon, or an engine, over HTTP.

use std::time::{Duration, Instant};

use reqwest::{Client, Response, StatusCode};
use serde_json::Value;

use crate::sse::Reader;

const ANSWER_LIMIT: Duration = Duration::from_mins(1);

/// A base URL and a way to ask below it.
#[derive(Debug, Clone)]
pub struct Api {
    client: Client,
    url: String,
}

impl Api {
    pub fn new(url: impl Into<String>) -> Self {
        let client = Client::builder().no_proxy().build();
        Self {
            client: client.expect("a client without settings can be made"),
            url: url.into(),
        }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// The answer to a GET, whatever its status; `None` if nobody answers.
    pub async fn try_get(&self, path: &str) -> Option<(StatusCode, String)> {
        let request = self
            .client
            .get(format!("{}{path}", self.url))
            .timeout(ANSWER_LIMIT);
        let response = request.send().await.ok()?;
        let status = response.status();
        Some((status, response.text().await.ok()?))
    }

    /// A GET that must be answered with 200 and text.
    pub async fn text(&self, path: &str) -> String {
        let answer = self.try_get(path).await;
        match answer {
            Some((StatusCode::OK, text)) => text,
            other => panic!("GET {}{path}: 200 expected, {other:?} seen", self.url),
        }
    }

    /// A GET that must be answered with 200 and JSON.
    pub async fn json(&self, path: &str) -> Value {
        let text = self.text(path).await;
        serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("GET {path}: no JSON ({error}): {text}"))
    }

    /// A POST that must be answered with JSON, whatever its status.
    pub async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self.send(path, body).await;
        let status = response.status();
        let text = response.text().await.expect("the answer's body comes");
        let json = serde_json::from_str(&text);
        let json =
            json.unwrap_or_else(|error| panic!("POST {path}: {status}, no JSON ({error}): {text}"));
        (status, json)
    }

    async fn send(&self, path: &str, body: &Value) -> Response {
        let request = self.client.post(format!("{}{path}", self.url)).json(body);
        let response = request.timeout(ANSWER_LIMIT).send().await;
        response.unwrap_or_else(|error| panic!("POST {}{path}: {error:?}", self.url))
    }

    /// A task that must be admitted.
    pub async fn submit(&self, task: &Value) -> Value {
        let (status, admission) = self.post("/v2/tasks", task).await;
        assert_eq!(
            status,
            StatusCode::ACCEPTED,
            "POST /v2/tasks {task}: {admission:#}"
        );
        admission
    }

    /// A task's events, from the one after `last_event_id` on.
    pub async fn events(&self, admission: &Value, last_event_id: Option<u64>) -> Reader {
        let path = admission["streams"]["sse"].as_str();
        let path = path.unwrap_or_else(|| panic!("no streams.sse in {admission:#}"));
        let mut request = self.client.get(format!("{}{path}", self.url));
        if let Some(id) = last_event_id {
            request = request.header("Last-Event-ID", id);
        }
        let asked = Instant::now();
        let response = request
            .send()
            .await
            .unwrap_or_else(|error| panic!("GET {path}: {error:?}"));
        assert_eq!(response.status(), StatusCode::OK, "GET {path}");
        let kind = response
            .headers()
            .get("content-type")
            .and_then(|kind| kind.to_str().ok());
        assert_eq!(kind, Some("text/event-stream"), "GET {path}");
        Reader::new(response, asked)
    }
}
