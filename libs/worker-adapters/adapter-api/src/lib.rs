//! The only thing an engine must satisfy: [`WorkerAdapter`].
//!
//! An adapter turns one engine's way of talking into ours. It does no
//! queueing, keeps no task longer than its stream lives, and never retries
//! once a token has been handed out.
//!
//! - [`task`]: what is asked of an engine
//! - [`call`]: requests in the engine's own API, passed on
//! - [`event`]: what comes back, as a stream
//! - [`error`]: how it fails
//! - [`replica`]: how one of several engines behind an adapter is

pub mod call;
pub mod error;
pub mod event;
pub mod replica;
pub mod task;

use std::fmt::Debug;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures::Stream;
use llama_orch_types::{ReplicaId, TaskId};

pub use call::{CallAnswer, CallApi, CallChunk, EngineCall};
pub use error::{TimeoutPhase, WorkerError};
pub use event::{
    CancelReport, EndSummary, EngineHealth, EngineProps, FinishReason, MetricsSnapshot, TokenEvent,
};
pub use replica::ReplicaStatus;
pub use task::{ChatMessage, EngineTask, SamplingParams, TaskInput};

/// A task's events. The stream ends after [`TokenEvent::End`] or after the
/// first error; dropping it tells the engine to stop decoding.
pub type TokenStream = Pin<Box<dyn Stream<Item = Result<TokenEvent, WorkerError>> + Send>>;

/// One engine process, as the rest of the program sees it.
#[async_trait]
pub trait WorkerAdapter: Debug + Send + Sync {
    /// Whether the engine takes work now. A loading engine is an answer, not
    /// an error; an engine that cannot be reached is an error.
    async fn health(&self) -> Result<EngineHealth, WorkerError>;

    /// What the engine says of itself.
    async fn props(&self) -> Result<EngineProps, WorkerError>;

    /// How many tokens this input is, special tokens and chat template
    /// included, counted by the engine itself.
    async fn count_tokens(&self, input: &TaskInput) -> Result<u32, WorkerError>;

    /// Starts a task. Returns once the engine has taken the request; tokens
    /// and later failures come through the stream.
    async fn submit(&self, task: EngineTask) -> Result<TokenStream, WorkerError>;

    /// The same, telling the engine by which word its client knows the request,
    /// where it has a place for one.
    async fn submit_traced(
        &self,
        task: EngineTask,
        _correlation_id: &str,
    ) -> Result<TokenStream, WorkerError> {
        self.submit(task).await
    }

    /// Which of several replicas a running task is on; `None` where there is one.
    fn replica_of(&self, _task: TaskId) -> Option<ReplicaId> {
        None
    }

    /// The replicas that answer here, as they are now; empty where the engine has
    /// none.
    fn replicas(&self) -> Vec<ReplicaStatus> {
        Vec::new()
    }

    /// Ends a task's stream and waits, with a bound, until the engine has
    /// freed the slot. Cancelling a task that is not running is no error. After
    /// [`CancelReport::NotSeenFree`] it may be called again, and waits on.
    async fn cancel(&self, task: TaskId) -> Result<CancelReport, WorkerError>;

    /// Lets the engine generate one token of an answer that nobody reads, past
    /// every cache. Fails unless it comes within `limit`: an engine may say that
    /// it is well and answer nobody.
    async fn probe(&self, limit: Duration) -> Result<(), WorkerError>;

    /// The engine's word for its version, for example `b11434`.
    async fn engine_version(&self) -> Result<String, WorkerError>;
}
