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
//!   and whole models that are read, goes through [`apart`], to a runtime of its own
//! - what takes milliseconds goes through [`computed`], to the blocking pool
//!   whose threads end when they are idle
//!
//! Engines are started and asked on the serving thread: what an adapter opens
//! must belong to the runtime that relays.

use std::future::Future;
use std::io;
use std::panic::resume_unwind;
use std::sync::{LazyLock, OnceLock};
use std::time::Duration;

pub use provision_kit::blocking::blocking;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// The most threads of one runtime that block at the same time. Further work
/// waits for one of them.
const BLOCKING_THREADS: usize = 16;

/// Threads of the runtime for long work: two models that come at once are hashed at
/// once.
const LONG_WORK_THREADS: usize = 2;

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
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .build();
        runtime.map(Self)
    }

    /// Drives everything on this thread until `main` is over, then ends all that is
    /// left. What still blocks by then holds the end for two seconds at the most.
    pub fn run<T>(self, main: impl Future<Output = T>) -> T {
        let result = self.0.block_on(main);
        self.0.shutdown_timeout(END_LIMIT);
        result
    }
}

/// Does work of milliseconds beside the start, before there is a runtime, on a thread
/// that ends with it.
///
/// # Errors
/// Where the system gives no more threads.
pub(crate) fn beside(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(work).map(drop)
}

/// The runtime for long work, begun with the first of it. It lives as long as the
/// process: what is begun there, such as a record on its way to the disk, is never
/// cut off by the end of somebody else's work.
fn for_long_work() -> Option<&'static Runtime> {
    static LONG_WORK: OnceLock<Option<Runtime>> = OnceLock::new();
    let begin = || {
        let runtime = Builder::new_multi_thread()
            .worker_threads(LONG_WORK_THREADS)
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name("long-work")
            .enable_all()
            .build();
        let warn = |error: &io::Error| {
            tracing::warn!(%error, "no threads can be had for long work; it is done where tasks are served");
        };
        runtime.inspect_err(warn).ok()
    };
    LONG_WORK.get_or_init(begin).as_ref()
}

/// How much of it is under way or still being dropped.
static UNDER_WAY: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// Counted as long as it lives.
struct UnderWay;

impl UnderWay {
    fn begin() -> Self {
        UNDER_WAY.send_modify(|count| *count += 1);
        Self
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        UNDER_WAY.send_modify(|count| *count -= 1);
    }
}

/// Does work away from the serving thread, on a runtime that lives as long as the
/// process. Dropping the future drops the work there, a moment later; its panic goes
/// on here. Where no thread can be had it is done here: late is better than never.
pub async fn apart<T, F>(work: F) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let Some(runtime) = for_long_work() else {
        return work.await;
    };
    let counted = UnderWay::begin();
    let job = runtime.spawn(async move {
        // Dropped last.
        let _counted = counted;
        work.await
    });
    match AbortOnDropHandle::new(job).await {
        Ok(result) => result,
        Err(broken) if broken.is_panic() => resume_unwind(broken.into_panic()),
        // It is stopped only when this future is dropped.
        Err(_) => std::future::pending().await,
    }
}

/// Waits until nothing is done apart any more, dropped work included.
pub async fn nothing_apart() {
    // The sender lives as long as the process.
    let _ = UNDER_WAY.subscribe().wait_for(|count| *count == 0).await;
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

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use tokio::sync::oneshot;

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
            let (there, ()) = tokio::join!(apart(async { work() }), served);
            assert_ne!(there, here);
            // What is small is not worth a change of threads.
            let small = computed(LARGE - 1, || thread::current().id()).await;
            assert_eq!(small, here);
        });
    }

    #[tokio::test]
    async fn work_apart_has_a_runtime_of_its_own() {
        let name = apart(async {
            tokio::time::sleep(Duration::from_millis(1)).await;
            let spawned = tokio::spawn(async { thread::current().name().map(str::to_owned) });
            spawned.await.unwrap()
        });
        assert_eq!(name.await.as_deref(), Some("long-work"));
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_any_more_is_dropped() {
        let (held, dropped) = oneshot::channel::<()>();
        let (tell, begun) = oneshot::channel();
        let work = apart(async move {
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
        let over = tokio::time::timeout(LIMIT, nothing_apart()).await;
        over.expect("what was dropped is counted no more");
    }

    #[tokio::test]
    async fn a_panic_goes_on_where_the_work_is_waited_for() {
        let broken = tokio::spawn(apart(async { panic!("over there") }));
        let broken: Result<(), _> = broken.await;
        assert!(broken.unwrap_err().is_panic());
    }
}
