//! Answers that stream, read by the task itself.
//!
//! A client made for many requests has a task of its own for each connection, and
//! hands every piece from it to the task that reads. An answer here has a connection
//! to itself, and whoever reads the answer reads the socket: a token takes one read,
//! into a buffer that its event is then a part of. Dropping the answer closes the
//! connection at once.
//!
//! - [`head`]: what is sent, and what an answer begins with
//! - [`body`]: an answer's bytes without their framing. Pure
//! - [`connection`]: the socket

mod body;
mod connection;
mod head;

#[cfg(feature = "fuzzing")]
pub(crate) use self::connection::read_all;

use std::io;
use std::time::Duration;

pub(crate) use self::connection::{AnswerBody, send};
pub(crate) use self::head::Target;

/// Why a request has no whole answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("no connection could be opened")]
    Connect(#[source] io::Error),
    #[error("no connection could be opened in time")]
    ConnectTimeout,
    #[error("the request could not be sent")]
    Send(#[source] io::Error),
    #[error("the engine began to answer and took no more of the request for {} s", .limit.as_secs())]
    NotTaken { limit: Duration },
    #[error("the connection broke")]
    Receive(#[source] io::Error),
    #[error("the connection was closed before the answer was whole")]
    Closed,
    #[error("the answer's head is no HTTP")]
    Head(#[source] httparse::Error),
    #[error("the answer's head has more than {limit} bytes")]
    HeadTooLong { limit: usize },
    #[error("the answer's length cannot be told")]
    Length,
    #[error("the answer's framing is no HTTP: {what}")]
    Framing { what: &'static str },
}
