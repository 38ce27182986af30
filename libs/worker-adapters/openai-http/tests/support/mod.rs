//! Small servers in the test's own process that answer as they are told.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use llama_orch_types::TaskId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::JoinSet;
use worker_adapters_adapter_api::{
    CallApi, EngineCall, EngineTask, SamplingParams, TaskInput, TokenEvent, TokenStream,
    WorkerAdapter, WorkerError,
};
use worker_adapters_openai_http::{Endpoint, Replicas, Waits};

/// Bounds every wait; only reached by a fault.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    /// Method and path.
    pub(crate) line: String,
    /// In lower case.
    pub(crate) head: String,
    pub(crate) body: String,
}

/// What comes after a stream's events.
#[derive(Debug, Clone)]
pub(crate) enum After {
    End,
    /// The connection breaks, and the response is visibly incomplete.
    Cut,
    Hang,
    /// Nothing until the cancel came, then an error, and the client is waited out.
    Cancel(Cancel),
}

/// What a stream and the cancel of its task tell each other.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancel {
    came: Arc<Notify>,
    stream_gone: Arc<Notify>,
}

#[derive(Debug, Clone)]
pub(crate) enum Reply {
    /// Status, further header lines, body.
    Status(u16, String, String),
    /// Further header lines, events.
    Stream(String, Vec<String>, After),
    /// To a cancel: it is answered when the stream's client has gone.
    Cancelled(Cancel, String),
    Nothing,
}

impl Reply {
    pub(crate) fn ok(body: &str) -> Self {
        Self::Status(200, String::new(), body.to_owned())
    }

    /// A chat's chunks with these pieces, the count, and the end.
    pub(crate) fn chat(pieces: &[&str]) -> Self {
        let mut events = chunks(pieces);
        events
            .push(r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}"#.to_owned());
        events.push("[DONE]".to_owned());
        Self::Stream(String::new(), events, After::End)
    }
}

pub(crate) fn chunks(pieces: &[&str]) -> Vec<String> {
    let chunk =
        |piece: &&str| format!(r#"{{"choices":[{{"index":0,"delta":{{"content":"{piece}"}}}}]}}"#);
    pieces.iter().map(chunk).collect()
}

type Answers = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server on a free port; it ends when it is dropped.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    serving: JoinSet<()>,
}

impl Server {
    pub(crate) async fn start(answers: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests: Arc<Mutex<Vec<Request>>> = Arc::default();
        let (seen, answers): (_, Arc<Answers>) = (Arc::clone(&requests), Arc::new(answers));
        let mut serving = JoinSet::new();
        serving.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, Arc::clone(&seen), Arc::clone(&answers)));
            }
        });
        Self {
            url,
            requests,
            serving,
        }
    }

    /// One that is well and answers every task so.
    pub(crate) async fn answering(reply: Reply) -> Self {
        Self::start(move |request| {
            if request.line == "GET /v1/models" {
                Reply::ok(r#"{"data":[]}"#)
            } else {
                reply.clone()
            }
        })
        .await
    }

    /// The requests that were no checks.
    pub(crate) fn tasks(&self) -> Vec<Request> {
        let requests = self.requests.lock().unwrap();
        let tasks = requests
            .iter()
            .filter(|request| request.line.starts_with("POST"));
        tasks.cloned().collect()
    }

    pub(crate) async fn stop(&mut self) {
        self.serving.shutdown().await;
    }
}

async fn serve(mut stream: TcpStream, seen: Arc<Mutex<Vec<Request>>>, answers: Arc<Answers>) {
    let Some(request) = read(&mut stream).await else {
        return;
    };
    seen.lock().unwrap().push(request.clone());
    let close = "connection: close\r\n";
    match answers(&request) {
        Reply::Status(status, head, body) => {
            let length = body.len();
            let answer = format!(
                "HTTP/1.1 {status} X\r\n{close}{head}content-length: {length}\r\n\r\n{body}"
            );
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        Reply::Stream(head, events, after) => {
            let mut answer = format!(
                "HTTP/1.1 200 OK\r\n{close}{head}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            );
            for event in events {
                let event = format!("data: {event}\n\n");
                let length = event.len();
                answer = format!("{answer}{length:x}\r\n{event}\r\n");
            }
            if let After::End = after {
                answer.push_str("0\r\n\r\n");
            }
            let _ = stream.write_all(answer.as_bytes()).await;
            match after {
                After::End | After::Cut => {}
                After::Hang => until_gone(stream).await,
                After::Cancel(cancel) => {
                    cancel.came.notified().await;
                    let error = "data: {\"error\":{\"message\":\"cancelled\"}}\n\n";
                    let chunk = format!("{:x}\r\n{error}\r\n", error.len());
                    let _ = stream.write_all(chunk.as_bytes()).await;
                    until_gone(stream).await;
                    cancel.stream_gone.notify_one();
                }
            }
        }
        Reply::Cancelled(cancel, body) => {
            cancel.came.notify_one();
            cancel.stream_gone.notified().await;
            let length = body.len();
            let answer = format!("HTTP/1.1 200 X\r\n{close}content-length: {length}\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
        Reply::Nothing => until_gone(stream).await,
    }
}

/// Waits for the client to go.
async fn until_gone(mut stream: TcpStream) {
    let mut byte = [0];
    while stream.read(&mut byte).await.is_ok_and(|read| read > 0) {}
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let mut bytes = Vec::new();
    loop {
        let mut some = [0; 4096];
        let read = stream.read(&mut some).await.ok()?;
        if read == 0 {
            return None;
        }
        bytes.extend_from_slice(&some[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else {
            continue;
        };
        let lower = head.to_lowercase();
        let length = lower
            .lines()
            .find_map(|line| line.strip_prefix("content-length: ")?.parse().ok())
            .unwrap_or(0);
        if body.len() >= length {
            let line = head.lines().next()?.trim_end_matches(" HTTP/1.1");
            return Some(Request {
                line: line.to_owned(),
                head: lower,
                body: body.to_owned(),
            });
        }
    }
}

pub(crate) fn endpoint(url: &str) -> Endpoint {
    Endpoint {
        url: url.to_owned(),
        model: "far".to_owned(),
        bearer: None,
        token_file: None,
        slots: 2,
    }
}

/// Short enough that a hung server is noticed soon.
pub(crate) fn waits() -> Waits {
    Waits {
        response: Duration::from_secs(5),
        first_token: Duration::from_millis(400),
        next_token: Duration::from_millis(400),
        ..Waits::default()
    }
}

/// Replicas of these servers, checked once.
pub(crate) async fn replicas(servers: &[&Server]) -> Replicas {
    let endpoints = servers.iter().map(|server| endpoint(&server.url)).collect();
    let replicas = Replicas::new(endpoints, waits()).unwrap();
    replicas.check_due().await;
    replicas
}

pub(crate) fn healthy(replicas: &Replicas) -> Vec<bool> {
    let statuses = replicas.replicas();
    statuses.iter().map(|status| status.healthy).collect()
}

pub(crate) fn chat() -> EngineTask {
    EngineTask {
        id: TaskId::generate(),
        input: TaskInput::Messages(vec![]),
        answered: String::new(),
        max_tokens: 100,
        stop: vec![],
        sampling: SamplingParams::default(),
    }
}

pub(crate) fn call(api: CallApi, body: &str, stream: bool) -> EngineTask {
    EngineTask {
        input: TaskInput::Call(EngineCall {
            api,
            body: Bytes::from(body.to_owned()),
            stream,
        }),
        ..chat()
    }
}

pub(crate) async fn first_event(stream: &mut TokenStream) {
    loop {
        match tokio::time::timeout(DEADLINE, stream.next()).await.unwrap() {
            Some(Ok(TokenEvent::Started)) => {}
            Some(Ok(_)) => return,
            other => panic!("{other:?}"),
        }
    }
}

/// The rest of a stream: its events, and its failure.
pub(crate) async fn rest(stream: TokenStream) -> (Vec<TokenEvent>, Option<WorkerError>) {
    let read = async {
        let mut stream = stream;
        let mut events = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => events.push(event),
                Err(error) => return (events, Some(error)),
            }
        }
        (events, None)
    };
    tokio::time::timeout(DEADLINE, read).await.unwrap()
}

pub(crate) fn text(events: &[TokenEvent]) -> String {
    let text = |event: &TokenEvent| match event {
        TokenEvent::Token { text, .. } => text.to_string(),
        TokenEvent::Chunk(chunk) => chunk.text.to_string(),
        TokenEvent::Answer(answer) => answer.text.clone(),
        _ => String::new(),
    };
    events.iter().map(text).collect()
}

/// A task's whole text; it must not fail.
pub(crate) async fn answer(replicas: &Replicas, task: EngineTask) -> String {
    let stream = replicas.submit(task).await.unwrap();
    let (events, failure) = rest(stream).await;
    assert!(failure.is_none(), "{failure:?}");
    let begun = events.iter().filter(|event| **event == TokenEvent::Started);
    assert_eq!(begun.count(), 1, "it starts once");
    assert!(matches!(events.last(), Some(TokenEvent::End(_))));
    text(&events)
}
