//! A task's way from replica to replica.
//!
//! It ends with the first event that is handed out: what comes after that is one
//! replica's answer, and if it breaks off, the task fails. Before, nobody can tell, and
//! the task goes to a replica that it has not been on.

use std::sync::Arc;
use std::time::Duration;

use futures::{StreamExt, stream};
use provision_kit::chain::one_line;
use tokio::time::{Instant, sleep_until};
use worker_adapters_adapter_api::{
    EngineTask, TimeoutPhase, TokenEvent, TokenStream, WorkerAdapter, WorkerError,
};

use crate::replicas::{Choice, Entry, Seat, Shared};

/// So many replicas are tried at the most: the task itself may be what they fail at.
const TRIES: usize = 3;
/// How long replicas that say they are busy are waited for.
const BUSY_AT_MOST: Duration = Duration::from_mins(1);
/// How often it is seen whether one is free sooner than it said.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// How long one that says it is loading is left alone.
const LOADING: Duration = Duration::from_secs(1);

/// What a failure says of the replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Nothing: the task is to blame, or somebody cancelled it.
    TasksOwn,
    /// It takes no task for so long.
    Busy(Duration),
    Gone,
    Hung,
    Suspect,
}

fn fault(error: &WorkerError) -> Fault {
    match error {
        WorkerError::InvalidParams { .. }
        | WorkerError::ContextLengthExceeded { .. }
        | WorkerError::NotOffered { .. }
        | WorkerError::Cancelled => Fault::TasksOwn,
        WorkerError::Loading { .. } => Fault::Busy(LOADING),
        WorkerError::Unavailable {
            retry_after: Some(pause),
            ..
        } => Fault::Busy(*pause),
        WorkerError::Unavailable { .. }
        | WorkerError::Unreachable { .. }
        | WorkerError::Timeout {
            phase: TimeoutPhase::Connect,
            ..
        } => Fault::Gone,
        WorkerError::Timeout { .. } => Fault::Hung,
        WorkerError::Reset { .. } | WorkerError::Protocol { .. } => Fault::Suspect,
    }
}

/// A task that looks for a replica.
#[derive(Debug)]
pub(crate) struct Way {
    shared: Arc<Shared>,
    entry: Entry,
    task: EngineTask,
    correlation_id: String,
    tried: Vec<usize>,
    /// The replica it is on.
    seat: Option<Seat>,
}

impl Way {
    pub(crate) fn new(
        shared: Arc<Shared>,
        entry: Entry,
        task: EngineTask,
        correlation_id: &str,
    ) -> Self {
        Self {
            shared,
            entry,
            task,
            correlation_id: correlation_id.to_owned(),
            tried: Vec::new(),
            seat: None,
        }
    }

    /// Returns when a replica has taken the task.
    pub(crate) async fn into_stream(mut self) -> Result<TokenStream, WorkerError> {
        let stream = self.find(None).await?;
        let answer = Answering {
            way: Some(self),
            stream,
            told_started: false,
            begun: false,
        };
        Ok(Box::pin(stream::unfold(answer, |mut answer| async {
            let item = answer.next().await?;
            Some((item, answer))
        })))
    }

    /// Takes the task to a replica. `last` is why it has to leave another.
    async fn find(&mut self, mut last: Option<WorkerError>) -> Result<TokenStream, WorkerError> {
        let begun = Instant::now();
        let cancel = self.entry.cancel.clone();
        while self.tried.len() < TRIES {
            let seat = match self.shared.choose(self.entry.task, &self.tried) {
                Choice::Take(seat) => seat,
                Choice::Wait(until) if until <= begun + BUSY_AT_MOST => {
                    // A check may clear it sooner.
                    let look = until.min(Instant::now() + LOOK_AGAIN);
                    tokio::select! {
                        () = sleep_until(look) => continue,
                        () = cancel.cancelled() => return Err(WorkerError::Cancelled),
                    }
                }
                Choice::Wait(_) | Choice::None => break,
            };
            let adapter = &self.shared.replicas[seat.index].adapter;
            let sent = tokio::select! {
                biased;
                // Where the adapter was told of the cancel, it ends by itself.
                sent = adapter.submit_traced(self.task.clone(), &self.correlation_id) => sent,
                () = cancel.cancelled() => Err(WorkerError::Cancelled),
            };
            self.seat = Some(seat);
            match sent {
                Ok(stream) => return Ok(stream),
                Err(error) if self.leave(&error) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or_else(|| self.nowhere()))
    }

    /// Tells the replica's watch of the failure. Says whether another may do better.
    fn leave(&mut self, error: &WorkerError) -> bool {
        let Some(seat) = self.seat.take() else {
            return false;
        };
        let index = seat.index;
        let why = || one_line(error);
        match fault(error) {
            Fault::TasksOwn => return false,
            // Nothing of the task has begun there, so it may be tried again.
            Fault::Busy(pause) => self.shared.tell(index, |watch, now| {
                watch.busy(why(), now + pause);
                false
            }),
            fault => {
                self.tried.push(index);
                self.shared.tell(index, |watch, now| match fault {
                    Fault::Gone => watch.gone(why(), now),
                    Fault::Hung => watch.hung(why(), now),
                    _ => {
                        watch.suspect(why(), now);
                        false
                    }
                });
            }
        }
        tracing::info!(
            task = %self.entry.task, replica = index, reason = one_line(error),
            "the replica failed the task"
        );
        true
    }

    fn nowhere(&self) -> WorkerError {
        let first = self.shared.replicas.first();
        WorkerError::Unavailable {
            url: first.map_or_else(String::new, |replica| {
                replica.adapter.endpoint().url.clone()
            }),
            reason: "no replica takes tasks now".to_owned(),
            retry_after: None,
        }
    }
}

/// A task on a replica.
struct Answering {
    /// Gone as soon as the task is over.
    way: Option<Way>,
    stream: TokenStream,
    told_started: bool,
    /// Something of the answer was handed out.
    begun: bool,
}

impl Answering {
    async fn next(&mut self) -> Option<Result<TokenEvent, WorkerError>> {
        loop {
            let way = self.way.as_mut()?;
            let event = tokio::select! {
                biased;
                event = self.stream.next() => event,
                () = way.entry.cancel.cancelled() => Some(Err(WorkerError::Cancelled)),
            };
            match event {
                Some(Ok(TokenEvent::Started)) if self.told_started => {}
                Some(Ok(event)) => {
                    match event {
                        TokenEvent::Started => self.told_started = true,
                        TokenEvent::End(_) => self.way = None,
                        _ => self.begun = true,
                    }
                    return Some(Ok(event));
                }
                Some(Err(error)) => {
                    if !way.leave(&error) || self.begun {
                        self.way = None;
                        return Some(Err(error));
                    }
                    match way.find(Some(error)).await {
                        Ok(stream) => self.stream = stream,
                        Err(error) => {
                            self.way = None;
                            return Some(Err(error));
                        }
                    }
                }
                None => {
                    self.way = None;
                    return None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_task_is_to_blame_for_is_not_held_against_the_replica() {
        let refused = WorkerError::InvalidParams {
            message: String::new(),
        };
        assert_eq!(fault(&refused), Fault::TasksOwn);
        assert_eq!(fault(&WorkerError::Cancelled), Fault::TasksOwn);
        let timeout = |phase| WorkerError::Timeout {
            phase,
            after: LOADING,
        };
        assert_eq!(fault(&timeout(TimeoutPhase::Connect)), Fault::Gone);
        assert_eq!(fault(&timeout(TimeoutPhase::FirstToken)), Fault::Hung);
        let unavailable = |retry_after| WorkerError::Unavailable {
            url: String::new(),
            reason: String::new(),
            retry_after,
        };
        assert_eq!(fault(&unavailable(None)), Fault::Gone);
        assert_eq!(fault(&unavailable(Some(LOADING))), Fault::Busy(LOADING));
    }
}
