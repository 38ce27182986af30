//! Which thread does what. No more than this module makes runtimes or threads
//! for the daemon's own work.
//!
//! One thread serves: the process's first one drives [`Serving`], and with it
//! every connection, every pool's owner and every token from the engine to its
//! readers. A relay needs no more than one thread, and on one nothing has to be
//! woken on another for each token. So nothing on it may compute for long or
//! block:
//!
//! - work of minutes, such as downloads with their hashing and unpacking, builds
//!   and whole models that are read, goes through [`apart`]: it gets a thread and
//!   a runtime for as long as it takes, and an idle daemon keeps none of them
//! - what takes milliseconds goes through [`computed`], to the blocking pool
//!   whose threads end when they are idle
//!
//! Engines are started and asked on the serving thread: what an adapter opens
//! must belong to the runtime that relays.

use std::future::Future;
use std::io;
use std::panic::{AssertUnwindSafe, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use futures::FutureExt;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// The most threads of one runtime that block at the same time. Further work
/// waits for one of them.
const BLOCKING_THREADS: usize = 16;

/// From so many bytes on reading a body is not the serving thread's business: the
/// parser needs a tenth of a millisecond for them.
const LARGE: usize = 64 * 1024;

/// How long the process waits at its end for what still blocks.
const END_LIMIT: Duration = Duration::from_secs(2);

/// The runtime of the thread that serves.
#[derive(Debug)]
pub struct Serving(Runtime);

impl Serving {
    /// # Errors
    /// Where the system gives no more file descriptors.
    pub fn new() -> io::Result<Self> {
        on_one_thread().map(Self)
    }

    /// Drives everything on this thread until `main` is over, then ends all that is
    /// left. What still blocks by then holds the end for two seconds at the most.
    pub fn run<T>(self, main: impl Future<Output = T>) -> T {
        let result = self.0.block_on(main);
        self.0.shutdown_timeout(END_LIMIT);
        result
    }
}

fn on_one_thread() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
}

/// Does work away from the serving thread, in a thread and a runtime of its own
/// that end with it. Dropping the future drops the work there, a moment later;
/// its panic goes on here. Where no thread can be had it is done here: late is
/// better than never.
pub async fn apart<T, F>(name: &'static str, work: F) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let stop = CancellationToken::new();
    let _stopped_on_drop = stop.clone().drop_guard();
    let (tell, told) = oneshot::channel();
    let work = Arc::new(Mutex::new(Some(work)));
    let taken = Arc::clone(&work);
    let there = move |runtime: Runtime| {
        if let Some(work) = take(&taken) {
            let work = AssertUnwindSafe(work).catch_unwind();
            // Nobody listens where it was stopped.
            let _ = tell.send(runtime.block_on(stop.run_until_cancelled_owned(work)));
            // What it left to the pool is done, too: a runtime that ends waits for what
            // has begun there, and the pool begins in order. The outcome is nothing.
            let _ = runtime.block_on(runtime.spawn_blocking(|| ()));
        }
    };
    let started = on_one_thread().and_then(|runtime| {
        let thread = thread::Builder::new().name(name.to_owned());
        thread.spawn(move || there(runtime))
    });
    if let Err(error) = started {
        tracing::warn!(work = name, %error, "no thread of its own can be had; it is done where tasks are served");
        return match take(&work) {
            Some(work) => work.await,
            None => std::future::pending().await,
        };
    }
    match told.await {
        Ok(Some(Ok(result))) => result,
        Ok(Some(Err(panic))) => resume_unwind(panic),
        // It is stopped only when this future is dropped, and its panics are caught.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

fn take<F>(work: &Mutex<Option<F>>) -> Option<F> {
    // Nothing that holds the lock can panic.
    work.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// Does work on `bytes` bytes: here if they are few, else in the blocking pool. Its
/// panic goes on here.
pub async fn computed<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if bytes < LARGE {
        return work();
    }
    blocking(work).await
}

/// Does work that blocks, or takes a millisecond or more, in the blocking pool. Its
/// panic goes on here.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(broken) if broken.is_panic() => resume_unwind(broken.into_panic()),
        // The runtime ends, and whoever waits ends with it.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Far longer than anything here takes.
    const LIMIT: Duration = Duration::from_secs(30);

    /// Work that blocks its thread until the serving thread has got on, which it
    /// could not if it were the same.
    fn until_served() -> (
        impl FnOnce() -> thread::ThreadId + Send,
        impl Future<Output = ()>,
    ) {
        let (tell, told) = mpsc::channel();
        let work = move || {
            told.recv_timeout(LIMIT)
                .expect("the serving thread got on meanwhile");
            thread::current().id()
        };
        let served = async move {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            tell.send(()).unwrap();
        };
        (work, served)
    }

    #[test]
    fn tokens_flow_while_a_large_body_is_read_or_a_download_is_hashed() {
        let serving = Serving::new().unwrap();
        let here = thread::current().id();
        serving.run(async {
            let (work, served) = until_served();
            let (there, ()) = tokio::join!(computed(LARGE, work), served);
            assert_ne!(there, here);
            let (work, served) = until_served();
            let (there, ()) = tokio::join!(apart("hash", async { work() }), served);
            assert_ne!(there, here);
            // What is small is not worth a change of threads.
            let small = computed(LARGE - 1, || thread::current().id()).await;
            assert_eq!(small, here);
        });
    }

    #[tokio::test]
    async fn work_apart_has_a_runtime_and_a_name_of_its_own() {
        let name = apart("pull", async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let spawned = tokio::spawn(async { thread::current().name().map(str::to_owned) });
            spawned.await.unwrap()
        });
        assert_eq!(name.await.as_deref(), Some("pull"));
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_any_more_is_dropped() {
        let (held, dropped) = oneshot::channel::<()>();
        let (tell, begun) = oneshot::channel();
        let work = apart("endless", async move {
            let _held = held;
            tell.send(()).unwrap();
            std::future::pending::<()>().await;
        });
        tokio::select! {
            () = work => unreachable!("it has no end"),
            begun = begun => begun.unwrap(),
        }
        let dropped = tokio::time::timeout(LIMIT, dropped).await;
        assert!(dropped.expect("the work is dropped").is_err());
    }

    #[tokio::test]
    async fn what_work_left_to_the_pool_is_done_though_its_runtime_ends() {
        for _ in 0..50 {
            let left = apart("record", async { tokio::task::spawn_blocking(|| 7) }).await;
            let left = tokio::time::timeout(LIMIT, left).await;
            assert_eq!(left.unwrap().expect("it is begun, and so ended"), 7);
        }
    }

    #[tokio::test]
    async fn a_panic_goes_on_where_the_work_is_waited_for() {
        let broken = tokio::spawn(apart("broken", async { panic!("over there") }));
        let broken: Result<(), _> = broken.await;
        assert!(broken.unwrap_err().is_panic());
        let broken = tokio::spawn(blocking(|| panic!("in the pool")));
        let broken: Result<(), _> = broken.await;
        assert!(broken.unwrap_err().is_panic());
    }
}
