//! One task's answer, from the request to its last event.
//!
//! ```text
//! Opening ──► Reading or Whole ──► Closed     (last event)
//!    └───────────┴───────────────► Closed     (error, timeout, cancel)
//! ```
//!
//! A server may send its headers at once, or only with the first token. A task
//! counts as taken when it has not been refused for a moment. Whatever closes the
//! answer drops the response, and the server sees its client gone.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use futures::{Stream, StreamExt, stream};
use provision_kit::chain::one_line;
use reqwest::Response;
use reqwest::header::{HeaderName, HeaderValue};
use tokio::time::{Instant, timeout, timeout_at};
use worker_adapters_adapter_api::{TimeoutPhase, TokenEvent, TokenStream, WorkerError};
use worker_adapters_llamacpp_http::sse::{SseError, SseLimits, event_data};

use crate::client::Client;
use crate::live::LiveTask;
use crate::reading::{Kind, Reader};

/// A server that has not refused a task in this time has taken it. Longer than the
/// time for a connection.
const ACCEPT_WINDOW: Duration = Duration::from_secs(3);
/// How long a server that only sends signs of life is waited for.
const ALIVE_AT_MOST: Duration = Duration::from_hours(1);
/// Where another orchestratord names the task.
const TASK_ID: HeaderName = HeaderName::from_static("x-task-id");

type Opening = Pin<Box<dyn Future<Output = Result<Response, WorkerError>> + Send>>;
type Events = Pin<Box<dyn Stream<Item = Result<ByteString, SseError<reqwest::Error>>> + Send>>;
type Whole = Pin<Box<dyn Future<Output = Result<Vec<u8>, WorkerError>> + Send>>;

enum State {
    Opening(Opening),
    Reading(Events),
    Whole(Whole),
    Closed,
}

/// What is asked of the server.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) path: &'static str,
    pub(crate) body: Bytes,
    pub(crate) kind: Kind,
    pub(crate) streams: bool,
    pub(crate) correlation_id: Option<HeaderValue>,
}

/// A task on its way.
pub(crate) struct Answer {
    client: Arc<Client>,
    /// Gone as soon as the task is over, before its last event is handed out.
    live: Option<LiveTask>,
    state: State,
    reader: Reader,
    streams: bool,
    request_bytes: u64,
    ready: VecDeque<TokenEvent>,
    started: Instant,
    /// When the server last sent anything at all, in milliseconds after `started`.
    heard: Arc<AtomicU64>,
    first_text: Option<Instant>,
    last_event: Option<Instant>,
}

impl Answer {
    /// Sends the request.
    pub(crate) fn start(client: Arc<Client>, live: LiveTask, work: Work) -> Self {
        let request_bytes = work.body.len() as u64;
        let opening: Opening = {
            let client = Arc::clone(&client);
            Box::pin(async move { client.open(work.path, work.body, work.correlation_id).await })
        };
        Self {
            client,
            live: Some(live),
            state: State::Opening(opening),
            reader: Reader::new(work.kind),
            streams: work.streams,
            request_bytes,
            ready: VecDeque::from([TokenEvent::Started]),
            started: Instant::now(),
            heard: Arc::default(),
            first_text: None,
            last_event: None,
        }
    }

    /// Waits until the server has taken the task, or says why it has not.
    pub(crate) async fn accepted(&mut self) -> Result<(), WorkerError> {
        // Time over means that the server works on it.
        timeout(ACCEPT_WINDOW, self.advance())
            .await
            .unwrap_or(Ok(()))
    }

    pub(crate) fn into_stream(self) -> TokenStream {
        Box::pin(stream::unfold(self, |mut answer| async {
            let item = answer.next().await?;
            Some((item, answer))
        }))
    }

    async fn next(&mut self) -> Option<Result<TokenEvent, WorkerError>> {
        loop {
            // Nothing is handed out after a cancel, not even what is here.
            let cancelled = |live: &LiveTask| live.handle.cancel.is_cancelled();
            if self.live.as_ref().is_some_and(cancelled) {
                return Some(Err(self.close(WorkerError::Cancelled)));
            }
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if matches!(self.state, State::Closed) {
                return None;
            }
            if let Err(error) = self.advance().await {
                return Some(Err(self.close(error)));
            }
        }
    }

    fn close(&mut self, error: WorkerError) -> WorkerError {
        self.state = State::Closed;
        self.ready.clear();
        self.live = None;
        error
    }

    /// One step: the response's headers, or one event. May be dropped and called
    /// again without losing anything. An answer that ends in disorder once its cancel
    /// was asked for was cancelled: that is not the server's failure.
    async fn advance(&mut self) -> Result<(), WorkerError> {
        self.step().await.map_err(|error| match &self.live {
            Some(live) if live.handle.is_unwanted() => WorkerError::Cancelled,
            _ => error,
        })
    }

    async fn step(&mut self) -> Result<(), WorkerError> {
        loop {
            let Some(live) = &self.live else {
                return Ok(());
            };
            let cancel = live.handle.cancel.clone();
            let (deadline, error) = self.limit();
            let step = async {
                match &mut self.state {
                    State::Opening(opening) => opening.await.map(Step::Opened),
                    State::Reading(events) => Ok(Step::Event(events.next().await)),
                    State::Whole(body) => body.await.map(Step::Whole),
                    State::Closed => Ok(Step::None),
                }
            };
            let step = tokio::select! {
                biased;
                () = cancel.cancelled() => return Err(WorkerError::Cancelled),
                step = timeout_at(deadline, step) => step,
            };
            match step {
                Ok(step) => return self.take(step?),
                // Signs of life have come in the meantime.
                Err(_) if self.limit().0 > deadline => {}
                Err(_) => return Err(error),
            }
        }
    }

    /// Until when the next step is waited for, as things are now, and what it is
    /// called if it does not come.
    fn limit(&self) -> (Instant, WorkerError) {
        let waits = &self.client.waits;
        let (since, phase, after) = match self.last_event {
            _ if !self.streams => {
                let after = waits.whole(self.request_bytes);
                (self.started, TimeoutPhase::Response, after)
            }
            Some(last) if self.reader.has_begun() => {
                (last, TimeoutPhase::NextToken, waits.next_token)
            }
            _ => {
                let heard = Duration::from_millis(self.heard.load(Ordering::Relaxed));
                let since = self.started + heard.min(ALIVE_AT_MOST);
                let after = waits.first_event(self.request_bytes);
                (since, TimeoutPhase::FirstToken, after)
            }
        };
        (since + after, WorkerError::Timeout { phase, after })
    }

    fn take(&mut self, step: Step) -> Result<(), WorkerError> {
        match step {
            Step::Opened(response) => self.opened(response),
            Step::Event(Some(Ok(data))) => self.event(&data)?,
            Step::Event(Some(Err(error))) => return Err(broken(error)),
            Step::Event(None) if self.reader.may_end() => self.end(),
            Step::Event(None) => {
                return Err(WorkerError::Reset {
                    reason: "the response ended before its last event".to_owned(),
                });
            }
            Step::Whole(body) => {
                let answer = self.reader.take_whole(body)?;
                self.ready.push_back(TokenEvent::Answer(answer));
                self.end();
            }
            Step::None => {}
        }
        Ok(())
    }

    fn opened(&mut self, response: Response) {
        let id = response.headers().get(TASK_ID);
        let id = id.and_then(|id| id.to_str().ok()?.parse().ok());
        if let (Some(id), Some(live)) = (id, &self.live) {
            live.handle.set_upstream(id);
        }
        if !self.streams {
            let client = Arc::clone(&self.client);
            self.state = State::Whole(Box::pin(async move { client.body(response).await }));
            return;
        }
        let (heard, started) = (Arc::clone(&self.heard), self.started);
        let bytes = response.bytes_stream().inspect(move |_| {
            let millis = started.elapsed().as_millis() as u64;
            heard.store(millis, Ordering::Relaxed);
        });
        self.state = State::Reading(Box::pin(event_data(bytes, SseLimits::default())));
    }

    fn event(&mut self, data: &str) -> Result<(), WorkerError> {
        self.reader.take(data, &mut self.ready)?;
        let now = Instant::now();
        self.last_event = Some(now);
        if self.first_text.is_none() && self.reader.has_begun() {
            self.first_text = Some(now);
        }
        if self.reader.is_over() {
            self.end();
        }
        Ok(())
    }

    fn end(&mut self) {
        let now = Instant::now();
        let first = self.first_text.unwrap_or(now);
        let millis = |time: Duration| time.as_secs_f64() * 1000.0;
        let summary = self
            .reader
            .summary(millis(first - self.started), millis(now - first));
        self.ready.push_back(TokenEvent::End(summary));
        self.live = None;
        self.state = State::Closed;
    }
}

enum Step {
    Opened(Response),
    Event(Option<Result<ByteString, SseError<reqwest::Error>>>),
    Whole(Vec<u8>),
    None,
}

fn broken(error: SseError<reqwest::Error>) -> WorkerError {
    match error {
        SseError::Transport(error) => WorkerError::Reset {
            reason: one_line(&error.without_url()),
        },
        SseError::Malformed(malformed) => WorkerError::Protocol {
            what: malformed.to_string(),
        },
    }
}
