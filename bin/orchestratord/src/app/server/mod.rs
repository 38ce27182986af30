//! The HTTP server: connections, and what a client may cost.
//!
//! A connection belongs to a task in [`serve`]'s set, and ends with it. What
//! holds for every connection:
//!
//! - there are at most `limits.connections`; further ones get a 503
//! - the head of a request is bounded in bytes, headers and time, its body in
//!   bytes (by the router), time, and time without progress ([`body`])
//! - a client that takes nothing of its answer is disconnected ([`guard`]), and
//!   what is held for it until then is bounded by hyper's write buffer and one
//!   batch of events
//! - whatever is answered here or by hyper itself has the one error shape
//!   ([`refusal`])

mod body;
mod guard;
mod refusal;

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics::{counter, gauge};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use self::body::BodyTimeout;
pub(crate) use self::body::Holding;
use self::body::TimedBody;
use self::guard::{Busy, Guard, Stage};
use super::config::Limits;
use crate::services::telemetry::{CONNECTIONS, TURNED_AWAY};

/// What is kept for a client that does not read, besides one batch of events.
const WRITE_BUFFER: usize = 32 * 1024;

/// The kernel's buffer for what is sent, which it doubles.
const SEND_BUFFER: usize = 64 * 1024;

/// How many refused connections are given their answer at the same time; the
/// others are closed without one.
const REFUSALS: usize = 32;

/// The first and the longest pause after an `accept` that failed for want of
/// something, such as file descriptors.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The address a request came from, for handlers.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// Serves until `closing` is cancelled, then lets open requests finish. Dropping
/// the future closes all connections.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    closing: CancellationToken,
) {
    let front = Arc::new(Front {
        open: Arc::new(Semaphore::new(as_usize(limits.connections))),
        refusals: Arc::new(Semaphore::new(REFUSALS)),
        service: TowerToHyperService::new(router),
        closing: closing.clone(),
        limits,
    });
    let mut connections = JoinSet::new();
    let mut pause = Duration::ZERO;
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = connections.join_next() => {
                report_panic(ended);
                continue;
            }
            () = closing.cancelled() => break,
        };
        match accepted {
            Ok((stream, peer)) => {
                if !pause.is_zero() {
                    tracing::info!("connections are accepted again");
                    pause = Duration::ZERO;
                }
                front.admit(&mut connections, stream, peer);
            }
            Err(error) if is_the_clients(&error) => {}
            Err(error) => {
                if pause.is_zero() {
                    tracing::error!(%error, "no connection can be accepted; trying on");
                }
                pause = (pause * 2).clamp(ACCEPT_PAUSE.0, ACCEPT_PAUSE.1);
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = closing.cancelled() => break,
                }
            }
        }
    }
    drop(listener);
    while let Some(ended) = connections.join_next().await {
        report_panic(ended);
    }
}

/// Errors of `accept` that are about the one connection only.
fn is_the_clients(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionAborted
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionRefused
            | ErrorKind::Interrupted
            | ErrorKind::TimedOut
            | ErrorKind::HostUnreachable
            | ErrorKind::NetworkUnreachable
    )
}

/// A panic ends its connection and nothing else. Handlers' panics are caught
/// before and answered; this is one in the midst of an answer.
fn report_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection broke by a fault of ours");
    }
}

fn as_usize(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// What all connections share.
#[derive(Debug)]
struct Front {
    open: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    service: TowerToHyperService<Router>,
    closing: CancellationToken,
    limits: Limits,
}

impl Front {
    fn admit(self: &Arc<Self>, connections: &mut JoinSet<()>, stream: TcpStream, peer: SocketAddr) {
        if let Ok(permit) = Arc::clone(&self.open).try_acquire_owned() {
            connections.spawn(Arc::clone(self).converse(stream, peer, permit));
            return;
        }
        counter!(TURNED_AWAY).increment(1);
        if let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() {
            connections.spawn(async move {
                refusal::turn_away(stream, peer).await;
                drop(permit);
            });
        }
    }

    async fn converse(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        open: OwnedSemaphorePermit,
    ) {
        let _counted = Counted::new(open);
        tune(&stream, &self.limits);
        let stage = Arc::new(Stage::default());
        let guard = Guard::new(stream, Arc::clone(&stage), &self.limits);
        let requests = Requests {
            front: Arc::clone(&self),
            stage,
            // One client, whether the listener takes IPv6 too or not.
            peer: Peer(peer.ip().to_canonical()),
        };
        let header_bytes = as_usize(self.limits.header_bytes);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            // The guard tells a slow head from an idle connection.
            .header_read_timeout(None)
            .max_headers(as_usize(self.limits.headers))
            .max_header_size(header_bytes)
            .max_buf_size(header_bytes.max(WRITE_BUFFER))
            .serve_connection(TokioIo::new(guard), requests);
        let mut connection = std::pin::pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = self.closing.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = ended {
            let reason = provision_kit::chain::one_line(&error);
            tracing::debug!(%peer, reason, "a connection broke");
        }
    }
}

/// A connection's place among those that may be open.
#[derive(Debug)]
struct Counted(OwnedSemaphorePermit);

impl Counted {
    fn new(open: OwnedSemaphorePermit) -> Self {
        gauge!(CONNECTIONS).increment(1.0);
        Self(open)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(CONNECTIONS).decrement(self.0.num_permits() as f64);
    }
}

/// Nothing here is needed for an answer, so that a failure is passed over.
fn tune(stream: &TcpStream, limits: &Limits) {
    // Tokens are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let socket = socket2::SockRef::from(stream);
    let _ = socket.set_send_buffer_size(SEND_BUFFER);
    // Ends the connection to a machine that is gone while its buffer has room.
    // Twice the time, so that where both would strike the guard says why.
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(limits.reader_stall() * 2));
    let _ = socket.set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(limits.idle()));
}

/// One connection's requests on their way to the router.
#[derive(Debug)]
struct Requests {
    front: Arc<Front>,
    stage: Arc<Stage>,
    peer: Peer,
}

impl Service<Request<Incoming>> for Requests {
    type Response = Response<Holding<Busy>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let busy = self.stage.begin_request();
        let limits = &self.front.limits;
        let mut request = request.map(|body| {
            let stage = Arc::clone(&self.stage);
            let (stall, whole) = (limits.body_stall(), limits.body());
            Body::new(TimedBody::new(body, stage, stall, whole))
        });
        request.extensions_mut().insert(self.peer);
        let answer = self.front.service.call(request);
        Box::pin(async move { Ok(answer.await?.map(|body| Holding::new(body, busy))) })
    }
}
