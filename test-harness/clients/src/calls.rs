//! Chat calls as any client makes them, and the tasks that they were.

use std::time::Duration;

use reqwest::{Client, Response, StatusCode};
use serde_json::{Value, json};
use test_harness_e2e_haiku::client::Api;

/// For one call, with all that it waits for.
const LIMIT: Duration = Duration::from_mins(2);

pub fn request(pool: &str, prompt: &str, max_tokens: u32, stream: bool) -> Value {
    json!({
        "model": pool,
        "messages": [{ "role": "user", "content": prompt }],
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    })
}

/// What came, and the id of the task that it came from.
#[derive(Debug)]
pub struct Answer {
    pub text: String,
    pub task: String,
}

/// The answer's head: its body is still to come.
pub async fn begin(http: &Client, url: &str, body: &Value) -> Response {
    let post = http.post(format!("{url}/v1/chat/completions")).json(body);
    let answer = post.timeout(LIMIT).send().await;
    answer.unwrap_or_else(|error| panic!("{body}: {error:?}"))
}

/// The id of the task behind an answer.
pub fn task_of(answer: &Response) -> String {
    let task = answer.headers().get("X-Task-Id");
    let task = task.and_then(|id| id.to_str().ok()).map(str::to_owned);
    task.unwrap_or_else(|| panic!("every answer names its task: {answer:?}"))
}

/// A call that must be answered, and answered whole.
pub async fn ask(http: &Client, url: &str, body: &Value) -> Answer {
    let answer = begin(http, url, body).await;
    let (status, task) = (answer.status(), task_of(&answer));
    let said = answer.text().await;
    let said = said.unwrap_or_else(|error| panic!("{body}: {error:?}"));
    assert_eq!(status, StatusCode::OK, "{body}: {said}");
    let text = if body["stream"] == true {
        streamed(&said)
    } else {
        let answer: Value = serde_json::from_str(&said).expect("an answer is JSON");
        content(&answer["choices"][0]["message"])
    };
    Answer { text, task }
}

/// A task as the daemon shows it.
pub async fn shown(api: &Api, task: &str) -> Value {
    api.json(&format!("/v2/tasks/{task}")).await
}

fn content(message: &Value) -> String {
    message["content"].as_str().unwrap_or_default().to_owned()
}

/// The text of a stream, which must be whole.
fn streamed(said: &str) -> String {
    assert!(said.trim_end().ends_with("data: [DONE]"), "no end: {said}");
    let events = said.lines().filter_map(|line| line.strip_prefix("data: "));
    let chunks = events.filter_map(|data| serde_json::from_str::<Value>(data).ok());
    chunks
        .map(|chunk| content(&chunk["choices"][0]["delta"]))
        .collect()
}
