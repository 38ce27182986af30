//! When an idle stream needs a word.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::coop::has_budget_remaining;
use tokio::time::{Instant, Sleep, sleep_until};

/// Watches over how long nothing was written. One timer, armed with the first wait.
/// It is set anew only when it fires and something was written since, so that
/// writing costs no more than a look at the clock.
#[derive(Debug)]
pub(super) struct KeepAlive {
    every: Duration,
    written: Instant,
    timer: Option<Timer>,
}

#[derive(Debug)]
struct Timer {
    sleep: Pin<Box<Sleep>>,
    /// Whom the timer wakes, as far as that is certain.
    wakes: Option<Waker>,
}

impl KeepAlive {
    pub(super) fn new(every: Duration) -> Self {
        Self {
            every,
            written: Instant::now(),
            timer: None,
        }
    }

    pub(super) fn wrote(&mut self) {
        self.written = Instant::now();
    }

    /// Ready once nothing was written for so long.
    pub(super) fn poll_silent(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let silent_at = self.written + self.every;
        let timer = self.timer.get_or_insert_with(|| Timer {
            sleep: Box::pin(sleep_until(silent_at)),
            wakes: None,
        });
        loop {
            let wakes_us =
                |wakes: &Option<Waker>| matches!(wakes, Some(it) if it.will_wake(context.waker()));
            if wakes_us(&timer.wakes) && !timer.sleep.is_elapsed() {
                return Poll::Pending;
            }
            // A poll beyond the task's budget is put off and leaves no waker with the
            // timer.
            let is_heard = has_budget_remaining();
            if timer.sleep.as_mut().poll(context).is_pending() {
                timer.wakes = is_heard.then(|| context.waker().clone());
                return Poll::Pending;
            }
            timer.wakes = None;
            if Instant::now() >= silent_at {
                return Poll::Ready(());
            }
            timer.sleep.as_mut().reset(silent_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test]
    async fn silence_counts_from_what_was_written_last() {
        let every = Duration::from_millis(20);
        let mut keep_alive = KeepAlive::new(every);
        let begun = Instant::now();
        poll_fn(|context| keep_alive.poll_silent(context)).await;
        assert!(begun.elapsed() >= every);
        // The timer is armed for this silence, and something is written within it.
        keep_alive.wrote();
        let armed = poll_fn(|context| Poll::Ready(keep_alive.poll_silent(context))).await;
        assert!(armed.is_pending());
        tokio::time::sleep(every / 2).await;
        keep_alive.wrote();
        let written = Instant::now();
        poll_fn(|context| keep_alive.poll_silent(context)).await;
        assert!(written.elapsed() >= every);
    }

    #[tokio::test]
    async fn another_task_that_waits_is_woken_too() {
        let mut keep_alive = KeepAlive::new(Duration::from_millis(1));
        let first = poll_fn(|context| Poll::Ready(keep_alive.poll_silent(context))).await;
        assert!(first.is_pending() || first.is_ready());
        tokio::spawn(async move { poll_fn(|context| keep_alive.poll_silent(context)).await })
            .await
            .unwrap();
    }

    #[tokio::test]
    async fn a_task_without_budget_is_woken_all_the_same() {
        let mut keep_alive = KeepAlive::new(Duration::from_millis(1));
        let mut first = true;
        poll_fn(|context| {
            // Uses up, once, what the task may do before it must let others run.
            while first && has_budget_remaining() {
                let consumed = std::pin::pin!(tokio::task::coop::consume_budget());
                let _ = consumed.poll(context);
            }
            first = false;
            keep_alive.poll_silent(context)
        })
        .await;
    }
}
