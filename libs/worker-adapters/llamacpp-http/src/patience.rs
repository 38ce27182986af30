//! How long one task's engine is waited for, as things are now.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::unconstrained;
use tokio::time::{Instant, Sleep, sleep_until};
use worker_adapters_adapter_api::{TimeoutPhase, WorkerError};

use crate::deadlines::{Deadlines, PromptSpeed, first_batch};
use crate::live::{Handle, LiveTask};
use crate::settings::AdapterSettings;
use crate::wire::PromptProgress;

/// How long a limit is taken for granted: other tasks come to the engine and go.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What the engine was last heard to do.
#[derive(Debug, Clone, Copy)]
enum Told {
    Prompt(PromptProgress),
    /// With so many tokens in the context.
    Decoding(u64),
}

/// What was heard of the engine about one task, and what it therefore gets.
#[derive(Debug)]
pub(crate) struct Patience {
    deadlines: Deadlines,
    speed: Arc<PromptSpeed>,
    started: Instant,
    /// When the latest sign of life came, and what it told; none before the first.
    progress: Option<(Instant, Told)>,
    /// When other tasks' prompts were last seen to hold this one up.
    shared_until: Option<Instant>,
    /// A guess, until the engine has counted.
    prompt_tokens: u64,
    longest_gap: Duration,
    /// How many signs of life have come, up to two.
    events: u8,
    decoding: bool,
    alarm: Alarm,
}

/// Wakes the reader of a stream for a cancel, and when the limit is to be looked at.
/// Made once and set anew as seldom as may be, and never for a token: limits only
/// grow with the signs of life that come.
#[derive(Debug, Default)]
struct Alarm {
    timer: Option<Pin<Box<Sleep>>>,
    /// When the timer fires; `None` while it is not set.
    due: Option<Instant>,
    /// Whom it wakes.
    reader: Option<Waker>,
}

impl Patience {
    /// Begins to wait, for a task with about so many tokens in its prompt.
    pub(crate) fn new(
        settings: &AdapterSettings,
        speed: Arc<PromptSpeed>,
        prompt_tokens: u64,
        handle: &Handle,
    ) -> Self {
        handle.expect_batch(first_batch(prompt_tokens, speed.tokens_per_second()));
        handle.set_prompt_left(prompt_tokens);
        Self {
            deadlines: Deadlines {
                first_token: settings.first_token_timeout,
                next_token: settings.next_token_timeout,
            },
            speed,
            started: Instant::now(),
            progress: None,
            shared_until: None,
            prompt_tokens,
            longest_gap: Duration::ZERO,
            events: 0,
            decoding: false,
            alarm: Alarm::default(),
        }
    }

    pub(crate) fn started(&self) -> Instant {
        self.started
    }

    /// An event has come, whatever it tells.
    pub(crate) fn note_event(&mut self, now: Instant, handle: &Handle) {
        let gap = now - self.progress.map_or(self.started, |(at, _)| at);
        if gap > self.longest_gap {
            self.longest_gap = gap;
            handle.set_longest_gap(gap);
        }
        if self.events < 2 {
            self.events += 1;
            if self.events == 2 {
                handle.set_several_events();
            }
        }
    }

    pub(crate) fn hear_of_prompt(&mut self, now: Instant, progress: PromptProgress) {
        self.progress = Some((now, Told::Prompt(progress)));
        self.alarm.no_later_than(now + self.deadlines.first_token);
    }

    /// With so many tokens in the context.
    pub(crate) fn hear_token(&mut self, now: Instant, context: u64) {
        self.progress = Some((now, Told::Decoding(context)));
        self.alarm.no_later_than(now + self.deadlines.next_token);
    }

    /// The same of the task's stream, from whose first token on the engine is past
    /// the prompt.
    pub(crate) fn hear_streamed_token(&mut self, now: Instant, context: u64, handle: &Handle) {
        self.hear_token(now, context);
        if !std::mem::replace(&mut self.decoding, true) {
            handle.set_decoding();
        }
    }

    /// Why no more is waited for. To be asked whenever nothing has come; wakes the
    /// context when it is to be asked again.
    pub(crate) fn poll_over(
        &mut self,
        live: &LiveTask,
        context: &mut Context<'_>,
    ) -> Poll<WorkerError> {
        let reader = context.waker();
        let known = self.alarm.reader.as_ref();
        let known = known.is_some_and(|known| known.will_wake(reader));
        if !known {
            live.handle.wake_on_cancel(reader);
            self.alarm.reader = Some(reader.clone());
        }
        if live.handle.is_cancelled() {
            return Poll::Ready(WorkerError::Cancelled);
        }
        if known && self.alarm.is_set() {
            return Poll::Pending;
        }
        while self.alarm.poll_due(context).is_ready() {
            let now = Instant::now();
            let limit = self.limit(live, now);
            if limit.deadline <= now {
                return Poll::Ready(WorkerError::Timeout {
                    phase: limit.phase,
                    after: limit.after,
                });
            }
            self.alarm.set(limit.deadline.min(now + LOOK_AGAIN));
        }
        Poll::Pending
    }

    /// Whether the clock is to be looked at though nothing was read: it was long ago.
    pub(crate) fn is_due(&self) -> bool {
        !self.alarm.is_set()
    }

    /// How long the next sign of life is waited for.
    fn limit(&mut self, live: &LiveTask, now: Instant) -> Limit {
        let others = live.other_prompts();
        if others.is_some() {
            self.shared_until = Some(now);
        }
        let speed = self.speed.tokens_per_second();
        let (since, phase, after) = match self.progress {
            None => {
                let after = self.deadlines.in_prompt(self.prompt_tokens, false, speed);
                (self.started, TimeoutPhase::FirstToken, after)
            }
            Some((since, Told::Prompt(progress))) => {
                let after = self.deadlines.in_prompt(progress.left(), true, speed);
                (since, TimeoutPhase::FirstToken, after)
            }
            Some((since, Told::Decoding(context))) => {
                let deadline = others.map_or_else(
                    || {
                        let held_up = (since, self.shared_until);
                        self.deadlines.decoding_until(context, held_up, speed)
                    },
                    |tokens| since + self.deadlines.decoding(context, tokens, speed),
                );
                (since, TimeoutPhase::NextToken, deadline - since)
            }
        };
        Limit {
            deadline: since + after,
            phase,
            after,
        }
    }
}

impl Alarm {
    /// Looks again by then at the latest. What is set for earlier stays so.
    fn no_later_than(&mut self, latest: Instant) {
        if self.due.is_some_and(|due| due > latest) {
            self.due = None;
        }
    }

    /// Whether it is set and has not fired.
    fn is_set(&self) -> bool {
        let fired = self.timer.as_ref().is_none_or(|timer| timer.is_elapsed());
        self.due.is_some() && !fired
    }

    fn set(&mut self, due: Instant) {
        self.due = Some(due);
        match &mut self.timer {
            Some(timer) => timer.as_mut().reset(due),
            None => self.timer = Some(Box::pin(sleep_until(due))),
        }
    }

    /// Ready when the time has come, or none was set.
    fn poll_due(&mut self, context: &mut Context<'_>) -> Poll<()> {
        match (&mut self.timer, self.due) {
            // It is polled once for each time it is set, and must then know whom to
            // wake, however much the task has done in one go.
            (Some(timer), Some(_)) => std::pin::pin!(unconstrained(timer.as_mut())).poll(context),
            _ => Poll::Ready(()),
        }
    }
}

/// Until when one step is waited for, as things are now.
#[derive(Debug)]
struct Limit {
    deadline: Instant,
    phase: TimeoutPhase,
    after: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::live::LiveTasks;
    use futures::task::noop_waker;
    use llama_orch_types::TaskId;

    #[tokio::test]
    async fn the_alarm_is_set_anew_only_where_a_limit_ends_sooner() {
        let live = Arc::new(LiveTasks::default()).register(TaskId::generate());
        let live = live.expect("no other task has the id");
        let waker = noop_waker();
        let mut context = Context::from_waker(&waker);
        for (next_token, sooner) in [(30_000, false), (20, true)] {
            let mut settings = AdapterSettings::new("http://127.0.0.1:1");
            settings.next_token_timeout = Duration::from_millis(next_token);
            let mut patience = Patience::new(&settings, Arc::default(), 1, &live.handle);
            assert!(patience.poll_over(&live, &mut context).is_pending());
            let set = patience.alarm.due;
            for tokens in 1..5 {
                patience.hear_streamed_token(patience.started, tokens, &live.handle);
                if !sooner {
                    assert!(patience.poll_over(&live, &mut context).is_pending());
                    assert_eq!(patience.alarm.due, set, "not for a token");
                }
            }
            if sooner {
                assert_eq!(patience.alarm.due, None, "to be set anew");
                let over = std::future::poll_fn(|context| patience.poll_over(&live, context));
                let WorkerError::Timeout { phase, after } = over.await else {
                    panic!("another end")
                };
                assert_eq!(phase, TimeoutPhase::NextToken);
                assert_eq!(after, settings.next_token_timeout);
            }
        }
    }
}
