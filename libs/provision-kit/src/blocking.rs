//! Work that blocks, away from the threads that must not.
//!
//! Tokio's code for a task is made once for every kind of work it is given. Here it
//! is given one kind only, which costs an allocation where threads change anyway and
//! spares the daemon dozens of copies.

use std::any::Any;
use std::panic::resume_unwind;

type Anything = Box<dyn Any + Send>;

/// Does work that blocks, or takes a millisecond or more, in the runtime's blocking
/// pool. Its panic goes on here. Dropping the future does not stop work that has
/// begun.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let result = in_the_pool(Box::new(move || Box::new(work()) as Anything)).await;
    match result.downcast() {
        Ok(result) => *result,
        Err(_) => unreachable!("it is what the work above has made"),
    }
}

async fn in_the_pool(work: Box<dyn FnOnce() -> Anything + Send>) -> Anything {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(broken) if broken.is_panic() => resume_unwind(broken.into_panic()),
        // The runtime ends, and whoever waits ends with it.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn work_is_done_on_another_thread() {
        let here = thread::current().id();
        let borrowed = String::from("what it needs");
        let (there, length) = blocking(move || (thread::current().id(), borrowed.len())).await;
        assert_ne!(there, here);
        assert_eq!(length, 13);
    }

    #[tokio::test]
    async fn a_panic_goes_on_where_the_work_is_waited_for() {
        let broken: Result<(), _> = tokio::spawn(blocking(|| panic!("in the pool"))).await;
        let said = broken.unwrap_err().into_panic();
        assert_eq!(said.downcast_ref(), Some(&"in the pool"));
    }
}
