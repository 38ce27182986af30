//! One task's stream, from the request to its last event, whatever kind of answer it
//! reads.
//!
//! ```text
//! Opening ──► Reading ──► Closed     (a stream, to its last event)
//! Waiting ──────────────► Closed     (an answer in one piece)
//!    └───────────┴──────► Closed     (error, timeout, cancel)
//! ```
//!
//! The engine sends its headers when it begins with the prompt, or (older
//! builds) only with the first token. `Opening` may therefore last through the
//! whole prompt, and the task counts as taken when the engine has not refused
//! it for a moment. Whatever closes the stream drops the response, and the
//! engine sees its client gone.

use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use futures::Stream;
use tokio::time::{Instant, timeout};
use worker_adapters_adapter_api::{EndSummary, TokenEvent, TokenStream, WorkerError};

use crate::incoming::Incoming;
use crate::live::{Handle, LiveTask};
use crate::patience::Patience;
use crate::sse::SseEvent;
use crate::wire::PromptProgress;

/// The engine takes or refuses a request within a few milliseconds; one that it
/// has not refused in this time, it has taken. Longer than all tries to reach
/// an engine together, so that one that is not there is never taken for one
/// that works.
const ACCEPT_WINDOW: Duration = Duration::from_secs(1);

pub(crate) type Opening = Pin<Box<dyn Future<Output = Result<Incoming, WorkerError>> + Send>>;

/// What one step gives first; where that is more, the rest is in [`InFlight::ready`].
pub(crate) type Given = Result<Option<TokenEvent>, WorkerError>;

/// What one kind of answer makes of what the engine sends.
pub(crate) trait AnswerKind: Send + Unpin + 'static {
    /// An answer in one piece, while it is waited for.
    type Waiting: Send + Unpin;

    /// Whether one that the engine has not refused in time counts as in a slot, though
    /// nothing else says so.
    const IN_SLOT_IF_NOT_REFUSED: bool;

    /// Takes in one event of a stream.
    fn take(&mut self, task: &mut InFlight, event: SseEvent) -> Given;

    /// Takes in an answer in one piece, once it has come.
    fn poll_answer(
        &mut self,
        waiting: &mut Self::Waiting,
        task: &mut InFlight,
        context: &mut Context<'_>,
    ) -> Poll<Given>;
}

#[allow(
    clippy::large_enum_variant,
    reason = "one for each task, on the heap, and large for as long as the task reads"
)]
pub(crate) enum State<W> {
    Opening(Opening),
    Reading(Incoming),
    Waiting(W),
    Closed,
}

/// A task on its way, whatever kind of answer it reads.
pub(crate) struct InFlight {
    /// Gone as soon as the task is over, before its last event is handed out.
    live: Option<LiveTask>,
    pub(crate) handle: Handle,
    /// What is handed out before anything is read on.
    pub(crate) ready: VecDeque<TokenEvent>,
    /// When the engine was last heard of.
    pub(crate) now: Instant,
    pub(crate) patience: Patience,
}

impl InFlight {
    /// A word about the prompt has come.
    pub(crate) fn hear_of_prompt(&mut self, progress: PromptProgress) {
        self.handle.set_telling();
        self.handle.set_prompt_left(progress.left());
        self.patience.hear_of_prompt(self.now, progress);
    }

    /// The task is over, and this is its last event.
    pub(crate) fn end(&mut self, summary: EndSummary) {
        self.ready.push_back(TokenEvent::End(summary));
        self.live = None;
    }

    fn is_cancelled(&self) -> bool {
        self.live.is_some() && self.handle.is_cancelled()
    }
}

/// The stream of one task's answer.
pub(crate) struct AnswerStream<K: AnswerKind> {
    state: State<K::Waiting>,
    task: InFlight,
    kind: K,
}

impl<K: AnswerKind> AnswerStream<K> {
    /// Of a task that is waited for from now on.
    pub(crate) fn new(
        state: State<K::Waiting>,
        live: LiveTask,
        patience: Patience,
        kind: K,
    ) -> Self {
        Self {
            state,
            task: InFlight {
                handle: live.handle.clone(),
                live: Some(live),
                ready: VecDeque::new(),
                now: patience.started(),
                patience,
            },
            kind,
        }
    }

    /// Waits until the engine has taken the task, or says why it has not.
    pub(crate) async fn accepted(&mut self) -> Result<(), WorkerError> {
        let step = timeout(ACCEPT_WINDOW, poll_fn(|context| self.poll_step(context)));
        match step.await {
            Ok(event) => {
                if let Some(event) = event? {
                    self.task.ready.push_front(event);
                }
            }
            // Time over means that the engine works on it.
            Err(_) if K::IN_SLOT_IF_NOT_REFUSED => self.task.handle.set_taken(),
            Err(_) => {}
        }
        self.task.ready.push_front(TokenEvent::Started);
        Ok(())
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(self)
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.task.ready.clear();
        self.task.live = None;
        error
    }

    /// One step: the response's headers, one event of a stream, or the whole answer.
    fn poll_step(&mut self, context: &mut Context<'_>) -> Poll<Given> {
        let task = &mut self.task;
        match &mut self.state {
            State::Opening(opening) => {
                if let Poll::Ready(incoming) = opening.as_mut().poll(context) {
                    self.state = State::Reading(incoming?);
                    task.handle.set_taken();
                    return Poll::Ready(Ok(None));
                }
            }
            State::Reading(incoming) => {
                if let Poll::Ready(event) = incoming.poll_event(context) {
                    // Whoever reads the stream may have slept within what one read brought.
                    if incoming.take_has_read() || task.patience.is_due() {
                        task.now = Instant::now();
                    }
                    let event = event.unwrap_or_else(|| Err(ended_early()))?;
                    task.patience.note_event(task.now, &task.handle);
                    let given = self.kind.take(task, event);
                    return Poll::Ready(self.closed_if_over(given));
                }
                // An engine is not late whose word may be here: whoever reads the stream
                // may have been away for longer than it has.
                if incoming.has_yielded() {
                    return Poll::Pending;
                }
            }
            State::Waiting(waiting) => {
                if let Poll::Ready(given) = self.kind.poll_answer(waiting, task, context) {
                    return Poll::Ready(self.closed_if_over(given));
                }
            }
            State::Closed => return Poll::Ready(Ok(None)),
        }
        let Some(live) = &task.live else {
            return Poll::Ready(Ok(None));
        };
        task.patience.poll_over(live, context).map(Err)
    }

    /// Lets go of the response with the last of it.
    fn closed_if_over(&mut self, given: Given) -> Given {
        if self.task.live.is_none() {
            self.state = State::Closed;
        }
        given
    }
}

impl<K: AnswerKind> Stream for AnswerStream<K> {
    type Item = Result<TokenEvent, WorkerError>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            if this.task.is_cancelled() {
                return Poll::Ready(Some(Err(this.close(WorkerError::Cancelled))));
            }
            if let Some(event) = this.task.ready.pop_front() {
                return Poll::Ready(Some(Ok(event)));
            }
            if matches!(this.state, State::Closed) {
                return Poll::Ready(None);
            }
            match ready!(this.poll_step(context)) {
                Ok(Some(event)) => return Poll::Ready(Some(Ok(event))),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(this.close(error)))),
            }
        }
    }
}

fn ended_early() -> WorkerError {
    WorkerError::Reset {
        reason: "the response ended before its last event".to_owned(),
    }
}
