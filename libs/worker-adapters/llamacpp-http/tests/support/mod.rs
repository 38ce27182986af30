//! What the tests of this crate share.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "helpers of tests; not every test file uses each"
)]

use std::time::{Duration, Instant};

use futures::StreamExt;
use llama_orch_types::TaskId;
use test_harness_fake_engine::FakeEngine;
use worker_adapters_adapter_api::{
    EndSummary, EngineTask, SamplingParams, TaskInput, TokenEvent, TokenStream, WorkerAdapter,
    WorkerError,
};
use worker_adapters_llamacpp_http::{AdapterSettings, LlamaCppAdapter};

pub(crate) fn adapter(engine: &FakeEngine) -> LlamaCppAdapter {
    adapter_with(engine, |_| {})
}

pub(crate) fn adapter_with(
    engine: &FakeEngine,
    change: impl FnOnce(&mut AdapterSettings),
) -> LlamaCppAdapter {
    let mut settings = AdapterSettings::new(engine.url());
    change(&mut settings);
    LlamaCppAdapter::new(settings).unwrap()
}

pub(crate) fn task(max_tokens: u32) -> EngineTask {
    EngineTask {
        id: TaskId::generate(),
        input: TaskInput::Prompt("count for me".to_owned()),
        answered: String::new(),
        max_tokens,
        stop: Vec::new(),
        sampling: SamplingParams::default(),
    }
}

/// Everything a stream gave.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) events: Vec<TokenEvent>,
    pub(crate) error: Option<WorkerError>,
}

impl Outcome {
    pub(crate) async fn of(mut stream: TokenStream) -> Self {
        let mut outcome = Self::default();
        while let Some(item) = stream.next().await {
            assert!(outcome.error.is_none(), "an item after an error: {item:?}");
            match item {
                Ok(event) => outcome.events.push(event),
                Err(error) => outcome.error = Some(error),
            }
        }
        outcome
    }

    pub(crate) fn pieces(&self) -> Vec<&str> {
        let mut pieces = Vec::new();
        for event in &self.events {
            if let TokenEvent::Token { text, index, .. } = event {
                assert_eq!(*index, pieces.len() as u64, "indices have no gap");
                pieces.push(&**text);
            }
        }
        pieces
    }

    pub(crate) fn text(&self) -> String {
        self.pieces().concat()
    }

    /// Of a stream that ended well.
    pub(crate) fn end(&self) -> &EndSummary {
        assert!(self.error.is_none(), "{:?}", self.error);
        match self.events.last() {
            Some(TokenEvent::End(summary)) => summary,
            other => panic!("ended with {other:?}"),
        }
    }
}

pub(crate) async fn run(adapter: &LlamaCppAdapter, task: EngineTask) -> Outcome {
    Outcome::of(adapter.submit(task).await.unwrap()).await
}

/// The error of a task, wherever it came up.
pub(crate) async fn failure(adapter: &LlamaCppAdapter, task: EngineTask) -> WorkerError {
    match adapter.submit(task).await {
        Err(error) => error,
        Ok(stream) => {
            let outcome = Outcome::of(stream).await;
            outcome
                .error
                .unwrap_or_else(|| panic!("no error: {:?}", outcome.events))
        }
    }
}

/// Reads until the first token has come.
pub(crate) async fn first_token(stream: &mut TokenStream) {
    loop {
        match stream.next().await {
            Some(Ok(TokenEvent::Token { .. })) => return,
            Some(Ok(_)) => {}
            other => panic!("no token came: {other:?}"),
        }
    }
}

pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}
