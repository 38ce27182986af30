//! The mock adapter: plays a script, and remembers what it was asked.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures::stream;
use llama_orch_types::TaskId;
use serde_json::json;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use worker_adapters_adapter_api::{
    CancelReport, EndSummary, EngineHealth, EngineProps, EngineTask, FinishReason, TaskInput,
    TimeoutPhase, TokenEvent, TokenStream, WorkerAdapter, WorkerError,
};

use crate::calls;
use crate::script::MockScript;

/// How many tasks are remembered, so that a long run holds no growing list.
const REMEMBERED: usize = 1000;

/// A scripted engine. Clones are the same engine.
#[derive(Debug, Clone)]
pub struct MockAdapter {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    script: MockScript,
    tasks: VecDeque<EngineTask>,
    running: HashMap<TaskId, CancellationToken>,
}

impl MockAdapter {
    pub fn new(script: MockScript) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                script,
                tasks: VecDeque::new(),
                running: HashMap::new(),
            })),
        }
    }

    /// For tasks submitted from now on.
    pub fn set_script(&self, script: MockScript) {
        self.lock().script = script;
    }

    /// The tasks it got, oldest first; the latest thousand.
    pub fn tasks(&self) -> Vec<EngineTask> {
        self.lock().tasks.iter().cloned().collect()
    }

    /// How many streams are open.
    pub fn running(&self) -> usize {
        self.lock().running.len()
    }

    fn script(&self) -> MockScript {
        self.lock().script.clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that holds the lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl WorkerAdapter for MockAdapter {
    async fn health(&self) -> Result<EngineHealth, WorkerError> {
        Ok(self.script().health)
    }

    async fn props(&self) -> Result<EngineProps, WorkerError> {
        let script = self.script();
        Ok(EngineProps {
            version: script.version,
            model_path: None,
            ctx: script.ctx,
            slots: script.slots,
        })
    }

    /// One token per word.
    async fn count_tokens(&self, input: &TaskInput) -> Result<u32, WorkerError> {
        Ok(count(input) as u32)
    }

    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError> {
        let cancel = CancellationToken::new();
        let script = {
            let mut state = self.lock();
            if state.tasks.len() == REMEMBERED {
                state.tasks.pop_front();
            }
            state.tasks.push_back(task.clone());
            if let Some(error) = state.script.fault.and_then(crate::MockFault::at_submit) {
                return Err(error);
            }
            if let TaskInput::Call(call) = &task.input {
                calls::offered(call.api)?;
            }
            state.running.insert(task.id, cancel.clone());
            state.script.clone()
        };
        let play = Play {
            entry: Some(Entry {
                adapter: self.clone(),
                id: task.id,
            }),
            cancel,
            script,
            task,
            started: None,
            sent: 0,
            finished: false,
        };
        Ok(Box::pin(stream::unfold(play, |mut play| async {
            let item = play.next().await?;
            Some((item, play))
        })))
    }

    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError> {
        let (cancel, free_after) = {
            let state = self.lock();
            let Some(cancel) = state.running.get(&task) else {
                return Ok(CancelReport::NotRunning);
            };
            (cancel.clone(), state.script.free_after)
        };
        cancel.cancel();
        sleep(free_after).await;
        Ok(CancelReport::Freed {
            after_ms: free_after.as_millis() as u64,
        })
    }

    async fn probe(&self, limit: Duration) -> Result<(), WorkerError> {
        let script = self.script();
        if let Some(error) = script.fault.and_then(crate::MockFault::at_submit) {
            return Err(error);
        }
        let late = || WorkerError::Timeout {
            phase: TimeoutPhase::Response,
            after: limit,
        };
        if let Some(fault) = script.fault.filter(|fault| fault.strikes_after(0)) {
            if let Some(error) = fault.in_stream() {
                return Err(error);
            }
            sleep(limit).await;
            return Err(late());
        }
        tokio::time::timeout(limit, sleep(script.first_token_after))
            .await
            .map_err(|_| late())
    }

    async fn engine_version(&self) -> Result<String, WorkerError> {
        Ok(self.script().version)
    }
}

fn count(input: &TaskInput) -> usize {
    match input {
        TaskInput::Prompt(text) => text.split_whitespace().count(),
        TaskInput::Messages(messages) => messages
            .iter()
            .map(|message| message.content.split_whitespace().count())
            .sum(),
        TaskInput::Call(call) => call.body.len(),
    }
}

/// A running task's entry; dropping it takes the entry out.
struct Entry {
    adapter: MockAdapter,
    id: TaskId,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.adapter.lock().running.remove(&self.id);
    }
}

/// One task's stream.
struct Play {
    /// Gone once the stream is over.
    entry: Option<Entry>,
    cancel: CancellationToken,
    script: MockScript,
    task: EngineTask,
    started: Option<Instant>,
    sent: u64,
    /// A call's answer is complete but for the end.
    finished: bool,
}

impl Play {
    /// Goes wrong where the script says so; never comes back from a hang.
    async fn strike(&self) -> Result<bool, WorkerError> {
        let fault = self.script.fault;
        if let Some(fault) = fault.filter(|fault| fault.strikes_after(self.sent)) {
            match fault.in_stream() {
                Some(error) => return Err(error),
                None => std::future::pending::<()>().await,
            }
        }
        Ok(true)
    }

    /// All pieces so far.
    fn text(&self) -> String {
        let pieces = self.script.pieces.iter().cycle();
        pieces
            .take(self.sent as usize)
            .map(String::as_str)
            .collect()
    }

    async fn next(&mut self) -> Option<Result<TokenEvent, WorkerError>> {
        self.entry.as_ref()?;
        let cancel = self.cancel.clone();
        let item = tokio::select! {
            biased;
            () = cancel.cancelled() => Err(WorkerError::Cancelled),
            item = self.step() => item,
        };
        if matches!(item, Ok(TokenEvent::End(_)) | Err(_)) {
            self.entry = None;
        }
        Some(item)
    }

    async fn step(&mut self) -> Result<TokenEvent, WorkerError> {
        let Some(started) = self.started else {
            self.started = Some(Instant::now());
            return Ok(TokenEvent::Started);
        };
        let pieces = self.script.pieces.len() as u64;
        let own = if self.script.cycle && pieces > 0 {
            u64::MAX
        } else {
            pieces
        };
        while self.strike().await? && self.sent < own.min(u64::from(self.task.max_tokens)) {
            let first = self.sent == 0;
            let script = &self.script;
            sleep(if first {
                script.first_token_after
            } else {
                script.next_token_after
            })
            .await;
            let index = self.sent;
            self.sent += 1;
            let text = self.script.pieces[(index % pieces) as usize].clone();
            if let TaskInput::Call(call) = &self.task.input {
                if call.stream {
                    return Ok(TokenEvent::Chunk(calls::piece(call.api, text, self.sent)));
                }
                continue;
            }
            return Ok(TokenEvent::Token {
                text: text.into(),
                index,
                tokens_in: count(&self.task.input) as u64,
                tokens_out: self.sent,
            });
        }
        let limited = self.sent < own;
        if let TaskInput::Call(call) = &self.task.input
            && !std::mem::replace(&mut self.finished, true)
        {
            let text = self.text();
            return Ok(calls::last(call, text, self.sent, limited));
        }
        Ok(TokenEvent::End(EndSummary {
            tokens_in: count(&self.task.input) as u64,
            tokens_cached: 0,
            tokens_out: self.sent,
            prompt_time_ms: 0.0,
            decode_time_ms: started.elapsed().as_secs_f64() * 1000.0,
            finish_reason: if limited {
                FinishReason::Length
            } else {
                FinishReason::Stop
            },
            effective: json!({"engine": "mock", "n_predict": self.task.max_tokens}),
        }))
    }
}
