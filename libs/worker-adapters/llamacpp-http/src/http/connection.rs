//! One request and its answer, over a connection of their own.

use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::WriteHalf;
use tokio::time::timeout;
use tokio_util::io::poll_read_buf;

use super::HttpError;
use super::body::Framing;
use super::head::{Head, Target};

/// What one read takes in at first: some fifty events of one token.
const FIRST_READ: usize = 8 << 10;
/// What one read takes in of an engine that is ahead of us.
const LARGEST_READ: usize = 64 << 10;
/// With less room the buffer is begun anew.
const SMALLEST_READ: usize = 2 << 10;

/// How long an engine that has begun to answer may take nothing of the request's rest.
const REST_LIMIT: Duration = Duration::from_secs(10);

/// An answer whose head has come.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: AnswerBody,
}

/// An answer's bytes as they come.
pub(crate) type AnswerBody = Body<TcpStream>;

/// Sends a request and waits for the answer's head. Only the connection has a limit
/// of its own.
pub(crate) async fn send(
    target: &Target,
    path: &str,
    body: Bytes,
    connect_timeout: Duration,
) -> Result<Answer, HttpError> {
    send_within(target, path, body, connect_timeout, REST_LIMIT).await
}

async fn send_within(
    target: &Target,
    path: &str,
    body: Bytes,
    connect_timeout: Duration,
    rest_limit: Duration,
) -> Result<Answer, HttpError> {
    let connecting = TcpStream::connect((target.host.as_str(), target.port));
    let mut stream = timeout(connect_timeout, connecting)
        .await
        .map_err(|_| HttpError::ConnectTimeout)?
        .map_err(HttpError::Connect)?;
    stream.set_nodelay(true).map_err(HttpError::Connect)?;
    if target.delayed_acks {
        delay_acks(&stream);
    }
    let (mut receiving, mut sending) = stream.split();
    let mut buffer = BytesMut::with_capacity(FIRST_READ);
    let mut request = Bytes::from(target.request(path, body.len())).chain(body);
    let head = {
        let mut head = std::pin::pin!(receive_head(&mut receiving, &mut buffer));
        tokio::select! {
            biased;
            // An engine that answers need not have read the request to its end: what it
            // has said counts, and not that it then closed the connection.
            outcome = sending.write_all_buf(&mut request) => match (outcome, head.await) {
                (_, Ok(head)) => head,
                (Err(error), Err(_)) => return Err(HttpError::Send(error)),
                (Ok(()), Err(error)) => return Err(error),
            },
            head = &mut head => head?,
        }
    };
    if (200..300).contains(&head.status) {
        send_rest(&mut sending, &mut request, rest_limit).await?;
    }
    Ok(Answer {
        status: head.status,
        body: Body::new(stream, buffer, head.framing),
    })
}

/// Sends what is left of a request that an engine has begun to answer, as it may before
/// it has read all of it. Nothing reads the answer meanwhile, so an engine that takes
/// no more would wait for us as we do for it.
async fn send_rest(
    stream: &mut WriteHalf<'_>,
    request: &mut impl Buf,
    limit: Duration,
) -> Result<(), HttpError> {
    while request.has_remaining() {
        match timeout(limit, stream.write_buf(request)).await {
            Ok(Ok(1..)) => {}
            // Its answer tells whether it is whole all the same.
            Ok(_) => break,
            Err(_) => return Err(HttpError::NotTaken { limit }),
        }
    }
    Ok(())
}

/// Has several of the engine's packets acknowledged together, as far as the system
/// knows how: each token is one, and an answer to each costs as much as reading it.
fn delay_acks(stream: &TcpStream) {
    #[cfg(target_os = "linux")]
    if let Err(error) = socket2::SockRef::from(stream).set_tcp_quickack(false) {
        tracing::debug!(%error, "every packet of the engine is acknowledged by itself");
    }
    #[cfg(not(target_os = "linux"))]
    let _ = stream;
}

async fn receive_head<R: AsyncRead + Unpin>(
    source: &mut R,
    buffer: &mut BytesMut,
) -> Result<Head, HttpError> {
    loop {
        buffer.reserve(SMALLEST_READ);
        let read = poll_fn(|context| poll_read_buf(Pin::new(&mut *source), context, buffer));
        if read.await.map_err(HttpError::Receive)? == 0 {
            return Err(HttpError::Closed);
        }
        if let Some(head) = Head::take(buffer)? {
            return Ok(head);
        }
    }
}

/// An answer's bytes as they come, without their framing.
#[derive(Debug)]
pub(crate) struct Body<R> {
    /// Closed as soon as the body is over or cannot be read on.
    source: Option<R>,
    buffer: BytesMut,
    framing: Framing,
    /// What the next buffer has room for.
    read_size: usize,
    /// Bytes of the latest read.
    latest_read: usize,
    /// The latest read took in all that it could: the engine is ahead.
    was_full: bool,
    has_yielded: bool,
    has_read: bool,
}

impl<R: AsyncRead + Unpin> Body<R> {
    fn new(source: R, buffer: BytesMut, framing: Framing) -> Self {
        Self {
            source: Some(source),
            buffer,
            framing,
            read_size: FIRST_READ,
            latest_read: FIRST_READ,
            was_full: false,
            has_yielded: false,
            has_read: true,
        }
    }

    /// Whether anything was read since this was last asked.
    pub(crate) fn take_has_read(&mut self) -> bool {
        std::mem::take(&mut self.has_read)
    }

    /// Whether nothing came last only because others have their turn: the engine was
    /// not asked.
    pub(crate) fn has_yielded(&self) -> bool {
        self.has_yielded
    }

    /// The next bytes of the body, never none. An error is the last item.
    pub(crate) fn poll_data(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, HttpError>>> {
        if self.source.is_none() {
            return Poll::Ready(None);
        }
        let item = loop {
            match self.framing.take(&mut self.buffer) {
                Ok(Some(bytes)) => return Poll::Ready(Some(Ok(bytes))),
                Ok(None) if self.framing.is_over() => break None,
                Ok(None) => {}
                Err(error) => break Some(Err(error)),
            }
            match ready!(self.poll_read(context)) {
                Ok(0) if self.framing.may_end() => break None,
                Ok(0) => break Some(Err(HttpError::Closed)),
                Ok(_) => {}
                Err(error) => break Some(Err(error)),
            }
        };
        self.source = None;
        Poll::Ready(item)
    }

    /// The whole of a short body, or as much of it as could be read within the limit.
    pub(crate) async fn short(mut self, limit: usize) -> Vec<u8> {
        let mut body = Vec::new();
        while let Some(Ok(bytes)) = poll_fn(|context| self.poll_data(context)).await {
            body.extend_from_slice(&bytes);
            if body.len() > limit {
                break;
            }
        }
        body
    }

    fn poll_read(&mut self, context: &mut Context<'_>) -> Poll<Result<usize, HttpError>> {
        self.has_yielded = std::mem::take(&mut self.was_full);
        if self.has_yielded {
            // Many events were handed out in one go: others have their turn.
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        if self.buffer.is_empty() {
            self.begin_anew();
        }
        if self.buffer.capacity() - self.buffer.len() < SMALLEST_READ {
            let room = self.read_size.saturating_sub(self.buffer.len());
            self.buffer.reserve(room.max(SMALLEST_READ));
        }
        let room = self.buffer.capacity() - self.buffer.len();
        let Some(source) = &mut self.source else {
            return Poll::Ready(Ok(0));
        };
        let read = ready!(poll_read_buf(Pin::new(source), context, &mut self.buffer));
        let read = read.map_err(HttpError::Receive)?;
        (self.has_read, self.latest_read) = (true, read);
        if read == room {
            self.was_full = read >= FIRST_READ / 2;
            self.read_size = (self.read_size * 2).min(LARGEST_READ);
        }
        Poll::Ready(Ok(read))
    }

    /// Sees to it that an empty buffer begins at its beginning: what was read before has
    /// been let go, mostly, and the same memory again is still in the processor's
    /// caches. An engine that is no longer ahead needs no large one.
    fn begin_anew(&mut self) {
        if self.read_size > FIRST_READ && self.latest_read < self.read_size / 8 {
            self.read_size /= 2;
            self.buffer = BytesMut::new();
        }
        // Where it was not let go there may be room behind it.
        let _ = self.buffer.try_reclaim(FIRST_READ);
    }
}

/// What an answer in reads of `read` bytes amounts to: its status, its body, and why
/// that ends early. For tests and fuzz targets.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn read_all(answer: &[u8], read: usize) -> (Option<u16>, Vec<u8>, Option<String>) {
    let mut source = tokio_util::io::StreamReader::new(futures::stream::iter(
        answer.chunks(read.max(1)).map(Ok::<_, std::io::Error>),
    ));
    let reading = async {
        let mut buffer = BytesMut::new();
        let head = match receive_head(&mut source, &mut buffer).await {
            Ok(head) => head,
            Err(error) => return (None, Vec::new(), Some(error.to_string())),
        };
        let mut body = Body::new(source, buffer, head.framing);
        let mut whole = Vec::new();
        loop {
            match poll_fn(|context| body.poll_data(context)).await {
                Some(Ok(bytes)) => whole.extend_from_slice(&bytes),
                Some(Err(error)) => return (Some(head.status), whole, Some(error.to_string())),
                None => return (Some(head.status), whole, None),
            }
        }
    };
    futures::executor::block_on(reading)
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
