//! The front door for clients of `OpenAI`'s and Anthropic's APIs. The daemon is a
//! real process, and so is the (fake) engine.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails, and says what it saw"
)]

#[path = "../support/mod.rs"]
mod support;

mod answers;
mod errors;
mod leaving;
mod models;
mod waiting;

use std::pin::Pin;

use futures::{Stream, StreamExt};
use reqwest::Response;
use serde_json::{Value, json};
use support::{DEADLINE, Daemon};

/// A conversation that wants so many tokens.
fn chat(max_tokens: u64) -> Value {
    json!({ "model": "default", "messages": [{"role": "user", "content": "hi there"}], "max_tokens": max_tokens })
}

fn streamed(mut body: Value) -> Value {
    body["stream"] = true.into();
    body
}

/// One event of a stream, or a comment in it.
#[derive(Debug, Clone, PartialEq)]
enum Piece {
    Comment(String),
    Event { name: Option<String>, data: String },
}

impl Piece {
    fn parse(block: &str) -> Self {
        if let Some(comment) = block.strip_prefix(": ") {
            return Self::Comment(comment.to_owned());
        }
        let (mut name, mut data) = (None, Vec::new());
        for line in block.lines() {
            match line.split_once(": ").unwrap() {
                ("event", text) => name = Some(text.to_owned()),
                ("data", text) => data.push(text.to_owned()),
                _ => panic!("{block:?}"),
            }
        }
        let data = data.join("\n");
        Self::Event { name, data }
    }

    fn data(&self) -> Value {
        match self {
            Self::Event { data, .. } => serde_json::from_str(data).unwrap(),
            Self::Comment(_) => panic!("{self:?} has no data"),
        }
    }
}

/// A stream that is read piece by piece.
struct Reading {
    body: Pin<Box<dyn Stream<Item = reqwest::Result<bytes::Bytes>> + Send>>,
    buffer: String,
}

impl Reading {
    fn of(response: Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            body: Box::pin(response.bytes_stream()),
            buffer: String::new(),
        }
    }

    async fn next(&mut self) -> Option<Piece> {
        loop {
            if let Some((block, rest)) = self.buffer.split_once("\n\n") {
                let (piece, rest) = (Piece::parse(block), rest.to_owned());
                self.buffer = rest;
                return Some(piece);
            }
            let more = tokio::time::timeout(DEADLINE, self.body.next()).await;
            let more = more.expect("the stream never went on")?.unwrap();
            self.buffer.push_str(std::str::from_utf8(&more).unwrap());
        }
    }

    /// All that is left but comments.
    async fn rest(mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while let Some(piece) = self.next().await {
            if !matches!(piece, Piece::Comment(_)) {
                pieces.push(piece);
            }
        }
        pieces
    }
}

async fn status_of(daemon: &Daemon, task: &str) -> Value {
    daemon.get_json(&format!("/v2/tasks/{task}")).await["status"].clone()
}

async fn until_status(daemon: &Daemon, task: &str, status: &str) {
    daemon
        .until(&format!("the task is {status}"), async || {
            (status_of(daemon, task).await == status).then_some(())
        })
        .await;
}

fn task_of(response: &Response) -> String {
    response.headers()["x-task-id"].to_str().unwrap().to_owned()
}

/// Waits until so many tasks run.
async fn until_running(daemon: &Daemon, count: u64) {
    daemon
        .until("tasks run", async || {
            (daemon.pool().await["running"] == count).then_some(())
        })
        .await;
}
